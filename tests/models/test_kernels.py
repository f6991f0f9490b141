"""Kernels: all compute what the definition says, values and gradients alike."""

import inspect
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from mallowspo_cli.data.table import TokenizedPair
from mallowspo_cli.models import attention, kernels
from mallowspo_cli.models.kernels import (
    Kernel,
    choose_kernel,
    dense_kernel,
    explicit_attention,
    explicit_kernel,
    flash_attn_kernel,
    flex_kernel,
    sdpa_kernel,
    varlen_kernel,
)
from mallowspo_cli.models.segments import Segments
from mallowspo_cli.packing.layout import collate
from mallowspo_cli.scoring import PairScorer
from tests.models.families import build

LENGTHS = [(5, 3, 4), (1, 1, 1), (2, 9, 1), (7, 1, 6)]
WINDOWS = [None, 1, 4, 100]
CAP = 1.5
"""Low, so that it matters."""
UNCOMPILED = "ignore:flex_attention called without torch.compile:UserWarning"


class Inputs(NamedTuple):
    query: Tensor
    """(1, H, T, D)"""
    key: Tensor
    """(1, K, T, D)"""
    value: Tensor

    def fresh(self, device: str = "cpu", dtype: torch.dtype | None = None) -> "Inputs":
        """The same numbers as leaves of another graph."""
        return Inputs(*(t.detach().to(device, dtype, copy=True).requires_grad_() for t in self))


def draw(
    lengths: list[tuple[int, int, int]], heads: int = 4, groups: int = 2, width: int = 8
) -> Inputs:
    """Queries with `heads` heads, keys and values with `groups`."""
    generator = torch.Generator().manual_seed(3)
    tokens = sum(map(sum, lengths))

    def states(count: int) -> Tensor:
        return torch.randn(1, count, tokens, width, generator=generator, dtype=torch.float64)

    return Inputs(states(heads), states(groups), states(groups))


def run(
    kernel: Kernel,
    inputs: Inputs,
    segments: Segments,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """What a kernel returns, and the gradients of a weighted sum of it."""
    leaves = inputs.fresh(inputs.query.device.type, inputs.query.dtype)
    result = kernel(*leaves, segments, scale, window, softcap)
    weights = torch.linspace(-1, 2, result.numel(), dtype=torch.float64).view_as(result)
    (result.double() * weights.to(result.device)).sum().backward()
    return result.detach(), [leaf.grad for leaf in leaves]


def assert_same(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def by_hand(
    inputs: Inputs, lengths: list[tuple[int, int, int]], window: int | None, softcap: float | None
) -> Tensor:
    """(1, T, H, D) query by query and head by head, each response's sequence by itself."""
    query, key, value = (part[0].transpose(0, 1) for part in inputs)
    result, start = torch.zeros_like(query), 0
    for prompt, chosen, rejected in lengths:
        before = list(range(start, start + prompt))
        branch = start + prompt + chosen
        for own in (range(start + prompt, branch), range(branch, branch + rejected)):
            sequence = [*before, *own]
            for place, token in enumerate(sequence):
                seen = sequence[0 if window is None else max(0, place - window + 1) : place + 1]
                for head in range(query.shape[1]):
                    group = head * key.shape[1] // query.shape[1]
                    scores = key[seen, group] @ query[token, head] / math.sqrt(query.shape[-1])
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    result[token, head] = scores.softmax(0) @ value[seen, group]
        start = branch + rejected
    return result[None]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("softcap", [None, CAP])
def test_the_dense_kernel_is_attention_over_each_sequence_alone(
    window: int | None, softcap: float | None
) -> None:
    inputs = draw(LENGTHS)
    found = dense_kernel(*inputs, Segments.of(LENGTHS), None, window, softcap)
    assert_same(found, by_hand(inputs, LENGTHS, window, softcap))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("kernel", "softcap"), [(sdpa_kernel, None), (explicit_kernel, None), (explicit_kernel, CAP)]
)
def test_kernels_by_segment_agree_with_the_dense_one(
    kernel: Kernel, softcap: float | None, window: int | None, groups: int
) -> None:
    inputs, segments = draw(LENGTHS, groups=groups), Segments.of(LENGTHS)
    for scale in (None, 0.7):
        options = (segments, window, softcap, scale)
        assert_same(run(kernel, inputs, *options), run(dense_kernel, inputs, *options))


PART = st.integers(1, 6)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(PART, PART, PART), min_size=1, max_size=4),
    st.none() | st.integers(1, 9),
    st.sampled_from([(sdpa_kernel, None), (explicit_kernel, None), (explicit_kernel, CAP)]),
)
def test_they_agree_for_any_lengths(
    lengths: list[tuple[int, int, int]], window: int | None, which: tuple[Kernel, float | None]
) -> None:
    kernel, softcap = which
    inputs, segments = draw(lengths), Segments.of(lengths)
    found = run(kernel, inputs, segments, window, softcap)
    assert_same(found, run(dense_kernel, inputs, segments, window, softcap))


@pytest.mark.filterwarnings(UNCOMPILED)
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("softcap", [None, CAP])
@pytest.mark.parametrize(("window", "groups"), [(None, 1), (None, 2), (1, 4), (4, 2), (100, 2)])
def test_flex_attention_agrees_with_the_dense_kernel(
    window: int | None, groups: int, softcap: float | None, scale: float | None
) -> None:
    """Forward only: it has no backward pass on a CPU."""
    inputs, segments = draw(LENGTHS, groups=groups), Segments.of(LENGTHS)
    options = (segments, scale, window, softcap)
    assert_same(flex_kernel(*inputs, *options), dense_kernel(*inputs, *options))


@pytest.mark.filterwarnings(UNCOMPILED)
@pytest.mark.parametrize("window", [None, 30])
def test_flex_attention_agrees_over_more_than_a_block_of_128(window: int | None) -> None:
    lengths = [(60, 50, 40), *LENGTHS, (3, 100, 90)]
    inputs, segments = draw(lengths), Segments.of(lengths)
    options = (segments, None, window, None)
    assert_same(flex_kernel(*inputs, *options), dense_kernel(*inputs, *options))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("window", [None, 30])
def test_flex_attention_is_compiled_once_for_all_lengths(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """As it is compiled on a GPU, capped scores too: where a graph ends, torch makes tensors of all
    tokens by all tokens."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=graphs)
    monkeypatch.setattr(kernels, "_flex", lambda _device: (compiled, create_block_mask))
    for lengths in ([(60, 50, 40)], LENGTHS, [(9, 8, 7), (100, 30, 20)]):
        inputs, segments = draw(lengths), Segments.of(lengths)
        with torch.no_grad():
            found = flex_kernel(*inputs, segments, None, window, CAP)
        assert_same(found, dense_kernel(*inputs, segments, None, window, CAP))
    assert graphs.frame_count == 2, (
        "one for packs of a single block of 128 tokens, one for all others"
    )


def test_a_softcap_and_a_window_make_a_difference() -> None:
    """Or the tests above would say little."""
    inputs, segments = draw(LENGTHS), Segments.of(LENGTHS)
    plain = dense_kernel(*inputs, segments, None, None, None)
    for window, softcap, scale in ((4, None, None), (None, CAP, None), (None, None, 0.7)):
        other = dense_kernel(*inputs, segments, scale, window, softcap)
        assert (other - plain).abs().max() > 0.1


def by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest: tuple[int, int],
    scale: float | None,
    window: tuple[int, int],
    softcap: float = 0.0,
) -> Tensor:
    """(T, H, D): what libraries say they do. The last query of a sequence is at its last key, and
    a query at p sees the keys from p - left to p + right; -1 is no limit."""
    starts = [query_starts.tolist(), key_starts.tolist()]
    sizes = [np.diff(each).tolist() for each in starts]
    assert longest == (max(sizes[0]), max(sizes[1]))
    assert starts[0][-1] == len(query)
    assert starts[1][-1] == len(key) == len(value)
    attended = []
    for queries, keys, q, k, v in zip(
        *sizes, query.split(sizes[0]), key.split(sizes[1]), value.split(sizes[1]), strict=True
    ):
        at = torch.arange(queries)[:, None] + keys - queries
        other = torch.arange(keys)[None]
        left, right = (math.inf if limit < 0 else limit for limit in window)
        seen = (other >= at - left) & (other <= at + right)
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k)
        scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        attended.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(attended)


def varlen_emulation(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    return by_sequence(
        *(query, key, value, cu_seq_q, cu_seq_k, (max_q, max_k)), scale=scale, window=window_size
    )


def flash_emulation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """flash_attn.flash_attn_varlen_func, from 2.1 on."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert dropout_p == 0
    return by_sequence(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k)),
        scale=softmax_scale,
        window=(window_size[0], 0) if causal else window_size,
        softcap=softcap,
    )


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "varlen_function", lambda: varlen_emulation)
    monkeypatch.setattr(kernels, "flash_function", lambda: flash_emulation)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("kernel", "softcap"),
    [(varlen_kernel, None), (flash_attn_kernel, None), (flash_attn_kernel, CAP)],
)
def test_kernels_over_gathered_keys_agree_with_the_dense_one(
    emulated: None, kernel: Kernel, softcap: float | None, window: int | None, groups: int
) -> None:
    inputs, segments = draw(LENGTHS, groups=groups), Segments.of(LENGTHS)
    for scale in (None, 0.7):
        options = (segments, window, softcap, scale)
        assert_same(run(kernel, inputs, *options), run(dense_kernel, inputs, *options))


@pytest.mark.parametrize("groups", [2, 4])
def test_what_torch_is_called_with_it_takes(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    function = kernels.varlen_function()
    if function is None:
        pytest.skip(f"torch {torch.__version__} has no varlen_attn with windows and groups")
    signature = inspect.signature(function)

    def bound(*args: Any, **options: Any) -> Tensor:
        signature.bind(*args, **options)
        return varlen_emulation(*args, **options)

    monkeypatch.setattr(kernels, "varlen_function", lambda: bound)
    inputs, segments = draw(LENGTHS, groups=groups), Segments.of(LENGTHS)
    found = varlen_kernel(*inputs, segments, 0.7, 4, None)
    assert_same(found, dense_kernel(*inputs, segments, 0.7, 4, None))


@given(st.lists(st.tuples(PART, PART, PART), min_size=1, max_size=4))
def test_gathering_keys_has_the_gradient_of_index_select(
    lengths: list[tuple[int, int, int]],
) -> None:
    segments = Segments.of(lengths)
    tokens = torch.randn(sum(map(sum, lengths)), 2, 3, dtype=torch.float64)
    once, again = (tokens.clone().requires_grad_() for _ in range(2))
    found = kernels._GatherKeys.apply(once, segments)
    expected = again.index_select(0, segments.key_index)
    assert torch.equal(found, expected)
    weights = torch.randn_like(expected)
    found.backward(weights)
    expected.backward(weights)
    assert torch.equal(once.grad, again.grad)


def test_a_second_derivative_of_gathered_keys_is_refused_rather_than_wrong() -> None:
    segments = Segments.of([(2, 1, 1)])
    states = torch.randn(4, 1, 2, requires_grad=True)
    gathered = kernels._GatherKeys.apply(states, segments)
    (gradient,) = torch.autograd.grad(gathered.square().sum(), states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("kernel", [sdpa_kernel, varlen_kernel])
def test_scores_that_a_kernel_cannot_cap_are_not_left_uncapped(
    emulated: None, kernel: Kernel
) -> None:
    with pytest.raises(AssertionError):
        kernel(*draw(LENGTHS), Segments.of(LENGTHS), None, None, CAP)


class Counted(TorchDispatchMode):
    """Elements of all results, and masks that were made."""

    elements = 0
    masks = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.masks += func.overloadpacket in (torch.ops.aten.tril, torch.ops.aten.triu)
        if isinstance(result, Tensor):
            self.elements += result.numel()
        return result


@pytest.mark.parametrize("kernel", [sdpa_kernel, explicit_kernel])
def test_work_grows_with_the_number_of_pairs_and_not_with_its_square(kernel: Kernel) -> None:
    """The backward pass of a slice would fill the whole pack with zeros for every segment."""
    counts = []
    for pairs in (8, 16):
        lengths = [(4, 3, 5)] * pairs
        segments, inputs = Segments.of(lengths), draw(lengths)
        with Counted() as counted:
            run(kernel, inputs, segments)
        counts.append(counted.elements)
    assert counts[1] < 2.05 * counts[0]


@pytest.mark.parametrize("window", [None, 4])
def test_layers_share_a_packs_masks(window: int | None) -> None:
    inputs, segments = draw(LENGTHS), Segments.of(LENGTHS)
    made = []
    for _ in range(2):
        with Counted() as counted:
            sdpa_kernel(*inputs, segments, None, window, None)
        made.append(counted.masks)
    assert made[0] > 0
    assert made[1] == 0


@pytest.mark.filterwarnings(UNCOMPILED)
@pytest.mark.parametrize("kernel", [sdpa_kernel, explicit_kernel, flex_kernel])
def test_a_layer_with_a_window_does_not_get_the_masks_of_one_without(kernel: Kernel) -> None:
    """Gemma and others have both, and all layers are given the same segments."""
    inputs, segments = draw(LENGTHS), Segments.of(LENGTHS)
    for window in (None, 4, 2, None, 4):
        expected = dense_kernel(*inputs, Segments.of(LENGTHS), None, window, None)
        assert_same(kernel(*inputs, segments, None, window, None), expected)


class SoftmaxTypes(TorchDispatchMode):
    """Types in which exponentials were taken."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten._softmax:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_explicit_softmax_is_in_float32_or_better(
    dtype: torch.dtype, expected: torch.dtype
) -> None:
    inputs = Inputs(*(part.to(dtype) for part in draw(LENGTHS)))
    with SoftmaxTypes() as softmax:
        assert explicit_attention(*inputs, None, None, CAP).dtype == dtype
    assert softmax.dtypes == [expected]


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """Choices are cached, and so are those of these tests without this."""
    choose_kernel.cache_clear()
    yield
    choose_kernel.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_without_cuda_segments_go_through_torchs_attention(device: str, dtype: torch.dtype) -> None:
    assert choose_kernel(device, dtype, (64, 64), False) is sdpa_kernel
    assert choose_kernel(device, dtype, (64, 64), True) is explicit_kernel


@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize(
    ("dtype", "head_dim", "softcap", "torch_has", "package", "expected"),
    [
        (torch.bfloat16, 128, False, True, True, varlen_kernel),
        (torch.float16, 256, False, True, False, varlen_kernel),
        (torch.bfloat16, 128, False, False, True, flash_attn_kernel),
        (torch.bfloat16, 128, False, False, False, flex_kernel),
        (torch.bfloat16, 128, True, True, True, flash_attn_kernel),
        (torch.bfloat16, 128, True, True, False, flex_kernel),
        (torch.float32, 128, False, True, True, flex_kernel),
        (torch.float32, 128, True, True, True, flex_kernel),
        (torch.bfloat16, 264, False, True, True, flex_kernel),
        (torch.bfloat16, 264, True, True, True, flex_kernel),
        (torch.bfloat16, 60, False, True, True, flex_kernel),
    ],
)
def test_on_cuda_the_fastest_that_can_compute_it_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    head_dim: int,
    softcap: bool,
    torch_has: bool,
    package: bool,
    expected: Kernel,
) -> None:
    monkeypatch.setattr(kernels, "varlen_function", lambda: varlen_emulation if torch_has else None)
    monkeypatch.setattr(kernels, "flash_function", lambda: flash_emulation if package else None)
    assert choose_kernel("cuda", dtype, (head_dim, head_dim), softcap) is expected


@pytest.mark.usefixtures("fresh_choice")
def test_values_of_another_width_than_queries_go_by_segment() -> None:
    assert choose_kernel("cuda", torch.bfloat16, (192, 128), False) is sdpa_kernel
    assert choose_kernel("cuda", torch.bfloat16, (192, 128), True) is explicit_kernel


@pytest.mark.usefixtures("fresh_choice")
def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mallowspo"):
        for _ in range(3):
            choose_kernel("cpu", torch.float32, (64, 64), False)
    assert caplog.messages == ["attention over shared prompts: sdpa"]


def test_under_autocast_a_kernel_gets_the_type_of_autocast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rotations come in float32; the fast kernels take half precision, and all of one type."""
    seen: list[tuple[torch.dtype, ...]] = []

    def choose(device: str, dtype: torch.dtype, widths: tuple[int, int], softcap: bool) -> Kernel:
        def kernel(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
            seen.append((dtype, query.dtype, key.dtype, value.dtype))
            return sdpa_kernel(query, key, value, *options)

        return kernel

    monkeypatch.setattr(attention, "choose_kernel", choose)
    scorer = PairScorer(build("llama", attention.NAME, torch.float32))
    ids = np.arange(3, 8, dtype=np.int32)
    with torch.autocast("cpu", torch.bfloat16):
        scorer(collate([TokenizedPair("a", ids, ids, ids)]))
    assert set(seen) == {(torch.bfloat16,) * 4}


CUDA_LENGTHS = [(130, 70, 300), (1, 1, 1), (17, 200, 1), (64, 64, 64)]
"""Segments with other numbers of keys than of queries, shorter and longer than a block."""
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_cuda
# Compilers have advice.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("softcap", [None, CAP])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize(
    ("kernel", "library"),
    [
        (varlen_kernel, kernels.varlen_function),
        (flash_attn_kernel, kernels.flash_function),
        (flex_kernel, None),
    ],
)
def test_kernels_on_a_gpu_agree_with_the_dense_one_in_float32(
    kernel: Kernel,
    library: Callable[[], Any] | None,
    groups: int,
    width: int,
    softcap: float | None,
    window: int | None,
) -> None:
    if library is not None and library() is None:
        pytest.skip(f"{kernel.__name__}: its library is not installed, or too old")
    if kernel is varlen_kernel and softcap is not None:
        pytest.skip("varlen_attn has no softcap")
    dtypes = [torch.bfloat16, torch.float32] if kernel is flex_kernel else [torch.bfloat16]
    # Not so many variants of one function that it is no longer compiled.
    torch.compiler.reset()
    exact = draw(CUDA_LENGTHS, heads=8, groups=groups, width=width)
    segments = Segments.of(CUDA_LENGTHS).to(torch.device("cuda"))
    for dtype in dtypes:
        inputs = exact.fresh("cuda", dtype)
        # Of the rounded numbers, so that what is left is the kernel's own error.
        truth = run(dense_kernel, inputs.fresh("cuda", torch.float32), segments, window, softcap)
        result, gradients = run(kernel, inputs, segments, window, softcap)
        assert result.dtype == dtype
        tolerance = 2**-6 if dtype == torch.bfloat16 else 2e-3
        for found, expected in zip([result, *gradients], [truth[0], *truth[1]], strict=True):
            error = (found.float() - expected).norm() / expected.norm()
            assert error < tolerance
            # No single token is far off, such as the first of a rejected response.
            worst = (found.float() - expected).abs().max() / expected.abs().max()
            assert worst < 4 * tolerance


@pytest.mark.gpu
@needs_cuda
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_flex_attention_on_a_gpu_takes_packs_of_any_length_in_any_order(dtype: torch.dtype) -> None:
    """Under 128 tokens too, where torch has a kernel of its own that cannot be chosen."""
    torch.compiler.reset()
    tolerance = 2**-6 if dtype == torch.bfloat16 else 2e-3
    for lengths in ([(30, 20, 25)], CUDA_LENGTHS, [(1, 1, 1)], [(60, 30, 37)], [(60, 30, 38)]):
        inputs = draw(lengths, heads=8, groups=2, width=16).fresh("cuda", dtype)
        segments = Segments.of(lengths).to(torch.device("cuda"))
        truth = run(dense_kernel, inputs.fresh("cuda", torch.float32), segments)
        result, gradients = run(flex_kernel, inputs, segments)
        for found, expected in zip([result, *gradients], [truth[0], *truth[1]], strict=True):
            assert (found.float() - expected).norm() < tolerance * expected.norm()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("groups", [2, 8])
def test_gradients_on_a_gpu_are_the_same_every_time(groups: int) -> None:
    """Of the gather: no number is added twice to one place."""
    segments = Segments.of(CUDA_LENGTHS).to(torch.device("cuda"))
    states = torch.randn(sum(map(sum, CUDA_LENGTHS)), groups, 64, device="cuda")
    weights = torch.randn(len(segments.key_index), groups, 64, device="cuda")
    gradients = []
    for _ in range(5):
        leaf = states.clone().requires_grad_()
        kernels._GatherKeys.apply(leaf, segments).backward(weights)
        gradients.append(leaf.grad)
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])
