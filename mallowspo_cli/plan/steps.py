"""Optimizer steps of a recipe, packed as training packs them, and the time they should take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mallowspo_cli.packing.layout import Layout
from mallowspo_cli.packing.packer import pack, size_of
from mallowspo_cli.plan.compute import forward_work, step_flops, traffic, useful_flops
from mallowspo_cli.plan.hardware import Hardware
from mallowspo_cli.plan.setting import Setting
from mallowspo_cli.plan.shapes import ModelShape
from mallowspo_cli.recipe.choices import ActivationCheckpointing, Order
from mallowspo_cli.training.order import PairOrder

SAMPLED_STEPS = 16
"""Steps that are packed, evenly over the run."""

Lengths = NDArray[np.int64]
"""(N, 3) tokens of prompt, chosen and rejected."""


@dataclass(frozen=True)
class Steps:
    """Of an optimizer step, the mean over several; or their sums. Times are predictions."""

    packs: float
    """Of each process."""
    tokens: float
    """Of all processes' packs, padding included."""
    longest_pack: float
    """Tokens."""
    fill: float
    """Tokens over those of as many packs that are all as long as the longest."""
    imbalance: float
    """FLOPs of the busiest process over the mean."""
    flops: float
    """Over all processes."""
    compute_seconds: float
    """Of computing; after every pack, processes wait for the slowest."""
    traffic_seconds: float
    """Of sending weights and gradients."""
    seconds: float
    """For each pack the longer of the two: they overlap."""
    seconds_apart: float
    """Their sum: as if nothing overlapped, which no step exceeds."""
    hiding_tokens: float
    """Tokens of a pack whose computing takes as long as the sending, at these lengths: with fewer,
    a process waits for weights."""
    pairs_per_second: float
    mfu: float
    """FLOPs that nothing could do without, over those of the peak."""


def sample_steps(
    lengths: Lengths, batch_size: int, total_steps: int, seed: int, order: Order
) -> list[Lengths]:
    """Lengths of the pairs of some steps. An order by dispersion, which is not known before the
    reference pass, is taken for a shuffled one.
    """
    order = Order.shuffle if order.by_dispersion else order
    pairs = PairOrder(len(lengths), batch_size, seed, order)
    places = np.linspace(0, total_steps - 1, min(SAMPLED_STEPS, total_steps))
    return [lengths[pairs.step(int(place))] for place in places]


def plan_steps(
    shape: ModelShape,
    setting: Setting,
    hardware: Hardware,
    steps: Sequence[Lengths],
    pack_tokens: int,
    checkpointing: ActivationCheckpointing,
    layout: Layout = Layout.shared,
) -> Steps:
    """What steps of these pairs take, in packs of at most `pack_tokens` tokens."""
    found = [
        _one_step(shape, setting, hardware, rows, pack_tokens, checkpointing, layout)
        for rows in steps
    ]
    means = {name: float(np.mean([each[name] for each in found])) for name in found[0]}
    useful = float(np.mean([useful_flops(shape, rows) for rows in steps]))
    peak = hardware.peak(setting.precision) * setting.world_size
    return Steps(
        **means,
        pairs_per_second=len(steps[0]) / means["seconds"],
        mfu=useful / (means["seconds"] * peak),
    )


def _one_step(
    shape: ModelShape,
    setting: Setting,
    hardware: Hardware,
    rows: Lengths,
    pack_tokens: int,
    checkpointing: ActivationCheckpointing,
    layout: Layout,
) -> dict[str, float]:
    """The fields of `Steps` up to the seconds, for one step."""
    costs = shape.flops.of_pairs(rows)
    ranks = pack(rows, pack_tokens, setting.world_size, layout, costs)
    flops = np.array(
        [
            [step_flops(shape, rows[members], checkpointing, setting, layout) for members in packs]
            for packs in ranks
        ]
    )
    sizes = np.array([[size_of(rows[members], layout) for members in packs] for packs in ranks])
    compute = flops.max(axis=0) / hardware.rate(setting.precision)
    sending = traffic(shape, setting) / hardware.bandwidth if setting.sharded else 0.0
    by_rank = flops.sum(axis=1)
    per_token = flops.sum() / sizes.sum() / hardware.rate(setting.precision)
    return {
        "packs": len(ranks[0]),
        "tokens": sizes.sum(),
        "longest_pack": sizes.max(),
        "fill": sizes.sum() / (sizes.size * sizes.max()),
        "imbalance": by_rank.max() / by_rank.mean(),
        "flops": flops.sum(),
        "compute_seconds": compute.sum(),
        "traffic_seconds": sending * len(compute),
        "seconds": np.maximum(compute, sending).sum(),
        "seconds_apart": compute.sum() + sending * len(compute),
        "hiding_tokens": sending / per_token,
    }


def reference_seconds(
    shape: ModelShape,
    setting: Setting,
    hardware: Hardware,
    lengths: Lengths,
    pack_tokens: int,
    layout: Layout = Layout.shared,
) -> float:
    """Time of the reference pass over all pairs: every process has the whole model, so nothing is
    sent. Loading it is left out.
    """
    adapters = 2.0 * shape.trained if shape.adapters else 0.0
    frozen = replace(shape.flops, per_token=shape.flops.per_token - adapters)
    if layout is Layout.shared:
        flops = float(frozen.of_pairs(lengths).sum())
    else:
        (packs,) = pack(lengths, pack_tokens, 1, layout)
        flops = sum(forward_work(frozen, lengths[each], layout).total for each in packs)
    return flops / (hardware.rate(setting.precision) * setting.world_size)
