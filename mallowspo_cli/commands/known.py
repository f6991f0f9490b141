"""What a training run knows before its first step: its pairs, their reference, their order."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mallowspo_cli.commands.prepare import (
    Prepared,
    default_device,
    filled_store,
)
from mallowspo_cli.data.table import TokenizedPairs, pairs_digest
from mallowspo_cli.distributed import log
from mallowspo_cli.recipe.choices import DispersionSource
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.reference.terms import (
    Reference,
    fit_reference,
    kept_pairs,
    numbers_of,
    raw_weights,
)
from mallowspo_cli.training.order import PairOrder


@dataclass(frozen=True)
class Known:
    """What is known of the training pairs before the first step."""

    train_pairs: TokenizedPairs
    reference: Reference | None
    counts: dict[str, int]
    """Pairs that the reference pass of this run scored, and those that were there."""
    estimates: list[float] | None = None
    """w of each training pair as estimated, whatever `dispersion.mode` says; None where nothing
    asks for it."""


def known_pairs(recipe: Recipe, prepared: Prepared) -> Known:
    """The reference's scores and the dispersion, where the recipe needs them, and the pairs that
    its filter keeps.
    """
    pairs, objective = prepared.train, recipe.objective
    needed = objective.needs_reference or objective.needs_dispersion
    if not needed and not recipe.train.order.by_dispersion and recipe.dispersion.keep is None:
        return Known(pairs, None, {"scored": 0, "reused": 0})
    if not needed and recipe.dispersion.source is not DispersionSource.entropy:
        return _from_data(recipe, pairs)
    store, counts = filled_store(recipe, prepared, default_device())
    pairs, reference = fit_reference(store, recipe.dispersion, pairs, recipe.seed)
    if prepared.held_out:
        reference.add_split(prepared.held_out)
    summary = reference.summary
    log.info(
        "dispersion (%s, %s): scale %.4f, w has mean %.3f, from %.3f to %.3f; %d clamped, "
        "%d unknown",
        *(summary.source, summary.mode, summary.scale, summary.weight_mean, summary.weight_min),
        *(summary.weight_max, summary.clamped, summary.empty),
    )
    return Known(pairs, reference, counts, reference.estimates(pairs.pair_ids).tolist())


def _from_data(recipe: Recipe, pairs: TokenizedPairs) -> Known:
    """Order and filter by numbers of the data, for an objective that reads no reference."""
    config = recipe.dispersion
    if config.keep is not None:
        pairs = kept_pairs(None, config, pairs)
    raw = raw_weights(None, config, pairs.pair_ids, numbers_of(config, pairs))
    # Of an unknown dispersion, the middle.
    estimates = torch.where(raw.isnan(), raw.nanmean(), raw).tolist()
    return Known(pairs, None, {"scored": 0, "reused": 0}, estimates)


def counted(directory: Path, counts: dict[str, int]) -> dict[str, int]:
    """The pass's counts, with what it scored before the run was resumed."""
    file = directory / "environment.json"
    before = json.loads(file.read_text()).get("reference_pass", {}) if file.is_file() else {}
    return {**counts, "scored": counts["scored"] + before.get("scored", 0)}


def pair_order(recipe: Recipe, known: Known) -> PairOrder:
    """The order that the recipe asks for."""
    return PairOrder(
        len(known.train_pairs),
        recipe.train.global_batch_size,
        recipe.seed,
        recipe.train.order,
        known.estimates,
    )


def data_file(recipe: Recipe, prepared: Prepared, known: Known) -> dict[str, Any]:
    """What a resumed run has to find as it was."""
    splits = {"train": known.train_pairs.pair_ids}
    if prepared.held_out is not None:
        splits["held_out"] = prepared.held_out.pair_ids
    reference = known.reference
    numbers = numbers_of(recipe.dispersion, known.train_pairs)
    return {
        **{f"{name}_pairs": len(ids) for name, ids in splits.items()},
        **{f"{name}_digest": pairs_digest(ids) for name, ids in splits.items()},
        "reference": reference.store.fingerprint.key() if reference is not None else None,
        "dispersion_scale": reference.scale if reference is not None else None,
        "dispersion_numbers": hashlib.blake2b(numbers.tobytes(), digest_size=16).hexdigest()
        if numbers is not None
        else None,
    }


def dispersion_file(pairs: TokenizedPairs, reference: Reference) -> dict[str, Any]:
    """What the run's dispersion.json says of its training pairs."""
    weights = reference.weights(pairs.pair_ids).double()
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    found = torch.quantile(weights, torch.tensor(quantiles, dtype=weights.dtype)).tolist()
    counts, edges = torch.histogram(weights, bins=60)
    return {
        **asdict(reference.summary),
        "fingerprint": reference.store.fingerprint.key(),
        "store": str(reference.store.path),
        "quantiles": {str(q): v for q, v in zip(quantiles, found, strict=True)},
        "histogram": {"edges": edges.tolist(), "counts": counts.int().tolist()},
    }
