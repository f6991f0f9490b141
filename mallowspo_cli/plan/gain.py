"""What packing, sharing and the cached reference should save against padded batches."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mallowspo_cli.data.report import ORDERS, SEED, predicted_gain
from mallowspo_cli.data.table import longer_rows
from mallowspo_cli.plan.compute import Work, forward_work, training_flops
from mallowspo_cli.plan.shapes import ModelShape
from mallowspo_cli.plan.steps import Lengths
from mallowspo_cli.recipe.choices import ActivationCheckpointing

BATCH = 2
"""Pairs of a padded batch, drawn at random."""


@dataclass(frozen=True)
class Gain:
    """How many times less than with padded batches of `BATCH` pairs, of what trains on response
    tokens alone, under the same checkpointing.
    """

    tokens: float
    flops: float
    """Of training."""
    flops_with_reference: float
    """Of all epochs and one reference pass, on both sides."""
    flops_live_reference: float
    """The same against a reference that is run in every step."""


def gain_over_padding(
    shape: ModelShape, lengths: Lengths, checkpointing: ActivationCheckpointing, epochs: int
) -> Gain:
    """The ratios for a data set; FLOPs and tokens are not time."""
    ours, padded = forward_work(shape.flops, lengths), _padded_work(shape, lengths)
    trained = [training_flops(shape, work, checkpointing) for work in (ours, padded)]
    return Gain(
        tokens=predicted_gain(lengths)["batches"][str(BATCH)]["both"],
        flops=trained[1] / trained[0],
        flops_with_reference=(epochs * trained[1] + padded.total)
        / (epochs * trained[0] + ours.total),
        flops_live_reference=epochs
        * (trained[1] + padded.total)
        / (epochs * trained[0] + ours.total),
    )


def _padded_work(shape: ModelShape, lengths: Lengths) -> Work:
    """FLOPs of a forward pass over all pairs in padded batches, the mean over random orders."""
    rows = longer_rows(lengths)
    starts = np.arange(0, len(rows), BATCH)
    sizes = np.diff(np.append(starts, len(rows)))

    def widths(order: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.maximum.reduceat(rows[order], starts)

    orders = [np.random.default_rng([SEED, i]).permutation(len(rows)) for i in range(ORDERS)]
    longest = np.array([widths(order) for order in orders], dtype=np.float64)
    return Work(
        matrices=shape.flops.per_token * float((2 * sizes * longest).sum(axis=1).mean()),
        attention=shape.flops.per_visible * float((sizes * longest**2).sum(axis=1).mean()),
        head=shape.flops.per_target * float(lengths[:, 1:].sum()),
    )
