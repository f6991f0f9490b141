"""`mallowspo dispersion`: what the index does to a recipe's data."""

from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.commands.prepare import (
    default_device,
    filled_store,
    one_process,
    prepare,
)
from mallowspo_cli.commands.words import own_words
from mallowspo_cli.data.table import TokenizedPairs
from mallowspo_cli.distributed import log, set_up_logging
from mallowspo_cli.files import make_directory, whole_file
from mallowspo_cli.recipe.choices import DispersionSource
from mallowspo_cli.recipe.load import load_recipe
from mallowspo_cli.recipe.schema import DispersionConfig
from mallowspo_cli.reference.store import ReferenceStore
from mallowspo_cli.reference.terms import Reference, fit_reference
from mallowspo_cli.report.dispersion_report import (
    WeighedPairs,
    describe,
    tails,
    write_dispersion_report,
)

SHOWN_CHARACTERS = 600
"""Longest text of a prompt or response in the report."""


def run(name: str, words: list[str]) -> None:
    """Write the report of recipe `name`; see `mallowspo dispersion --help`."""
    set_up_logging()
    one_process("dispersion")
    own, overrides = own_words(words, ("to",))
    loaded = load_recipe(name, overrides)
    recipe = loaded.recipe
    directory = Path(own.get("to", f"reports/{recipe.name}-dispersion"))
    make_directory(directory, "the report")
    prepared = prepare(recipe, loaded.words)
    store, _ = filled_store(recipe, prepared, default_device())
    split = prepared.splits["train"]
    pairs, reference = fit_reference(store, recipe.dispersion, split.pairs, recipe.seed)
    part = dict(zip(split.pairs.pair_ids, split.parts.tolist(), strict=True))
    parts = [split.part_names[part[pair]] for pair in pairs.pair_ids]
    weighed = _weighed(pairs, parts, reference, store)
    data = describe(weighed, getattr(recipe.objective, "beta", None))
    data["scale"] = reference.scale
    data["clamped"], data["unknown"] = reference.summary.clamped, reference.summary.empty
    least, most = tails(weighed)
    tokenizer = prepared.tokenizer
    ends = {
        "Least dispersed prompts (high w)": [_shown(i, pairs, weighed, tokenizer) for i in least],
        "Most dispersed prompts (low w)": [_shown(i, pairs, weighed, tokenizer) for i in most],
    }
    how = _how(recipe.dispersion, reference.scale)
    write_dispersion_report(directory, recipe.name, how, data, weighed, ends)
    _write_pairs(directory / "pairs.parquet", pairs, weighed, data["beta"])
    weight = data["weight"]
    log.info(
        "w: mean %.3f, 5 %% to 95 %% from %.3f to %.3f; %.1f %% outside [1/2, 2]",
        *(weight["mean"], weight["quantiles"]["0.05"], weight["quantiles"]["0.95"]),
        100 * data["share_outside_half_to_two"],
    )
    click.echo(directory / "report.html")


def _weighed(
    pairs: TokenizedPairs, parts: list[str], reference: Reference, store: ReferenceStore
) -> WeighedPairs:
    rows = store.lookup(pairs.pair_ids)
    lengths = pairs.lengths.astype(np.float64)
    return WeighedPairs(
        weights=reference.weights(pairs.pair_ids).double().numpy(),
        prompt_keys=pairs.values("prompt_key"),
        parts=parts,
        prompt_tokens=lengths[:, 0],
        chosen_tokens=lengths[:, 1],
        rejected_tokens=lengths[:, 2],
        reference_margin=(rows.chosen_logp - rows.rejected_logp).double().numpy(),
        rater_neg_log_phi=pairs.values("rater_neg_log_phi"),
    )


def _how(config: DispersionConfig, scale: float) -> str:
    """Where w comes from, in a sentence or two."""
    sources = {
        DispersionSource.entropy: (
            f"w = {scale:.4f} * -ln(mean token entropy as a share of "
            f"{'ln(vocabulary)' if config.normaliser == 'log_vocab' else config.normaliser}; "
            f"pooling {config.pooling.value}, span {config.span.value})."
        ),
        DispersionSource.column: f"w = {scale:.4f} times column {config.column}.",
        DispersionSource.raters: f"w = {scale:.4f} * -2 log phi, phi by the raters' rankings.",
    }
    bounds = f" Clamped to {config.clamp}." if config.clamp else ""
    return f"{sources[config.source]} Mode: {config.mode.value}.{bounds}"


def _shown(
    index: int, pairs: TokenizedPairs, weighed: WeighedPairs, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    pair = pairs[index]

    def text(ids: Any) -> str:
        whole = str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()
        return whole if len(whole) <= SHOWN_CHARACTERS else whole[:SHOWN_CHARACTERS] + " ..."

    return {
        "w": float(weighed.weights[index]),
        "pair_id": pair.pair_id,
        "prompt": text(pair.prompt),
        "chosen": text(pair.chosen),
        "rejected": text(pair.rejected),
    }


def _write_pairs(
    path: Path, pairs: TokenizedPairs, weighed: WeighedPairs, beta: float | None
) -> None:
    """w of each training pair, for other programs."""
    columns = {
        "pair_id": pairs.pair_ids,
        "row": pairs.values("row"),
        "source": weighed.parts,
        "weight": weighed.weights,
        "effective_beta": weighed.weights * beta if beta is not None else None,
        "prompt_tokens": weighed.prompt_tokens.astype(np.int64),
        "chosen_tokens": weighed.chosen_tokens.astype(np.int64),
        "rejected_tokens": weighed.rejected_tokens.astype(np.int64),
        "reference_margin": weighed.reference_margin,
        "rater_neg_log_phi": weighed.rater_neg_log_phi,
    }
    with whole_file(path) as temporary:
        kept = {name: column for name, column in columns.items() if column is not None}
        pq.write_table(pa.table(kept), temporary)
