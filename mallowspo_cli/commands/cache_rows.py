"""`mallowspo cache verify` and `cache export`: rows against the model, and rows in a file."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mallowspo_cli.commands.cache import Opened, open_recipe, print_differences
from mallowspo_cli.commands.prepare import default_device, filled_store
from mallowspo_cli.commands.words import own_words, whole_number
from mallowspo_cli.data.prepare import PreparedSplit
from mallowspo_cli.data.table import TokenizedPair
from mallowspo_cli.distributed import log, progress
from mallowspo_cli.errors import CacheError, RecipeError
from mallowspo_cli.files import make_directory, whole_file
from mallowspo_cli.packing.layout import collate
from mallowspo_cli.recipe.choices import Dtype, Precision
from mallowspo_cli.reference import maintenance
from mallowspo_cli.reference.build import load_scorer, score_rows
from mallowspo_cli.reference.store import COLUMNS, ReferenceRows
from mallowspo_cli.reference.store import SCHEMA as STORE_SCHEMA
from mallowspo_cli.reference.terms import (
    Reference,
    fit_reference,
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


def verify(name: str, overrides: list[str]) -> None:
    """Score some rows of recipe `name` again; see `mallowspo cache verify --help`.

    Raises:
        CacheError: a row is not what the model gives, or there are none.
    """
    own, overrides = own_words(overrides, ("rows",))
    count = whole_number(own, "rows", VERIFIED_ROWS)
    opened = open_recipe("verify", name, overrides)
    store = opened.store
    pairs = _drawn(opened, count)
    stored = store.lookup([pair.pair_id for pair in pairs])
    found = _scored_again(opened, pairs)
    print_differences(
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
    log.info(
        "each of these %d rows is what the model gives, up to the rounding of %s",
        *(len(pairs), store.fingerprint.compute),
    )


def export(name: str, overrides: list[str]) -> None:
    """Write the rows of recipe `name` to a file; see `mallowspo cache export --help`."""
    own, overrides = own_words(overrides, ("to",))
    target = _target(own.get("to"))
    opened = open_recipe("export", name, overrides, create=True)
    make_directory(target.parent, "the export")
    recipe, prepared = opened.recipe, opened.prepared
    store, _ = filled_store(recipe, prepared, default_device())
    _, reference = fit_reference(store, recipe.dispersion, prepared.train, recipe.seed)
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
            f"verify. Fill it: {opened.prepared.fill_command}"
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
            found.append(score_rows(scorer, collate([pair], scorer.layout).to(device), autocast))
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
    shard = shlex.quote(str(maintenance.shard_of(opened.store, pair_id)))
    fill = opened.prepared.fill_command
    return f"Delete the shard and fill the store again: rm {shard} && {fill}"


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
