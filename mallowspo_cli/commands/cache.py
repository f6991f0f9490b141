"""`mallowspo cache`: look into reference stores, verify, compare, tidy and export them."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mallowspo_cli import dispersion
from mallowspo_cli.commands.prepare import (
    Prepared,
    default_device,
    filled_store,
    one_process,
    prepare,
)
from mallowspo_cli.data.dataset import has_split
from mallowspo_cli.data.prepare import VERSION, PreparedSplit, _key
from mallowspo_cli.data.sources import open_sources
from mallowspo_cli.data.table import TokenizedPair
from mallowspo_cli.distributed import log, progress, set_up_logging
from mallowspo_cli.errors import CacheError, DataError, RecipeError
from mallowspo_cli.files import cache_directory, make_directory, whole_file
from mallowspo_cli.packing.layout import collate
from mallowspo_cli.recipe.choices import Dtype, Precision
from mallowspo_cli.recipe.find import nearest
from mallowspo_cli.recipe.load import load_recipe
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.reference import maintenance
from mallowspo_cli.reference.build import load_scorer, open_store, score_rows
from mallowspo_cli.reference.claims import Claims
from mallowspo_cli.reference.store import COLUMNS, FORMAT, ReferenceRows, ReferenceStore
from mallowspo_cli.reference.store import SCHEMA as STORE_SCHEMA
from mallowspo_cli.reference.terms import (
    Reference,
    kept_pairs,
    normalised_entropy,
    numbers_of,
    raw_weights,
)
from mallowspo_cli.training.startup import tolerance

VERIFIED_ROWS = 16
EXPORTED = pa.schema(
    [
        ("split", pa.string()),
        ("part", pa.string()),
        ("row", pa.int64()),
        *STORE_SCHEMA,
        ("prompt_tokens", pa.int32()),
        ("normalised_entropy", pa.float64()),
        ("raw_weight", pa.float64()),
        ("w", pa.float32()),
    ]
)
"""Columns of an export, a line for each pair of the data. `row` counts the rows of the data, or of
its `part` in a mixture, from 0; `raw_weight` is w before its scale: -ln(normalised_entropy), or
what the data says."""


@dataclass(frozen=True)
class Opened:
    """A recipe, its data and its store."""

    recipe: Recipe
    prepared: Prepared
    store: ReferenceStore
    fill: str
    """The command that fills the store."""

    @property
    def pair_ids(self) -> list[str]:
        """Ids of the pairs of all splits, each once."""
        splits = self.prepared.splits.values()
        return list(dict.fromkeys(pair for split in splits for pair in split.pairs.pair_ids))


def inspect(name: str, overrides: list[str]) -> None:
    """Print what the store of recipe `name` is and holds; see `mallowspo cache inspect --help`."""
    opened = _open("inspect", name, overrides)
    store, out = opened.store, _console()
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


def verify(name: str, overrides: list[str]) -> None:
    """Score some rows of recipe `name` again; see `mallowspo cache verify --help`.

    Raises:
        CacheError: a row is not what the model gives, or there are none.
    """
    own, overrides = _own_words(overrides, ("rows",))
    count = _whole(own, "rows") or VERIFIED_ROWS
    opened = _open("verify", name, overrides)
    store = opened.store
    pairs = _drawn(opened, count)
    stored = store.lookup([pair.pair_id for pair in pairs])
    found = _scored_again(opened, pairs)
    _print_differences(
        f"{len(pairs)} of {len(store)} rows, scored again", "max difference", found, stored
    )
    for column in COLUMNS:
        values, expected = getattr(found, column), getattr(stored, column)
        allowed = _allowed(column, stored, store.fingerprint.compute)
        # Also where one is not a number.
        outside = (~((values - expected).abs() <= allowed)).nonzero().flatten().tolist()
        if outside:
            index, pair = outside[0], pairs[outside[0]].pair_id
            raise CacheError(
                f"{column} of pair {pair} is stored as {float(expected[index]):.6g}, and scoring "
                f"it again gives {float(values[index]):.6g}; {float(allowed[index]):.2g} of "
                f"difference would be rounding. {_cure(opened, pair)}"
            )
    log.info("every one of the %d rows is what the model gives", len(pairs))


def diff(name: str, overrides: list[str]) -> None:
    """Compare the store of recipe `name` with others; see `mallowspo cache diff --help`.

    Raises:
        CacheError: `with=` names no store.
    """
    own, overrides = _own_words(overrides, ("with",))
    opened = _open("diff", name, overrides)
    if "with" in own:
        other = ReferenceStore.open(Path(own["with"]).expanduser(), None)
        _print_comparison(opened.store, other)
    else:
        _print_neighbours(opened.store)


def gc(name: str, overrides: list[str]) -> None:
    """Tidy the store of recipe `name`; see `mallowspo cache gc --help`.

    Raises:
        CacheError: another process works in the store.
    """
    own, overrides = _own_words(overrides, ("unused", "days"))
    days, drop = _whole(own, "days"), own.get("unused", "keep")
    if drop not in ("keep", "drop"):
        raise RecipeError(
            f"unused={drop} is neither keep nor drop.{nearest(drop, ('keep', 'drop'))}"
        )
    opened = _open("gc", name, overrides)
    store = opened.store
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


def export(name: str, overrides: list[str]) -> None:
    """Write the rows of recipe `name` to a file; see `mallowspo cache export --help`."""
    own, overrides = _own_words(overrides, ("to",))
    target = _target(own.get("to"))
    opened = _open("export", name, overrides)
    make_directory(target.parent, "the export")
    recipe, prepared = opened.recipe, opened.prepared
    store, _ = filled_store(recipe, prepared, default_device())
    reference = _reference(recipe, prepared, store)
    tables = [
        _exported(split, found, reference).cast(EXPORTED)
        for split, found in prepared.splits.items()
    ]
    about = {"fingerprint": store.fingerprint.key(), "dispersion_scale": repr(reference.scale)}
    table = pa.concat_tables(tables).replace_schema_metadata(about)
    with whole_file(target) as temporary:
        pq.write_table(table, temporary)
    log.info("wrote %d rows", len(table))
    click.echo(target)


def _open(verb: str, name: str, overrides: list[str]) -> Opened:
    set_up_logging()
    recipe = load_recipe(name, overrides).recipe
    one_process(f"cache {verb}")
    prepared = prepare(recipe)
    # Without the words that are this verb's own.
    fill = shlex.join(["mallowspo", "cache-ref", f"recipe={name}", *overrides])
    store = open_store(
        prepared.directory, recipe.model, recipe.reference, recipe.train.precision, fill
    )
    return Opened(recipe, prepared, store, fill)


def _own_words(words: list[str], keys: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The verb's own words by key, and Hydra overrides."""
    own: dict[str, str] = {}
    overrides = []
    for word in words:
        key, _, value = word.partition("=")
        if key not in keys:
            overrides.append(word)
        elif not value:
            raise RecipeError(f"{key} is empty. Give a value: {key}=...")
        else:
            own[key] = value
    return own, overrides


def _whole(own: dict[str, str], key: str) -> int | None:
    if key not in own:
        return None
    if not own[key].isdecimal() or int(own[key]) == 0:
        raise RecipeError(f"{key}={own[key]} is no count; expected a whole number above 0.")
    return int(own[key])


def _target(text: str | None) -> Path:
    if text is None:
        raise RecipeError(
            "found no to=. Example: mallowspo cache export recipe=... to=rows.parquet"
        )
    target = Path(text).expanduser()
    if target.suffix != ".parquet":
        raise RecipeError(f"to={text} does not end in .parquet, which is what is written.")
    if target.is_dir():
        raise RecipeError(f"to={text} is a directory; expected a file's name.")
    return target


def _console() -> Console:
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
        return f"dispersion: unknown until every training pair has a row: {opened.fill}"
    try:
        reference = _reference(recipe, prepared, store)
        pairs = prepared.train
        if recipe.dispersion.keep is not None:
            pairs = kept_pairs(store, recipe.dispersion, pairs)
        raw = raw_weights(
            store, recipe.dispersion, pairs.pair_ids, numbers_of(recipe.dispersion, pairs)
        )
        auto = dispersion.unit_mean_scale(raw)
    except DataError as error:
        return f"dispersion: {error}"
    summary = reference.summary
    return (
        f"dispersion: auto scale {auto:.4f}; with scale {summary.scale:.4f} w has mean "
        f"{summary.weight_mean:.4f}, from {summary.weight_min:.4f} to {summary.weight_max:.4f}"
    )


def _reference(recipe: Recipe, prepared: Prepared, store: ReferenceStore) -> Reference:
    """Weights as training on the recipe finds them."""
    pairs, config = prepared.train, recipe.dispersion
    if config.keep is not None:
        pairs = kept_pairs(store, config, pairs)
    return Reference(store, config, pairs.pair_ids, recipe.seed, numbers=numbers_of(config, pairs))


def _drawn(opened: Opened, count: int) -> list[TokenizedPair]:
    """Up to `count` pairs that have a row, drawn with the recipe's seed, in the data's order."""
    store = opened.store
    places: dict[str, tuple[str, int]] = {}
    for split, prepared in opened.prepared.splits.items():
        for index, pair in enumerate(prepared.pairs.pair_ids):
            places.setdefault(pair, (split, index))
    for pair in store.missing(list(places)):
        del places[pair]
    if not places:
        raise CacheError(
            f"the store at {store.path} has no row of the recipe's pairs, so there is nothing to "
            f"verify. Fill it: {opened.fill}"
        )
    generator = torch.Generator().manual_seed(opened.recipe.seed)
    drawn = torch.randperm(len(places), generator=generator)[:count].sort().values.tolist()
    there = list(places.values())
    splits = opened.prepared.splits
    return [splits[split].pairs[index] for split, index in (there[place] for place in drawn)]


def _scored_again(opened: Opened, pairs: Sequence[TokenizedPair]) -> ReferenceRows:
    """One pair a pass: no more memory than the reference pass took, and packs of its own."""
    recipe, device = opened.recipe, default_device()
    autocast = recipe.model.dtype is Dtype.float32 and recipe.train.precision is Precision.bf16
    scorer = load_scorer(opened.prepared.directory, recipe.model, device)
    found = []
    with progress("verifying", len(pairs), "pairs") as advance:
        for pair in pairs:
            found.append(score_rows(scorer, collate([pair]).to(device), autocast))
            advance(1)
    return ReferenceRows(**{c: torch.cat([getattr(rows, c) for rows in found]) for c in COLUMNS})


def _allowed(column: str, stored: ReferenceRows, compute: str) -> Tensor:
    """The difference that rounding explains, (B,): none of a count; an entropy's rounding is taken
    to be that of as many log-probs.
    """
    values = getattr(stored, column)
    if column.endswith("tokens"):
        return torch.zeros(len(values))
    tokens = getattr(stored, f"{column.partition('_')[0]}_tokens")
    if "first" in column:
        tokens = torch.ones_like(tokens)
    return tolerance(values, tokens, [compute])


def _cure(opened: Opened, pair_id: str) -> str:
    shard = maintenance.shard_of(opened.store, pair_id)
    return (
        f"Delete the shard and fill the store again: rm {shlex.quote(str(shard))} && {opened.fill}"
    )


def _print_differences(
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
    _console().print(table)


def _print_comparison(here: ReferenceStore, there: ReferenceStore) -> None:
    out = _console()
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
        _print_differences(title, "max difference", there.lookup(common), here.lookup(common))


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
    out = _console()
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
        cache_directory() / "data" / f"v{VERSION}-{_key(source, tokenizer, config, column)}"
        for split in ("train", "eval")
        if has_split(config, split)
        for source in open_sources(config, split)
    ]


def _exported(split: str, found: PreparedSplit, reference: Reference) -> pa.Table:
    """The lines of a split, in the data's order."""
    store, config, pairs = reference.store, reference.config, found.pairs
    ids, numbers = pairs.pair_ids, numbers_of(reference.config, found.pairs)
    rows = store.lookup(ids)
    columns = {
        "split": [split] * len(ids),
        "part": np.asarray(found.part_names, dtype=object)[found.parts],
        "row": pairs.values("row"),
        "pair_id": ids,
        **{c: getattr(rows, c).numpy() for c in COLUMNS},
        "prompt_tokens": pairs.lengths[:, 0],
        "normalised_entropy": normalised_entropy(store, config, ids).double().numpy(),
        "raw_weight": raw_weights(store, config, ids, numbers).numpy(),
        "w": reference.add(ids, numbers).numpy(),
    }
    return pa.table({name: columns[name] for name in EXPORTED.names})
