"""How large packs should be, and whether activations have to be computed again."""

from dataclasses import dataclass

import numpy as np

from mallowspo_cli.data.table import longer_rows
from mallowspo_cli.packing.layout import Layout
from mallowspo_cli.plan.memory import peak_memory
from mallowspo_cli.plan.setting import PackSize, Setting
from mallowspo_cli.plan.shapes import ModelShape
from mallowspo_cli.plan.steps import Lengths
from mallowspo_cli.recipe.choices import ActivationCheckpointing

MEMORY_SHARE = 0.9
"""Of the memory, what a plan may fill: the rest is for the device's own use and for gaps."""
MOST_TOKENS = {"cuda": 2**15, "cpu": 2**12}
"""Of a pack: more make nothing faster."""
POLICIES = (
    ActivationCheckpointing.none,
    ActivationCheckpointing.selective,
    ActivationCheckpointing.full,
)
"""Fastest first."""
DEVIATIONS = 3
"""Standard deviations of a step's tokens above their mean that a pack may have to hold."""


@dataclass(frozen=True)
class Proposal:
    """Memory knobs that make a step fast."""

    pack_tokens: int
    checkpointing: ActivationCheckpointing


def propose(
    shape: ModelShape,
    setting: Setting,
    memory: float,
    lengths: Lengths,
    batch_size: int,
    layout: Layout = Layout.shared,
) -> Proposal | None:
    """The first policy that fits, of nothing, little and everything computed again, and the largest
    packs under it. None where nothing fits.
    """
    for checkpointing in POLICIES:
        tokens = proposed_pack_tokens(
            shape, setting, memory, lengths, batch_size, checkpointing, layout
        )
        if tokens is not None:
            return Proposal(tokens, checkpointing)
    return None


def proposed_pack_tokens(
    shape: ModelShape,
    setting: Setting,
    memory: float,
    lengths: Lengths,
    batch_size: int,
    checkpointing: ActivationCheckpointing,
    layout: Layout = Layout.shared,
) -> int | None:
    """The largest `train.pack_tokens` under which a step fits: a power of two, or half as much
    again. A pure function of its arguments.

    Args:
        memory: bytes of the device; `MEMORY_SHARE` of them may be filled.
        lengths: (N, 3) tokens of the training pairs' prompt, chosen and rejected.
        batch_size: pairs of an optimizer step, over all processes.

    Returns:
        From the longest pair, which no pack can do without, to what a process has to do in a step;
        at most `MOST_TOKENS` unless a pair is longer. None where not even the longest pair fits.
    """
    longest, most = _bounds(lengths, batch_size / setting.world_size, layout)
    found = None
    for tokens in _sizes(longest, most, MOST_TOKENS[setting.device]):
        pack = largest_pack(lengths, batch_size, setting.world_size, tokens, layout)
        if peak_memory(shape, setting, pack, checkpointing).peak > MEMORY_SHARE * memory:
            break
        found = tokens
    return found


def smallest_budget(lengths: Lengths, layout: Layout) -> int:
    """What packs are to hold where nothing fits: the longest pair, which none can do without."""
    return _bounds(lengths, 1, layout)[0]


def largest_pack(
    lengths: Lengths, batch_size: int, world_size: int, pack_tokens: int, layout: Layout
) -> PackSize:
    """The largest pack that a budget lets come about, of pairs like these: never smaller than the
    longest pair, nor larger than all that a process has in a step.
    """
    longest, most = _bounds(lengths, batch_size / world_size, layout)
    return PackSize.of(lengths, layout).scaled(max(longest, min(pack_tokens, most)))


def _bounds(lengths: Lengths, pairs: float, layout: Layout) -> tuple[int, float]:
    """Tokens of the longest pair, and those that `pairs` pairs of a step come to at most."""
    each = 2 * longer_rows(lengths) if layout is Layout.padded else lengths.sum(axis=1)
    most = pairs * each.mean() + DEVIATIONS * np.sqrt(pairs) * each.std()
    return int(each.max()), min(float(most), pairs * float(each.max()))


def _sizes(longest: int, most: float, limit: int) -> list[int]:
    """Sizes from the first that holds the longest pair to the first that holds `most`."""
    sizes = sorted(n for power in range(7, 31) for n in (2**power, 3 * 2 ** (power - 1)))
    first = next(size for size in sizes if size >= longest)
    last = max(first, min(limit, next(size for size in sizes if size >= most)))
    return [size for size in sizes if first <= size <= last]
