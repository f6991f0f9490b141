"""The kernels behind the registered attention: one function of queries, keys, values and segments.

All compute the same; which one runs depends on what the device has.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import repeat_kv

from mallowspo_cli.distributed import log
from mallowspo_cli.models.segments import Segments

FLASH_TYPES = (torch.bfloat16, torch.float16)

Kernel = Callable[
    [Tensor, Tensor, Tensor, Segments, float | None, int | None, float | None], Tensor
]
"""(query (1, H, T, D), key (1, K, T, D), value, segments, scale, window, softcap) to (1, T, H, D);
heads are grouped where K < H."""


@cache
def choose_kernel(
    device: str, dtype: torch.dtype, widths: tuple[int, int], softcap: bool
) -> Kernel:
    """The fastest kernel that can compute it here; says which, once.

    `widths` are those of a head's queries and of its values.
    """
    kernel: Kernel
    if device != "cuda" or widths[0] != widths[1]:
        kernel = explicit_kernel if softcap else sdpa_kernel
    elif dtype not in FLASH_TYPES or widths[0] > 256 or widths[0] % 8:
        kernel = flex_kernel
    elif not softcap and varlen_function() is not None:
        kernel = varlen_kernel
    else:
        kernel = flash_attn_kernel if flash_function() is not None else flex_kernel
    log.info("attention over shared prompts: %s", kernel.__name__.removesuffix("_kernel"))
    return kernel


def sdpa_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """torch's scaled dot-product attention, a segment at a time."""
    assert softcap is None

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )

    return _by_segment(attend, query, key, value, segments, window)


def explicit_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """With all scores of a segment at once: for capped scores where nothing else has them."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            mask = bottom_right(q.shape[2], k.shape[2], None, q.device)
        return explicit_attention(q, k, v, mask, scale, softcap)

    return _by_segment(attend, query, key, value, segments, window)


def _by_segment(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    window: int | None,
) -> Tensor:
    """Every segment by itself; `attend` is causal where it gets no mask.

    `split` and not slices: the backward pass of a slice fills a tensor as large as the whole pack
    with zeros, for each segment.
    """
    sizes = segments.queries
    queries, keys, values = (part.split(sizes, dim=2) for part in (query, key, value))
    attended = []
    for index, (prompt, chosen, rejected) in enumerate(segments.lengths):
        first, second = 2 * index, 2 * index + 1
        long = window is not None and prompt + max(chosen, rejected) > window
        mask = (
            _mask(segments, prompt + chosen, prompt + chosen, window, query.device)
            if long
            else None
        )
        attended.append(attend(queries[first], keys[first], values[first], mask))
        seen = torch.cat([keys[first][:, :, :prompt], keys[second]], dim=2)
        seen_values = torch.cat([values[first][:, :, :prompt], values[second]], dim=2)
        mask = _mask(segments, rejected, prompt + rejected, window if long else None, query.device)
        attended.append(attend(queries[second], seen, seen_values, mask))
    return torch.cat(attended, dim=2).transpose(1, 2)


def _mask(
    segments: Segments, queries: int, keys: int, window: int | None, device: torch.device
) -> Tensor:
    return segments.made_once(
        (queries, keys, window), lambda: bottom_right(queries, keys, window, device)
    )


def bottom_right(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool: causal, with the last query at the last key."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window + 1)


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """softmax(cap tanh(q k / cap)) v, (1, H, T, D); the softmax in float32 or better."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    statistic = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=statistic).to(query.dtype) @ value


def varlen_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """torch's attention over sequences of different lengths, with keys gathered by segment."""
    varlen = varlen_function()
    assert varlen is not None
    assert softcap is None
    attended = varlen(
        *_sequences(query, key, value, segments),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended[None]


def flash_attn_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The flash-attn package's, with keys gathered by segment."""
    flash = flash_function()
    assert flash is not None
    attended = flash(
        *_sequences(query, key, value, segments),
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )
    return attended[None]


def flex_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """FlexAttention with a block mask: for float32, capped scores and odd head sizes on CUDA."""
    tokens, device = query.shape[2], query.device
    flex_attention, create_block_mask = _flex(device.type)
    blocks = segments.made_once(
        ("blocks", window),
        lambda: create_block_mask(segments.sees(window), None, None, tokens, tokens, device),
    )

    # A tensor: a float would be one of the sizes that the graph leaves open, and end the graph.
    cap = segments.made_once(("cap", softcap), lambda: torch.tensor(softcap or 0.0, device=device))

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    attended = flex_attention(
        *(query, key, value),
        score_mod=None if softcap is None else capped,
        block_mask=blocks,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        # For under 128 tokens torch would take its kernel for decoding, which has no variant where
        # the queries of a group are more than a block.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    return attended.transpose(1, 2)


def dense_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """By the definition, with a mask of all tokens by all tokens: what tests compare with."""
    places = torch.arange(query.shape[2], device=query.device)
    mask = segments.sees(window)(None, None, places[:, None], places[None])
    return explicit_attention(query, key, value, mask, scale, softcap).transpose(1, 2)


def _sequences(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
    """What both varlen functions begin with: (T, H, D) queries, (keys, K, D) keys and values with
    those of a segment in a row, where each segment begins in both, and the longest of both.
    """
    k, v = (_GatherKeys.apply(part[0].transpose(0, 1), segments) for part in (key, value))
    starts = (segments.query_starts, segments.key_starts)
    return query[0].transpose(0, 1), k, v, *starts, *segments.longest


class _GatherKeys(torch.autograd.Function):
    """`index_select` whose backward adds no number twice to one place, so that it is the same
    every time: each token is once a key of its own segment, and each prompt token once more."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return states.index_select(0, segments.key_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        segments: Segments = ctx.segments
        result = grad.index_select(0, segments.own_keys)
        # All indices differ.
        result[segments.prompts] += grad.index_select(0, segments.prompt_keys)
        return result, None


@cache
def varlen_function() -> Callable[..., Any] | None:
    """torch's varlen attention, where this torch has one with windows and grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "enable_gqa", "scale"} <= set(parameters) else None


@cache
def flash_function() -> Callable[..., Tensor] | None:
    """flash-attn's varlen attention, where the package is installed."""
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        return None
    return flash_attn_varlen_func


@cache
def _flex(device: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """FlexAttention and what makes its masks. On CUDA both are compiled: as they are they make
    tensors of all tokens by all tokens.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device != "cuda":
        return flex_attention, create_block_mask
    # A graph for each window, with and without gradients; at the limit it would not be compiled.
    import torch._dynamo

    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 64)
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True)
    return compiled, torch.compile(create_block_mask)
