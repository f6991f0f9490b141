"""Which activations are kept for the backward pass and which are computed again."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from mallowspo_cli.errors import ModelError, first_line
from mallowspo_cli.models.kernels import flash_function, varlen_function
from mallowspo_cli.recipe.choices import ActivationCheckpointing

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_flash_attention_forward",
)
"""Operators whose results `selective` keeps; what is left to compute again costs little."""


def checkpoint_blocks(model: nn.Module, policy: ActivationCheckpointing) -> None:
    """Apply a policy to the blocks of a transformers model.

    none keeps everything, full only the input of each block, selective the input and the results of
    matrix products and attention: norms, activations and rotations are computed again, which takes
    a few per cent more operations and no matrix product.

    Raises:
        ModelError: the model cannot compute its blocks again.
    """
    if policy is ActivationCheckpointing.none:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if policy is ActivationCheckpointing.selective:
        keep = partial(_keep, _kept())
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep)
    try:
        model.activation_checkpointing_enable(options)  # type: ignore[operator]
    except ValueError as error:
        raise ModelError(
            f"train.activation_checkpointing={policy.value}: {first_line(error)} Set it to none."
        ) from error


def _keep(
    kept: set[Any], _context: Any, operator: Any, *_args: Any, **_kwargs: Any
) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _kept() -> set[Any]:
    """The operators to keep, those that are there."""
    packets = [getattr(torch.ops.aten, name, None) for name in (*PRODUCTS, *ATTENTION)]
    if varlen_function() is not None:
        packets.append(getattr(torch.ops.torch_attn, "_varlen_attn", None))
    if flash_function() is not None:
        packets.append(getattr(torch.ops.flash_attn, "_flash_attn_varlen_forward", None))
    found = [packet for packet in packets if packet is not None]
    return {getattr(packet, name) for packet in found for name in packet.overloads()}
