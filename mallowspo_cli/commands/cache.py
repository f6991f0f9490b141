"""`mallowspo cache inspect | diff | gc`: look into reference stores, compare and tidy them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mallowspo_cli import dispersion
from mallowspo_cli.commands.prepare import Prepared, one_process, prepare, recipe_store
from mallowspo_cli.commands.words import own_words, whole_number
from mallowspo_cli.data.dataset import has_split
from mallowspo_cli.data.prepare import prepared_path
from mallowspo_cli.data.sources import open_sources
from mallowspo_cli.distributed import set_up_logging
from mallowspo_cli.errors import CacheError, DataError, RecipeError
from mallowspo_cli.files import cache_directory
from mallowspo_cli.recipe.load import load_recipe
from mallowspo_cli.recipe.nearest import nearest
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.reference import maintenance
from mallowspo_cli.reference.claims import Claims
from mallowspo_cli.reference.store import FORMAT, ReferenceRows, ReferenceStore
from mallowspo_cli.reference.terms import fit_reference, numbers_of, raw_weights


@dataclass(frozen=True)
class Opened:
    """A recipe, its data and its store."""

    recipe: Recipe
    prepared: Prepared
    store: ReferenceStore

    @property
    def pair_ids(self) -> list[str]:
        """Ids of the pairs of all splits, each once."""
        splits = self.prepared.splits.values()
        return list(dict.fromkeys(pair for split in splits for pair in split.pairs.pair_ids))


def inspect(name: str, overrides: list[str]) -> None:
    """Print what the store of recipe `name` is and holds; see `mallowspo cache inspect --help`."""
    opened = open_recipe("inspect", name, overrides)
    store, out = opened.store, results_console()
    out.print(f"store: {store.path}", soft_wrap=True)
    table = Table("", "value", title=Text("reference store"))
    for label, value in _facts(store):
        table.add_row(label, Text(value))
    out.print(table)
    table = Table("split", title=Text(f"pairs of recipe {opened.recipe.name}"))
    for label in ("pairs", "different", "rows there", "missing"):
        table.add_column(label, justify="right")
    for split, prepared in opened.prepared.splits.items():
        ids = prepared.pairs.pair_ids
        different, missing = len(set(ids)), len(store.missing(ids))
        counts = (len(ids), different, different - missing, missing)
        table.add_row(split, *(f"{count:,}" for count in counts))
    out.print(table)
    out.print(_dispersion_line(opened), soft_wrap=True)


def diff(name: str, overrides: list[str]) -> None:
    """Compare the store of recipe `name` with others; see `mallowspo cache diff --help`.

    Raises:
        CacheError: `with=` names no store.
    """
    own, overrides = own_words(overrides, ("with",))
    # First: it is quickly found to be none.
    place = Path(own["with"]).expanduser() if "with" in own else None
    other = ReferenceStore.open(place, None) if place is not None else None
    opened = open_recipe("diff", name, overrides)
    if other is not None:
        _print_comparison(opened.store, other)
    else:
        _print_neighbours(opened.store)


def gc(name: str, overrides: list[str]) -> None:
    """Tidy the store of recipe `name`; see `mallowspo cache gc --help`.

    Raises:
        CacheError: another process works in the store.
    """
    own, overrides = own_words(overrides, ("unused", "days"))
    days = whole_number(own, "days", 0) if "days" in own else None
    drop = own.get("unused", "keep")
    if drop not in ("keep", "drop"):
        raise RecipeError(
            f"unused={drop} is neither keep nor drop.{nearest(drop, ('keep', 'drop'))}"
        )
    opened = open_recipe("gc", name, overrides)
    store = opened.store
    if not (store.path / "manifest.json").is_file():
        raise CacheError(f"no reference store at {store.path}, so there is nothing to tidy.")
    _refuse_where_claimed(store)
    left_over = maintenance.left_over(store.path)
    freed = maintenance.remove(left_over)
    with Claims(store.path / "claims").held("gc") as ours:
        if not ours:
            raise CacheError(f"another gc has begun in {store.path}. Run this one after it.")
        wanted = set(opened.pair_ids) if drop == "drop" else None
        merge = maintenance.merge_shards(store, wanted)
    freed += merge.freed
    _say_merged(store, merge)
    for path in left_over:
        click.echo(f"removed {path}")
    if days is not None:
        places = [store.path, *_own_data(opened)]
        for path in maintenance.unused(cache_directory(), days, places):
            freed += maintenance.remove([path])
            click.echo(f"removed {path}, unused for {days} days")
    click.echo(f"{freed:,} bytes freed")


def open_recipe(verb: str, name: str, overrides: list[str], create: bool = False) -> Opened:
    """Recipe, prepared data and store for `mallowspo cache VERB`; only `create` makes a store."""
    set_up_logging()
    loaded = load_recipe(name, overrides)
    recipe = loaded.recipe
    one_process(f"cache {verb}")
    prepared = prepare(recipe, loaded.words)
    return Opened(recipe, prepared, recipe_store(recipe, prepared, create))


def results_console() -> Console:
    """Where results are printed: stdout, texts as they are."""
    return Console(highlight=False, markup=False)


def _facts(store: ReferenceStore) -> Iterator[tuple[str, str]]:
    yield "format", str(FORMAT)
    yield from asdict(store.fingerprint).items()
    yield "vocabulary", f"{store.vocab_size:,}"
    yield "rows", f"{len(store):,}"
    shards = store.shards()
    yield "shards", f"{len(shards):,} of {sum(s.stat().st_size for s in shards):,} bytes"
    damaged = {path.with_suffix(".damaged") for path in store.damaged}
    damaged |= set(store.path.glob("*.damaged"))
    yield "damaged shards", ", ".join(sorted(path.stem for path in damaged)) or "none"
    for label, values in maintenance.notes(store).items():
        yield label.replace("_", " "), ", ".join(values)
    held = [claim for claim in maintenance.claims_of(store.path) if claim.live]
    owners = [f"{claim.owner} ({claim.file.name})" for claim in held]
    yield "claims held", ", ".join(owners) or "none"


def _dispersion_line(opened: Opened) -> str:
    recipe, prepared, store = opened.recipe, opened.prepared, opened.store
    if store.missing(prepared.train.pair_ids):
        fill = prepared.fill_command
        return f"dispersion: unknown until every training pair has a row: {fill}"
    config = recipe.dispersion
    try:
        pairs, reference = fit_reference(store, config, prepared.train, recipe.seed)
        raw = raw_weights(store, config, pairs.pair_ids, numbers_of(config, pairs))
        auto = dispersion.unit_mean_scale(raw)
    except DataError as error:
        return f"dispersion: {error}"
    summary = reference.summary
    return (
        f"dispersion: auto scale {auto:.4f}; with scale {summary.scale:.4f} w has mean "
        f"{summary.weight_mean:.4f}, from {summary.weight_min:.4f} to {summary.weight_max:.4f}"
    )


def print_differences(
    title: str, heading: str, found: ReferenceRows, expected: ReferenceRows
) -> None:
    """The largest difference of each column, and of the sums also as a share."""
    table = Table("", title=Text(title))
    table.add_column(heading, justify="right")
    table.add_column("relative", justify="right")
    for column, delta in maintenance.differences(found, expected).items():
        relative = ""
        if column.endswith(("_logp", "_sum")):
            share = delta / getattr(expected, column).abs().clamp(min=1e-12)
            relative = f"{float(share.max()):.2g}"
        table.add_row(column, f"{float(delta.max()):.3g}", relative)
    results_console().print(table)


def _print_comparison(here: ReferenceStore, there: ReferenceStore) -> None:
    out = results_console()
    out.print(f"here:  {here.path}\nthere: {there.path}", soft_wrap=True)
    one, other = _built_by(here), _built_by(there)
    for field in one:
        if one[field] != other[field]:
            out.print(f"{field}: {one[field]} here, {other[field]} there", soft_wrap=True)
    if one == other:
        out.print("built alike")
    absent = set(there.missing(here.pair_ids))
    common = [pair for pair in here.pair_ids if pair not in absent]
    out.print(
        f"rows: {len(here) - len(common):,} only here, {len(there) - len(common):,} only there, "
        f"{len(common):,} in both"
    )
    if common:
        title = f"{len(common)} rows that both have"
        print_differences(title, "max difference", there.lookup(common), here.lookup(common))


def _built_by(store: ReferenceStore) -> dict[str, str]:
    return {**asdict(store.fingerprint), "vocabulary": str(store.vocab_size)}


def _print_neighbours(store: ReferenceStore) -> None:
    """A line for each other store in the user's cache."""
    directory = cache_directory() / "reference"
    places = [
        file.parent
        for file in sorted(directory.glob("*/manifest.json"))
        if file.parent.resolve() != store.path.resolve() and not file.parent.name.startswith(".")
    ]
    out = results_console()
    out.print(f"here: {store.path}, {len(store):,} rows", soft_wrap=True)
    if not places:
        out.print(f"no other store in {directory}", soft_wrap=True)
    for place in places:
        try:
            other = ReferenceStore.open(place, None)
        except CacheError:
            out.print(f"{place.name}: not a store of version {FORMAT}", soft_wrap=True)
            continue
        one, two = _built_by(store), _built_by(other)
        names = ", ".join(field for field in one if one[field] != two[field])
        differs = f"differs in {names}" if names else "built alike"
        out.print(f"{place.name}: {len(other):,} rows, {differs}", soft_wrap=True)


def _refuse_where_claimed(store: ReferenceStore) -> None:
    held = [claim for claim in maintenance.claims_of(store.path) if claim.live]
    if held:
        raise CacheError(
            f"{held[0].owner} works in {store.path} (last sign {held[0].silent_seconds:.0f} s "
            "ago). Run gc again when it has ended."
        )


def _say_merged(store: ReferenceStore, merge: maintenance.Merge) -> None:
    if not merge.shards:
        click.echo(f"{store.path}: {merge.rows:,} rows, nothing to merge")
        return
    click.echo(f"{store.path}: {len(merge.shards):,} shards merged, {merge.rows:,} rows stay")
    if merge.doubled:
        click.echo(f"left out {merge.doubled:,} rows that an older shard has")
    if merge.dropped:
        click.echo(f"dropped {merge.dropped:,} rows of pairs that the recipe's data does not hold")


def _own_data(opened: Opened) -> list[Path]:
    """Directories of the recipe's prepared data."""
    config, tokenizer = opened.recipe.dataset, opened.prepared.tokenizer
    column = opened.recipe.dispersion.column
    return [
        prepared_path(source, tokenizer, config, column)
        for split in ("train", "eval")
        if has_split(config, split)
        for source in open_sources(config, split)
    ]
