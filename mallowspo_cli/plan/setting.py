"""What memory and time depend on beside the model: precision, processes, and what is in a pack."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mallowspo_cli.packing.layout import Layout
from mallowspo_cli.packing.packer import size_of
from mallowspo_cli.recipe.choices import Optimizer, Precision

HALF, SINGLE = 2, 4
"""Bytes of a number."""
MOMENTS = {Optimizer.adamw: 8, Optimizer.adamw_8bit: 2, Optimizer.rmsprop: 4}
"""Bytes that an optimizer keeps of each trained parameter."""


@dataclass(frozen=True)
class Setting:
    """Where and in what a model is trained. Several processes mean ZeRO-3 on bf16 weights."""

    precision: Precision
    world_size: int = 1
    cpu: bool = False
    optimizer: Optimizer = Optimizer.adamw

    @property
    def sharded(self) -> bool:
        """Whether states are dealt out over processes."""
        return self.world_size > 1

    @property
    def compute(self) -> int:
        """Bytes of what matrices are multiplied in."""
        return HALF if self.precision is Precision.bf16 else SINGLE

    @property
    def stream(self) -> int:
        """Bytes of the stream between blocks, which has the embedding's type."""
        return self.compute if self.sharded else SINGLE

    @property
    def casts(self) -> bool:
        """Whether autocast makes copies of weights, and of inputs for each matrix."""
        return self.compute < self.stream

    @property
    def device(self) -> str:
        """The type of device, as the output layer's limits know it."""
        return "cpu" if self.cpu else "cuda"


@dataclass(frozen=True)
class PackSize:
    """What memory depends on in a pack."""

    tokens: float
    """Places, padding included."""
    targets: float
    """Response tokens."""
    seen_again: float
    """Prompt tokens that rejected responses see too."""
    rejected: float = 0.0
    """Tokens of rejected responses, whose keys lie behind those of their prompts."""
    mask_entries: float = 0.0
    """Places of the rejected responses' masks."""

    @classmethod
    def of(cls, lengths: ArrayLike, layout: Layout = Layout.shared) -> "PackSize":
        """That of a pack of pairs; `lengths` (N, 3) are tokens of prompt, chosen and rejected."""
        rows = np.asarray(lengths, dtype=np.float64).reshape(-1, 3)
        prompt, chosen, rejected = rows.T
        targets = float((chosen + rejected).sum())
        tokens = float(size_of(lengths, layout))
        if layout is Layout.padded:
            return cls(tokens, targets, 0.0)
        entries = float((rejected * (prompt + rejected)).sum())
        return cls(tokens, targets, float(prompt.sum()), float(rejected.sum()), entries)

    def scaled(self, tokens: float) -> "PackSize":
        """A pack of `tokens` of like pairs."""
        factor = tokens / self.tokens
        return PackSize(
            tokens,
            self.targets * factor,
            self.seen_again * factor,
            self.rejected * factor,
            self.mask_entries * factor,
        )
