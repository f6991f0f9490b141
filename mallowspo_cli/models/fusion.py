"""Fewer, larger kernels for what lies between the matrix products: same function, less time."""

import importlib.util

import torch
from torch import nn
from transformers.integrations.liger import apply_liger_kernel
from transformers.modeling_layers import GradientCheckpointingLayer

from mallowspo_cli.errors import ModelError

LIGER_LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Off, since the output layer is ours; its other replacements are on by default."""


def compile_blocks(model: nn.Module) -> None:
    """Compile every block at its first use, for packs of any length. Attention stays as it is."""
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not blocks:
        raise ModelError(
            f"train.compile=true: {type(model).__name__} has no blocks that can be compiled one by "
            "one. Leave it out."
        )
    for block in blocks:
        block.compile(dynamic=True)


def check_liger() -> None:
    """Before anything else is done.

    Raises:
        ModelError: the package or a GPU is missing.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModelError("train.liger=true needs liger-kernel: pip install 'mallowspo[liger]'")
    if not torch.cuda.is_available():
        raise ModelError("train.liger=true needs a GPU. Leave it out here.")


def use_liger(model: nn.Module) -> None:
    """Replace norms, rotations and gated activations by Liger's Triton kernels.

    Raises:
        ModelError: the package or a GPU is missing, or it does not know the architecture.
    """
    check_liger()
    kind = model.config.model_type  # type: ignore[union-attr]
    from liger_kernel.transformers import monkey_patch  # type: ignore[import-not-found]

    # Of a type that it does not know it would say nothing.
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(f"train.liger=true: Liger does not know models of type {kind}.")
    apply_liger_kernel(model, LIGER_LOSSES)
