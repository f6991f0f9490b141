"""Triton kernels that read a tile of logits once: its statistics, and its gradients in its place.

A raw logit l stands for z = scale * l, and with a softcap c for z = c * tanh(scale * l / c). The
kernels need triton and a CUDA device (or triton's interpreter, for tests); importing this module
needs neither.

Multiplications and additions are not fused: z must be the same number wherever it is computed, so
that no target exceeds its row's maximum.
"""

# So that the kernels' annotations need no triton.
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton  # type: ignore
    import triton.language as tl  # type: ignore
except ImportError:
    HAS_TRITON = False
else:
    HAS_TRITON = True

BLOCK = 4096
"""Logits of a row that a program holds at a time, at most; a power of 2."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of logits that the kernels take; their arithmetic is float32."""


class RowStatistics(NamedTuple):
    """Of n rows of logits z, (n,) each, in float32 or better.

    A row of nothing but -inf has no distribution: its log-prob and entropy come out as NaN. The
    maximum and the sum are kept apart: exp(z - m) / s is more exact than exp(z - lse) with a
    rounded lse.
    """

    maxima: Tensor
    """m = max z_v."""
    sums: Tensor
    """s = sum exp(z_v - m)."""
    targets: Tensor
    """z at the target."""
    products: Tensor | None
    """sum exp(z_v - m) (z_v - m); None unless asked for."""

    @property
    def logps(self) -> Tensor:
        """Log-probs of the targets, nats."""
        return self.targets - self.maxima - self.sums.log()

    @property
    def entropies(self) -> Tensor:
        """Entropies of the rows' distributions, nats: log s - sum p (z - m)."""
        assert self.products is not None
        return self.sums.log() - self.products / self.sums


def available(device: torch.device) -> bool:
    """Whether the kernels run on tensors of `device`."""
    return HAS_TRITON and device.type == "cuda"


def row_statistics(
    logits: Tensor, targets: Tensor, scale: float = 1.0, softcap: float | None = None
) -> RowStatistics:
    """All four statistics from one pass over the logits.

    Args:
        logits: (N, V) raw logits, any of `DTYPES`; rows may lie apart, a row lies in one piece.
        targets: (N,) token ids.
        scale: factor of the raw logits.
        softcap: bound c of the scaled logits; None for none.
    """
    _check(logits)
    rows, columns = logits.shape
    found = RowStatistics(
        *(torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(4))
    )
    if rows:
        with torch.cuda.device_of(logits):
            _row_statistics_kernel[(rows,)](
                logits,
                targets.contiguous(),
                *found,
                columns,
                logits.stride(0),
                float(scale),
                float(softcap or 0.0),
                **_options(columns, softcap),
            )
    return found


def logits_to_gradients_(
    logits: Tensor,
    targets: Tensor,
    maxima: Tensor,
    sums: Tensor,
    weights: Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Overwrite each raw logit l_v by w * d log p(y) / d l_v, in the logits' type.

    d log p(y) / d z_v = 1[v = y] - exp(z_v - m) / s, times dz/dl = scale * (1 - (z / c)^2).

    Args:
        logits: (N, V) raw logits as `row_statistics` had them; returned with the gradients in them.
        targets: (N,) token ids.
        maxima: (N,) m of `row_statistics`.
        sums: (N,) s of `row_statistics`.
        weights: (N,) w, the gradients of the log-probs.
        scale: factor of the raw logits.
        softcap: bound c of the scaled logits; None for none.
    """
    _check(logits)
    rows, columns = logits.shape
    if rows:
        options = _options(columns, softcap)
        with torch.cuda.device_of(logits):
            _logits_to_gradients_kernel[(rows, triton.cdiv(columns, options["BLOCK"]))](
                logits,
                targets.contiguous(),
                maxima.contiguous(),
                sums.contiguous(),
                weights.contiguous(),
                columns,
                logits.stride(0),
                float(scale),
                float(softcap or 0.0),
                **options,
            )
    return logits


def _check(logits: Tensor) -> None:
    assert logits.dtype in DTYPES, f"no kernel for logits of {logits.dtype}"
    assert logits.shape[1] == 1 or logits.stride(1) == 1, "a row of logits must lie in one piece"


def _options(columns: int, softcap: float | None) -> dict[str, Any]:
    """How both kernels are compiled: logits of a program, and warps to hold them, 16 to a thread in
    a full block.
    """
    block = min(BLOCK, max(128, triton.next_power_of_2(columns)))
    return {
        "HAS_SOFTCAP": softcap is not None,
        "BLOCK": block,
        "num_warps": 8 if block >= 4096 else 4,
        "enable_fp_fusion": False,
    }


def _jit(function: Callable) -> Any:
    """`triton.jit`; without triton the function as it is, which nobody then calls."""
    return triton.jit(function) if HAS_TRITON else function


@_jit
def _row_statistics_kernel(
    logits,
    targets,
    maxima,
    sums,
    target_logits,
    products,
    columns,
    row_stride,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One program per row. The maximum is one number, sum and product are kept apart per lane."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target = tl.load(targets + row)
    known = (target >= 0) & (target < columns)
    target_logit = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32) * scale
    if HAS_SOFTCAP:
        target_logit, _ = _softcapped(target_logit, softcap)
    tl.store(target_logits + row, target_logit)

    lanes = tl.arange(0, BLOCK)
    maximum = tl.full((), float("-inf"), tl.float32)
    sum_ = tl.zeros((BLOCK,), tl.float32)
    product = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        z = tl.load(logits + start + lanes, mask=inside, other=float("-inf")).to(tl.float32) * scale
        if HAS_SOFTCAP:
            z, _slope = _softcapped(z, softcap)
            z = tl.where(inside, z, float("-inf"))
        raised = tl.maximum(maximum, tl.max(z, axis=0))
        # -inf minus itself would be NaN; against 0 it is -inf, which counts for nothing.
        origin = tl.where(raised == float("-inf"), 0.0, raised)
        # From m to m' = m - drop: sum e^(z - m') = e^drop s, and
        # sum e^(z - m') (z - m') = e^drop sum e^(z - m) (z - m + drop) = e^drop (t + drop s).
        # At -1000 e^drop is 0 already; below it, drop s could overflow, and 0 * inf is NaN.
        drop = tl.maximum(maximum - origin, -1000.0)
        decay = tl.exp(drop)
        shifted = z - origin
        exponential = tl.exp(shifted)
        product = (product + drop * sum_) * decay + exponential * tl.maximum(shifted, -1000.0)
        sum_ = sum_ * decay + exponential
        maximum = raised
    tl.store(maxima + row, maximum)
    tl.store(sums + row, tl.sum(sum_, axis=0))
    tl.store(products + row, tl.sum(product, axis=0))


@_jit
def _logits_to_gradients_kernel(
    logits,
    targets,
    maxima,
    sums,
    weights,
    columns,
    row_stride,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    places = logits + row * row_stride + column
    z = tl.load(places, mask=inside, other=float("-inf")).to(tl.float32) * scale
    factor = tl.load(weights + row).to(tl.float32) * scale
    if HAS_SOFTCAP:
        z, slope = _softcapped(z, softcap)
        factor = factor * slope
    share = 1.0 / tl.load(sums + row)
    probability = tl.exp(z - tl.load(maxima + row)) * share
    gradient = (tl.where(column == tl.load(targets + row), 1.0, 0.0) - probability) * factor
    tl.store(places, gradient.to(logits.dtype.element_ty), mask=inside)


@_jit
def _softcapped(z, softcap):
    """c tanh(z / c) and its derivative 1 - tanh(z / c)^2, both without cancellation.

    tanh |x| = (1 - e) / (1 + e) with e = exp(-2 |x|), which loses digits near 0: the Taylor series
    there, whose next term is below 1e-8 of the value.
    """
    size = tl.abs(z / softcap)
    e = tl.exp(-2.0 * size)
    small = tl.minimum(size, 0.25)
    square = small * small
    series = 1.0 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835))))
    tanh = tl.where(size < 0.25, small * series, (1.0 - e) / (1.0 + e))
    return softcap * tl.where(z < 0, -tanh, tanh), 4.0 * e / ((1.0 + e) * (1.0 + e))
