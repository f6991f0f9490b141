"""FLOPs of a step and bytes that processes send each other.

F = F_body + F_head is one forward pass, from `models/flops.py`. A step of full fine-tuning takes
3 F: the forward pass, and in the backward pass a product for the gradients of inputs and one for
those of weights. On top come what is computed again:

    checkpointing full    every block once more, but for its last matrix
    selective             no matrix product (norms and activations, a few per cent of the time)
    output layer          logits of the rows that are not kept (4 F_head in the place of 3)

With adapters the frozen matrices need no gradient: 2 F_body, and 2 F_head with nothing again.

Attention is counted by the keys that a query sees. Kernels do more: whole blocks along the
diagonal, and the scores once more in the backward pass (5 products for 4).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mallowspo_cli.models import head as output_layer
from mallowspo_cli.models.flops import ForwardFlops, visible_keys
from mallowspo_cli.packing.layout import Layout
from mallowspo_cli.packing.packer import size_of
from mallowspo_cli.plan.setting import Setting
from mallowspo_cli.plan.shapes import ModelShape
from mallowspo_cli.recipe.choices import ActivationCheckpointing


@dataclass(frozen=True)
class Work:
    """FLOPs of a forward pass over a pack."""

    matrices: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.matrices + self.attention + self.head


def forward_work(flops: ForwardFlops, lengths: ArrayLike, layout: Layout = Layout.shared) -> Work:
    """One forward pass over a pack; `lengths` (N, 3) are tokens of prompt, chosen and rejected.

    In the padded layout padding costs what tokens cost, but for the output layer.
    """
    rows = np.asarray(lengths, dtype=np.float64).reshape(-1, 3)
    tokens = size_of(lengths, layout)
    if layout is Layout.padded:
        # Rows of one width, each token of which sees those before it.
        visible = tokens * (tokens / (2 * len(rows))) / 2
    else:
        visible = visible_keys(rows).sum()
    targets = rows[:, 1:].sum()
    return Work(
        flops.per_token * tokens, flops.per_visible * float(visible), flops.per_target * targets
    )


def step_flops(
    shape: ModelShape,
    lengths: ArrayLike,
    checkpointing: ActivationCheckpointing,
    setting: Setting,
    layout: Layout = Layout.shared,
) -> float:
    """FLOPs of a pack's forward and backward pass, with what is computed again."""
    work = forward_work(shape.flops, lengths, layout)
    return training_flops(shape, work, checkpointing, _head_passes(shape, lengths, setting))


def training_flops(
    shape: ModelShape,
    forward: Work,
    checkpointing: ActivationCheckpointing,
    head_passes: float | None = None,
) -> float:
    """FLOPs of a forward and a backward pass, from those of a forward pass.

    `head_passes` are products of the output layer; None: as many as where all logits are kept.
    """
    full = checkpointing is ActivationCheckpointing.full
    passes = (2.0 if shape.adapters else 3.0) if head_passes is None else head_passes
    return (
        forward.matrices * (2 + shape.trained_share + (recomputed_share(shape) if full else 0))
        + forward.attention * (4 if full else 3)
        + forward.head * passes
    )


def useful_flops(shape: ModelShape, lengths: ArrayLike) -> float:
    """FLOPs of a step that pads nothing and computes nothing twice: what an MFU counts."""
    return training_flops(shape, forward_work(shape.flops, lengths), ActivationCheckpointing.none)


def recomputed_share(shape: ModelShape) -> float:
    """Share of the blocks' matrix products that full checkpointing computes again: all with
    adapters, whose own products come behind the last frozen one.
    """
    if shape.adapters:
        return 1.0
    matrices = sum(block.matrices for block in shape.blocks)
    return 1 - sum(block.not_again for block in shape.blocks) / matrices


def _head_passes(shape: ModelShape, lengths: ArrayLike, setting: Setting) -> float:
    """Products of the output layer: 3, and a fourth for the rows whose logits are not kept."""
    if shape.adapters:
        return 2.0
    targets = np.asarray(lengths).reshape(-1, 3)[:, 1:].sum()
    kept = output_layer.KEPT_BYTES[setting.device] // (shape.vocab * setting.compute)
    return 4.0 - min(1.0, kept / targets)


def traffic(shape: ModelShape, setting: Setting) -> float:
    """Bytes that each process receives for a pack under ZeRO-3: weights for the forward and the
    backward pass, frozen ones too, and gradients of those that are trained. For a model that is
    trained whole, 3 x 2 bytes x parameters x (G - 1) / G in bf16.
    """
    share = (setting.world_size - 1) / setting.world_size
    return setting.compute * share * (2 * shape.parameters + shape.trained)
