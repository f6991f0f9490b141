"""The head's Triton kernels against float64: on a GPU, or in Triton's interpreter on CPU tensors.

The interpreter must be asked for before anything imports triton. Alone, this module does that; in a
larger run set TRITON_INTERPRET=1, or its tests skip.
"""

import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

from mallowspo_cli.models import head_kernel
from mallowspo_cli.models.head_kernel import (
    RowStatistics,
    available,
    logits_to_gradients_,
    row_statistics,
)
from mallowspo_cli.models.logits import LogitTransform, log_collisions

INTERPRETED = type(head_kernel._row_statistics_kernel).__name__ == "InterpretedFunction"
ROWS = 5
# The interpreter cuts float32 off to bfloat16 where a GPU rounds to the nearest.
ROUNDING = {
    torch.float32: 1e-5,
    torch.bfloat16: 2**-7 if INTERPRETED else 2**-8,
    torch.float16: 2**-11,
}
"""Largest relative error of a gradient, from rounding to its type, or from float32 arithmetic."""
needs_triton = pytest.mark.skipif(not head_kernel.HAS_TRITON, reason="triton is not installed")


@pytest.fixture(
    params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    if not head_kernel.HAS_TRITON:
        pytest.skip("triton is not installed")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cuda" and INTERPRETED:
        pytest.skip("the kernels are interpreted (TRITON_INTERPRET=1), not compiled for the GPU")
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("the kernels are compiled; TRITON_INTERPRET=1 would run them on CPU tensors")
    return torch.device(request.param)


@pytest.fixture(params=[256, 4096])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Logits per program: few, so that rows span many blocks, and as many as in use."""
    monkeypatch.setattr(head_kernel, "BLOCK", request.param)
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def draw(
    generator: torch.Generator,
    columns: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    size: float = 3.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, V); targets (N,) with the first and the last token; weights (N,) with a 0."""
    logits = size * torch.randn(ROWS, columns, generator=generator)
    targets = torch.randint(columns, (ROWS,), generator=generator)
    targets[0], targets[1] = 0, columns - 1
    weights = torch.randn(ROWS, generator=generator)
    weights[2] = 0.0
    return logits.to(device, dtype), targets.to(device), weights.to(device)


def transformed(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    z = scale * logits.double()
    return z if softcap is None else softcap * (z / softcap).tanh()


def expected_statistics(
    logits: Tensor, targets: Tensor, scale: float = 1.0, softcap: float | None = None
) -> RowStatistics:
    """The statistics in float64, from all logits at once."""
    z = transformed(logits, scale, softcap)
    maxima = z.amax(dim=1)
    shifted = z - maxima[:, None]
    exponentials = shifted.exp()
    products = torch.where(exponentials > 0, exponentials * shifted, 0.0)
    target_logits = z.gather(1, targets[:, None]).squeeze(1)
    return RowStatistics(maxima, exponentials.sum(1), target_logits, products.sum(1))


def expected_gradients(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The gradients in float64, by autograd."""
    leaf = logits.double().requires_grad_()
    logps = transformed(leaf, scale, softcap).log_softmax(dim=1).gather(1, targets[:, None])
    logps.squeeze(1).backward(weights.double())
    assert leaf.grad is not None
    return leaf.grad


def logps_and_entropies(statistics: RowStatistics) -> tuple[Tensor, Tensor]:
    maxima, sums, targets, products = statistics
    return targets - maxima - sums.log(), sums.log() - products / sums


def check(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
) -> None:
    """Statistics and gradients of the kernels against float64; overwrites the logits."""
    expected = expected_statistics(logits, targets, scale, softcap)
    gradients = expected_gradients(logits, targets, weights, scale, softcap)

    found = row_statistics(logits, targets, scale, softcap)
    for name, value in found._asdict().items():
        assert value.dtype == torch.float32
        wanted = getattr(expected, name)
        error = (value.double() - wanted).abs()
        assert (error <= 1e-5 * wanted.abs() + 1e-7).all(), (name, value, wanted)
    torch.testing.assert_close(
        logps_and_entropies(found),
        logps_and_entropies(expected),
        rtol=1e-5,
        atol=1e-5,
        check_dtype=False,
    )

    returned = logits_to_gradients_(
        logits, targets, found.maxima, found.sums, weights, scale, softcap
    )
    assert returned is logits
    # Rounding comes on top of the arithmetic's error. Numbers below the type's range vanish. At the
    # target 1 - p loses digits where p is near 1. Far beyond a softcap it is the expected
    # 1 - tanh^2 that has none left.
    bound = (ROUNDING[logits.dtype] + 1e-5) * gradients.abs() + max(1e-30, least(logits.dtype))
    factors = (weights.double() * scale).abs()[:, None]
    bound.scatter_add_(1, targets[:, None], 1e-6 * factors)
    if softcap is not None:
        bound += 1e-15 * factors
    error = (logits.double() - gradients).abs()
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.7, 5.0), (1.5, 2.0)])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_log_collisions_are_the_kernels_sums_at_twice_the_scale_and_cap(
    device: torch.device,
    block: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    scale: float,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def kernel(*arguments: Any) -> RowStatistics:
        calls.append(arguments[2:])
        return row_statistics(*arguments)

    monkeypatch.setattr(head_kernel, "available", lambda _: True)
    monkeypatch.setattr(head_kernel, "row_statistics", kernel)
    logits, targets, _ = draw(generator, 1000, device, dtype)
    before = logits.clone()
    found = row_statistics(logits, targets, scale, softcap)
    values = log_collisions(logits, found, LogitTransform(scale, softcap), overwrite=True)
    assert calls == [(2 * scale, None if softcap is None else 2 * softcap)]
    squares = transformed(before, scale, softcap).softmax(dim=1).square().sum(dim=1)
    torch.testing.assert_close(values.double(), squares.log(), rtol=0, atol=1e-5)
    assert torch.equal(logits, before)


def least(dtype: torch.dtype) -> float:
    """Half the distance between the smallest numbers of a type."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


def test_only_cuda_devices_and_only_with_triton_are_served() -> None:
    assert not available(torch.device("cpu"))
    assert available(torch.device("cuda")) == head_kernel.HAS_TRITON


def test_logits_that_the_kernels_cannot_read_are_refused() -> None:
    targets = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(AssertionError, match="float64"):
        row_statistics(torch.zeros(2, 3, dtype=torch.float64), targets)
    with pytest.raises(AssertionError, match="one piece"):
        row_statistics(torch.zeros(3, 2).T, targets)


@pytest.mark.parametrize(
    ("scale", "softcap"), [(1.0, None), (0.7, None), (1.0, 5.0), (0.7, 30.0), (16.0, 2.0)]
)
@pytest.mark.parametrize("columns", [1, 7, 1000, 5000])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_statistics_and_gradients_are_those_of_float64(
    device: torch.device,
    block: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    columns: int,
    scale: float,
    softcap: float | None,
) -> None:
    check(*draw(generator, columns, device, dtype), scale, softcap)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_small_logits_keep_their_digits(
    device: torch.device, generator: torch.Generator, softcap: float | None
) -> None:
    check(*draw(generator, 300, device, size=1e-3), softcap=softcap)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_the_maximum_may_rise_in_any_block(
    device: torch.device, block: int, generator: torch.Generator, size: float, descending: bool
) -> None:
    logits, targets, weights = draw(generator, 1000, device, size=size)
    check(logits.sort(dim=1, descending=descending).values, targets, weights)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_large_logits_do_not_overflow(
    device: torch.device, block: int, generator: torch.Generator, scale: float
) -> None:
    logits, targets, weights = draw(generator, 1000, device)
    check(
        logits + torch.tensor([1e4, -1e4, 0.0, 3e4, 1e4], device=device)[:, None].round(),
        targets,
        weights,
        scale,
    )


@pytest.mark.parametrize("lowest", [float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logits_that_are_shut_out_count_for_nothing(
    device: torch.device,
    block: int,
    generator: torch.Generator,
    softcap: float | None,
    lowest: float,
) -> None:
    logits, targets, weights = draw(generator, 1000, device)
    logits[0, 1:] = lowest  # all but the target
    logits[1, :300] = lowest  # whole blocks at the start
    logits[2, 500:] = lowest  # and at the end
    logits[3, ::2] = lowest
    logits[4, :-1] = lowest
    targets[2], targets[3], targets[4] = 499, 1, 999
    check(logits, targets, weights, softcap=softcap)


@pytest.mark.parametrize("rest", [float("-inf"), -1e4])
def test_a_certain_token_has_no_entropy_and_no_gradient(
    device: torch.device, block: int, rest: float
) -> None:
    targets = torch.tensor([0, 500, 999], device=device)
    logits = torch.full((3, 1000), rest, device=device)
    logits.scatter_(1, targets[:, None], 3.0)
    found = row_statistics(logits, targets, scale=0.7)
    logps, entropies = logps_and_entropies(found)
    assert not logps.any()
    assert not entropies.any()
    ones = torch.ones(3, device=device)
    assert not logits_to_gradients_(logits, targets, found.maxima, found.sums, ones, 0.7).any()


def test_equal_logits_have_the_entropy_of_their_number(device: torch.device, block: int) -> None:
    logits = torch.full((1, 1000), 1e4, device=device)
    logps, entropies = logps_and_entropies(row_statistics(logits, logits.new_zeros(1).long()))
    wanted = torch.tensor([1000.0], device=device).log()
    torch.testing.assert_close(entropies, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(logps, -wanted, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_no_distribution_is_nan_and_stays_in_its_row(
    device: torch.device, block: int, generator: torch.Generator
) -> None:
    logits, targets, _ = draw(generator, 1000, device)
    logits[0] = float("-inf")
    logits[1, 400] = float("nan")
    logits[2, 400] = float("inf")
    targets[3] = 1000  # outside the vocabulary
    logps, entropies = logps_and_entropies(row_statistics(logits, targets))
    assert logps.isnan().tolist() == [True, True, True, True, False]
    assert entropies.isnan().tolist() == [True, True, True, False, False]


def test_a_target_that_is_shut_out_has_the_log_prob_minus_infinity(device: torch.device) -> None:
    logits = torch.tensor([[1.0, float("-inf"), 0.0]], device=device)
    targets, weights = torch.tensor([1], device=device), torch.tensor([0.5], device=device)
    expected = expected_gradients(logits, targets, weights)
    found = row_statistics(logits, targets)
    assert logps_and_entropies(found)[0].item() == float("-inf")
    logits_to_gradients_(logits, targets, found.maxima, found.sums, weights)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-7)


def test_rows_may_lie_apart_and_what_lies_between_is_left_alone(
    device: torch.device, block: int, generator: torch.Generator
) -> None:
    wide, _, _ = draw(generator, 1029, device, torch.bfloat16)
    _, targets, weights = draw(generator, 1000, device)
    before = wide.clone()
    check(wide[:, 13:1013], targets, weights)
    assert wide[:, :13].equal(before[:, :13])
    assert wide[:, 1013:].equal(before[:, 1013:])
    assert not wide[:, 13:1013].equal(before[:, 13:1013])


def test_a_weight_of_zero_gives_zeros(device: torch.device, generator: torch.Generator) -> None:
    logits, targets, _ = draw(generator, 300, device)
    found = row_statistics(logits, targets)
    zeros = torch.zeros(ROWS, device=device)
    assert not logits_to_gradients_(logits, targets, found.maxima, found.sums, zeros).any()


def test_vectors_of_any_stride_are_read_right(
    device: torch.device, generator: torch.Generator
) -> None:
    """The gradient of a sum comes expanded, with a stride of 0."""
    logits, targets, _ = draw(generator, 300, device)
    weights = torch.tensor(0.5, device=device).expand(ROWS)
    check(logits, targets.repeat_interleave(2)[::2], weights)


def test_no_rows_are_no_error(device: torch.device) -> None:
    logits, targets = torch.empty(0, 9, device=device), torch.empty(0, device=device).long()
    found = row_statistics(logits, targets)
    assert [value.shape for value in found] == [(0,)] * 4
    assert logits_to_gradients_(logits, targets, *found[:2], found.sums) is logits


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_beyond_two_to_the_31_logits_are_reached(generator: torch.Generator) -> None:
    """Three rows 2^30 numbers apart (4 GiB): the stride fits 32 bits, the last row's offset not."""
    device = torch.device("cuda")
    logits, targets, weights = draw(generator, 1000, device, torch.bfloat16)
    storage = torch.empty(2**31 + 1000, dtype=torch.bfloat16, device=device)
    apart = storage.as_strided((3, 1000), (2**30, 1))
    apart.copy_(logits[1:4])
    check(apart, targets[1:4], weights[1:4])


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_the_host_never_waits_for_the_device(generator: torch.Generator) -> None:
    logits, targets, weights = draw(generator, 5000, torch.device("cuda"), torch.bfloat16)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = row_statistics(logits, targets)
        logits_to_gradients_(logits, targets, found.maxima, found.sums, weights)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
