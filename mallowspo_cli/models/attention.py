"""Attention over the segments of a pack, registered with transformers under `NAME`.

A model asks for it as for any other implementation. In a scoring pass it gets `segments` and no
mask; anywhere else (sampling, say) it is plain masked attention. Every kernel computes the same
function; which one runs depends on what the device has.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mallowspo_cli.distributed import log
from mallowspo_cli.errors import ModelError, first_line
from mallowspo_cli.models.kernels import bottom_right, choose_kernel, explicit_attention
from mallowspo_cli.models.segments import Segments

NAME = "mallowspo"
AUTO = "auto"
UNSUPPORTED = ("s_aux", "position_bias")
"""What a model may hand to its attention that the kernels here do not know."""
OWN_MASKS = ("doge",)
"""Types of models that compute their masks layer by layer."""
SHARED_LAYERS = {"full_attention", "sliding_attention"}

_scoring: ContextVar[bool] = ContextVar("scoring", default=False)


@contextmanager
def scoring() -> Iterator[None]:
    """Within, a forward pass is one over segments: no mask is built."""
    token = _scoring.set(True)
    try:
        yield
    finally:
        _scoring.reset(token)


@torch.compiler.disable
def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer.

    Raises:
        ModelError: the model needs more than the kernels compute, or does not pass the segments on.
    """
    if segments is None:
        if _scoring.get():
            raise ModelError(
                f"{type(module).__name__} does not pass its arguments on to the attention. "
                "Set model.attention=sdpa."
            )
        if softcap is not None:
            visible = _mask_of(attention_mask, query, key)
            attended = explicit_attention(query, key, value, visible, scaling, softcap)
            return attended.transpose(1, 2).contiguous(), None
        options = {"scaling": scaling, "dropout": dropout, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    _check_supported(module, attention_mask, dropout, kwargs)
    window = sliding_window or _window_of(module)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # Rotations come in float32, and not every kernel is known to autocast.
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (part.to(dtype) for part in (query, key, value))
    widths = (query.shape[-1], value.shape[-1])
    kernel = choose_kernel(device, query.dtype, widths, softcap is not None)
    return kernel(query, key, value, segments, scaling, window, softcap), None


def _check_supported(
    module: nn.Module, attention_mask: Tensor | None, dropout: float, others: dict[str, Any]
) -> None:
    unknown = [name for name in UNSUPPORTED if others.get(name) is not None]
    if attention_mask is not None:
        unknown.append("a mask of its own")
    if unknown:
        raise ModelError(
            f"{type(module).__name__} has attention with {unknown[0]}, which cannot be computed "
            "over shared prompts. Set model.attention=eager."
        )
    if dropout:
        raise ModelError(f"{type(module).__name__} has attention dropout {dropout}; it must be 0.")


def _window_of(module: nn.Module) -> int | None:
    """The window of a layer whose model puts it into the mask alone."""
    config: Any = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or kinds is None:
        return window
    return window if kinds[module.layer_idx] == "sliding_attention" else None  # type: ignore[index]


def segment_mask(**kwargs: Any) -> Tensor | None:
    """No mask in a scoring pass; scaled dot-product attention's own elsewhere."""
    return None if _scoring.get() else sdpa_mask(**kwargs)


def _mask_of(attention_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask outside a scoring pass; none means causal there."""
    if attention_mask is None and query.shape[2] > 1:
        return bottom_right(query.shape[2], key.shape[2], None, query.device)
    return attention_mask


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, segment_mask)


def resolve_attention(directory: Path, attention: str) -> str:
    """The attention implementation that `model.attention` means for a model directory.

    Raises:
        ModelError: no model that transformers knows, or prompts cannot be shared where the recipe
            asks for it.
    """
    if attention not in (AUTO, NAME):
        return attention
    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the model in {directory}: {first_line(error)}") from error
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    obstacle = obstacle_to_sharing(kind, config)
    if obstacle is None:
        return NAME
    if attention == NAME:
        raise ModelError(f"model.attention={NAME} cannot be used: {obstacle}.")
    other = "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"
    _say_once(f"padded batches with {other} attention, since {obstacle}")
    return other


@cache
def _say_once(text: str) -> None:
    log.info(text)


def obstacle_to_sharing(kind: type | None, config: Any) -> str | None:
    """Why prompts cannot be shared in models of this class and configuration; None if they can."""
    name = getattr(kind, "__name__", type(config).__name__)
    if not getattr(kind, "_supports_attention_backend", False):
        return f"{name} does not take a registered attention"
    text = config.get_text_config(decoder=True)
    layers = set(getattr(text, "layer_types", None) or SHARED_LAYERS)
    if others := sorted(layers - SHARED_LAYERS):
        return f"{name} has layers of {', '.join(others)}"
    if text.model_type in OWN_MASKS:
        return f"{name} masks attention in a way of its own"
    source = inspect.getsource(sys.modules[kind.__module__]) if kind else ""
    handed = [f"{argument}=" in source for argument in UNSUPPORTED]
    return f"{name} has attention sinks or position biases" if any(handed) else None
