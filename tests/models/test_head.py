"""The head against full logits: values, gradients, memory, precision, and what it refuses."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
)

from mallowspo_cli.errors import ModelError
from mallowspo_cli.models import head as head_module
from mallowspo_cli.models.head import LogprobHead, TokenStatistics, install_head
from mallowspo_cli.models.logits import LogitTransform
from tests.models.families import build

ROWS, WIDTH, VOCABULARY = 11, 6, 23
PLAIN = LogitTransform()
TRANSFORMS = [PLAIN, LogitTransform(scale=0.4), LogitTransform(scale=1.5, softcap=2.0)]


def inputs(
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    scale: float = 1.0,
    transform: LogitTransform = PLAIN,
) -> tuple[LogprobHead, Tensor, Tensor]:
    """A head, hidden states (N, d) and targets (N,)."""
    generator = torch.Generator().manual_seed(5)
    head = LogprobHead(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    head.transform = transform
    with torch.no_grad():
        for parameter in head.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(scale * values)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return head, hidden.requires_grad_(), targets


def full(head: LogprobHead, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropies, (N,) each, from all logits in float64."""
    bias = None if head.bias is None else head.bias.double()
    logits = nn.functional.linear(hidden.double(), head.weight.double(), bias)
    logits = head.transform.scale * logits
    if (cap := head.transform.softcap) is not None:
        logits = cap * torch.tanh(logits / cap)
    logps = logits.log_softmax(-1)
    return logps.gather(1, targets[:, None]).squeeze(1), -(logps.exp() * logps).sum(-1)


def limit(
    monkeypatch: pytest.MonkeyPatch,
    chunk_rows: int,
    kept_rows: int,
    words: int = VOCABULARY,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Chunks of this many rows, and the logits of this many kept."""
    statistic = torch.promote_types(dtype, torch.float32)
    chunk, kept = statistic.itemsize * words * chunk_rows, dtype.itemsize * words * kept_rows
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": chunk})
    monkeypatch.setattr(head_module, "KEPT_BYTES", {"cpu": kept})


@pytest.fixture(params=[1, 3, 4, 11, 512])
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows of a chunk; the logits of the first 4 rows may be kept."""
    limit(monkeypatch, request.param, 4)
    return request.param


@pytest.mark.parametrize(
    ("rows", "most", "sizes"),
    [
        (11, 1, [1] * 11),
        (11, 3, [3, 3, 3, 2]),
        (11, 4, [4, 4, 3]),
        # Even pieces, not a full one and a small one.
        (11, 10, [6, 5]),
        (11, 11, [11]),
        (11, 512, [11]),
        (1, 1, [1]),
        (0, 4, []),
    ],
)
def test_chunks_are_even_pieces_of_the_rows(
    rows: int, most: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, most, 0)
    head, _, _ = inputs()
    chunks = head_module._chunks(torch.zeros(rows, WIDTH), head.weight, torch.float64)
    assert [rows_of.stop - rows_of.start for rows_of in chunks] == sizes
    assert [row for each in chunks for row in range(each.start, each.stop)] == list(range(rows))


def test_a_row_whose_logits_take_more_than_a_chunk_may_is_a_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": 1})
    head, hidden, targets = inputs()
    torch.testing.assert_close(head(hidden, targets).logps, full(head, hidden, targets)[0])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_chunks_equal_full_log_softmax_and_entropy(
    chunk_rows: int, dtype: torch.dtype, tolerance: float, bias: bool, transform: LogitTransform
) -> None:
    head, hidden, targets = inputs(dtype, bias, transform=transform)
    found = head(hidden, targets, entropy=True)
    logps, entropies = full(head, hidden, targets)
    assert found.logps.dtype == found.entropies.dtype == dtype
    torch.testing.assert_close(found.logps.double(), logps, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.entropies.double(), entropies, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
def test_gradients_equal_those_of_the_full_computation(
    chunk_rows: int, entropy: bool, bias: bool, transform: LogitTransform
) -> None:
    head, hidden, targets = inputs(bias=bias, transform=transform)
    leaves = (hidden, *head.parameters())
    weights = torch.linspace(-2, 3, ROWS, dtype=torch.float64)
    found = torch.autograd.grad((head(hidden, targets, entropy).logps * weights).sum(), leaves)
    expected = torch.autograd.grad((full(head, hidden, targets)[0] * weights).sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradients_pass_gradcheck(
    transform: LogitTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, 4, 4)
    head, hidden, targets = inputs(transform=transform)

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(head, parameters, (hidden, targets)).logps

    leaves = (hidden, *(p.detach().requires_grad_() for p in head.parameters()))
    assert torch.autograd.gradcheck(logps, leaves)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    head, hidden, targets = inputs()
    logps = head(hidden, targets).logps
    (gradient,) = torch.autograd.grad(logps.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        gradient.sum().backward()


def test_float32_gradients_are_close_to_float64_ones() -> None:
    head, hidden, targets = inputs(torch.float32, scale=3.0)
    leaves = (hidden, *head.parameters())
    found = torch.autograd.grad(head(hidden, targets).logps.sum(), leaves)
    expected = torch.autograd.grad(full(head, hidden, targets)[0].sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_entropies_come_only_when_asked_for_and_carry_no_gradient() -> None:
    head, hidden, targets = inputs()
    assert head(hidden, targets).entropies is None
    found = head(hidden, targets, entropy=True)
    assert isinstance(found, TokenStatistics)
    assert not found.entropies.requires_grad
    assert found.logps.requires_grad


def test_uniform_logits_have_entropy_log_v() -> None:
    head, hidden, targets = inputs(torch.float32)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(7.0)
    found = head(hidden, targets, entropy=True)
    expected = torch.full((ROWS,), math.log(VOCABULARY))
    torch.testing.assert_close(found.entropies, expected)
    torch.testing.assert_close(found.logps.detach(), -expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("peak", [100.0, 1e4, 1e30])
def test_a_one_hot_distribution_has_no_entropy_and_everything_stays_finite(
    dtype: torch.dtype, peak: float
) -> None:
    head, hidden, targets = inputs(dtype)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[3] = peak
    targets[0] = 3
    found = head(hidden, targets, entropy=True)
    torch.testing.assert_close(found.entropies, torch.zeros(ROWS, dtype=dtype))
    assert found.logps[0] == 0
    torch.testing.assert_close(
        found.logps[targets != 3], torch.full_like(found.logps[targets != 3], -peak)
    )
    found.logps.sum().backward()
    for leaf in (hidden, *head.parameters()):
        assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits_are_exact_and_finite(sign: int) -> None:
    head, hidden, targets = inputs(torch.float32, scale=1e4)
    with torch.no_grad():
        head.bias.add_(sign * 1e4)
    found = head(hidden, targets, entropy=True)
    logps, entropies = full(head, hidden, targets)
    torch.testing.assert_close(found.logps.double(), logps, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(found.entropies.double(), entropies, rtol=1e-3, atol=1e-3)
    found.logps.sum().backward()
    for leaf in (hidden, *head.parameters()):
        assert torch.isfinite(leaf.grad).all()


def saved_logits(logps: Tensor) -> int:
    """Rows of logits that the graph holds on to."""
    saved = logps.grad_fn.saved_tensors
    return sum(len(t) for t in saved if t.ndim == 2 and t.shape[1] == VOCABULARY)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", ["", "weight", "bias", "hidden"])
def test_kept_logits_and_those_computed_again_give_the_same_gradients_to_the_bit(
    frozen: str, dtype: torch.dtype, transform: LogitTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for kept_rows, whole_chunks in ((0, 0), (7, 6), (ROWS, ROWS)):
        limit(monkeypatch, 3, kept_rows, dtype=dtype)
        head, hidden, targets = inputs(dtype, transform=transform)
        leaves = {"weight": head.weight, "bias": head.bias, "hidden": hidden}
        if frozen:
            leaves.pop(frozen).requires_grad_(False)
        logps = head(hidden, targets).logps
        assert saved_logits(logps) == whole_chunks
        weights = torch.linspace(-2, 3, ROWS, dtype=logps.dtype)
        found.append(torch.autograd.grad(logps, list(leaves.values()), weights))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


class Products(TorchDispatchMode):
    """How many rows of logits the matrix products took part in, by which product it was."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words, self.width = words, width
        self.rows: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        # Of x + a b the factors come last.
        if packet in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            kinds = {
                (self.width, self.words): "logits",
                (self.words, self.width): "hidden",
            }
            kind = kinds.get((left.shape[1], right.shape[1]))
            if kind is None and (left.shape[0], right.shape[1]) == (self.words, self.width):
                kind = "weight"
            self.rows[kind or "other"] += left.shape[1] if kind == "weight" else left.shape[0]
        return func(*args, **(kwargs or {}))


def products(
    monkeypatch: pytest.MonkeyPatch, kept_rows: int, frozen: tuple[str, ...] = ()
) -> tuple[dict[str, int], dict[str, int]]:
    """Rows that went through each matrix product, forward and backward."""
    limit(monkeypatch, 3, kept_rows)
    head, hidden, targets = inputs()
    for name in frozen:
        (hidden if name == "hidden" else getattr(head, name)).requires_grad_(False)
    with Products(VOCABULARY, WIDTH) as forward:
        logps = head(hidden, targets).logps
    with Products(VOCABULARY, WIDTH) as backward:
        logps.sum().backward()
    return dict(forward.rows), dict(backward.rows)


def test_a_frozen_head_needs_no_matrix_product_in_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """d log p / d h = W[y] - p W is formed where the logits are at hand."""
    forward, backward = products(monkeypatch, ROWS, ("weight", "bias"))
    assert forward == {"logits": ROWS, "hidden": ROWS}
    assert backward == {}


@pytest.mark.parametrize("kept_rows", [0, 3, 5, 9, ROWS])
def test_only_logits_that_were_not_kept_are_computed_again(
    kept_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, backward = products(monkeypatch, kept_rows)
    assert forward == {"logits": ROWS}
    again = ROWS - (kept_rows if kept_rows == ROWS else kept_rows // 3 * 3)
    assert backward == {"hidden": ROWS, "weight": ROWS} | ({"logits": again} if again else {})


def test_what_needs_no_gradient_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products(monkeypatch, ROWS, ("hidden",))[1] == {"weight": ROWS}
    assert products(monkeypatch, ROWS, ("weight",))[1] == {"hidden": ROWS}
    assert products(monkeypatch, ROWS, ("hidden", "weight"))[1] == {}


@pytest.mark.parametrize("kept_rows", [0, 5, ROWS])
def test_the_backward_pass_can_be_run_twice(
    kept_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept logits are not overwritten."""
    limit(monkeypatch, 3, kept_rows)
    head, hidden, targets = inputs(transform=TRANSFORMS[-1])
    total = head(hidden, targets).logps.sum()
    leaves = (hidden, *head.parameters())
    once = torch.autograd.grad(total, leaves, retain_graph=True)
    again = torch.autograd.grad(total, leaves)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_no_more_logits_are_kept_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for kept_rows, rows in ((0, 0), (2, 0), (3, 3), (8, 6), (10, 9), (ROWS, ROWS)):
        limit(monkeypatch, 3, kept_rows)
        head, hidden, targets = inputs()
        assert saved_logits(head(hidden, targets).logps) == rows
    head.requires_grad_(False)
    assert saved_logits(head(hidden, targets).logps) == 0


def test_where_no_gradient_is_wanted_logits_are_scratch_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Evaluation with weights that are being trained: none is kept, none copied."""
    statistics, overwritten = head_module.row_statistics, []

    def spy(*args, overwrite: bool):
        overwritten.append(overwrite)
        return statistics(*args, overwrite=overwrite)

    monkeypatch.setattr(head_module, "row_statistics", spy)
    head, hidden, targets = inputs()
    with torch.no_grad():
        head(hidden, targets)
    assert overwritten == [True]


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation's result has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kept_rows", [0, 24, 64])
def test_no_tensor_of_all_tokens_by_all_words_is_ever_made(
    kept_rows: int, frozen: bool, transform: LogitTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept logits stay in their chunks."""
    rows, width, words, chunk = 64, 4, 40, 8
    limit(monkeypatch, chunk, kept_rows, words, torch.float32)
    head = LogprobHead(width, words)
    head.transform = transform
    head.weight.requires_grad_(not frozen)
    head.bias.requires_grad_(not frozen)
    hidden = torch.randn(rows, width, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.long)
    with LargestTensor() as chunked:
        head(hidden, targets, entropy=True).logps.sum().backward()
    with LargestTensor() as whole:
        full(head, hidden, targets)[0].sum().backward()
    assert whole.elements >= rows * words
    assert chunked.elements == max(chunk * words, rows * width, words * width)


def test_autocast_to_bfloat16_gives_float32_statistics_of_its_logits() -> None:
    head, hidden, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(hidden, targets, entropy=True)
        logits = nn.Linear.forward(head, hidden)
    assert logits.dtype == torch.bfloat16
    assert found.logps.dtype == found.entropies.dtype == torch.float32
    expected = logits.float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    # The bias is added after rounding here, and before it in a fused linear layer.
    torch.testing.assert_close(found.logps, expected, rtol=0, atol=0.05)
    found.logps.sum().backward()
    assert {leaf.grad.dtype for leaf in (hidden, *head.parameters())} == {torch.float32}
    exact = torch.autograd.grad(full(head, hidden, targets)[0].sum(), head.weight)[0]
    torch.testing.assert_close(head.weight.grad, exact, rtol=0.05, atol=0.15)


def test_autocast_without_a_bias_is_the_log_softmax_of_the_same_logits() -> None:
    head, hidden, targets = inputs(torch.float32, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(hidden, targets, entropy=True)
        logps = nn.Linear.forward(head, hidden).float().log_softmax(-1)
    torch.testing.assert_close(found.logps, logps.gather(1, targets[:, None]).squeeze(1))
    torch.testing.assert_close(found.entropies, -(logps.exp() * logps).sum(-1))


def test_bfloat16_weights_give_float32_statistics() -> None:
    head, hidden, targets = inputs(torch.bfloat16)
    found = head(hidden, targets, entropy=True)
    assert found.logps.dtype == found.entropies.dtype == torch.float32
    torch.testing.assert_close(
        found.logps.double(), full(head, hidden, targets)[0], rtol=0.02, atol=0.1
    )
    found.logps.sum().backward()
    assert {leaf.grad.dtype for leaf in (hidden, *head.parameters())} == {torch.bfloat16}


def test_without_targets_it_is_the_linear_layer() -> None:
    head, _, _ = inputs()
    hidden = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    expected = nn.functional.linear(hidden, head.weight, head.bias)
    torch.testing.assert_close(head(hidden), expected, rtol=0, atol=0)


def test_no_rows_have_no_statistics_and_no_gradient() -> None:
    head, hidden, targets = inputs()
    found = head(hidden[:0], targets[:0], entropy=True)
    assert found.logps.shape == found.entropies.shape == (0,)
    found.logps.sum().backward()
    assert not head.weight.grad.any()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_frozen_weight_gets_no_gradient_and_the_hidden_states_still_do(
    chunk_rows: int, transform: LogitTransform
) -> None:
    head, hidden, targets = inputs(transform=transform)
    head.requires_grad_(False)
    weights = torch.linspace(-2, 3, ROWS, dtype=torch.float64)
    (expected,) = torch.autograd.grad((full(head, hidden, targets)[0] * weights).sum(), hidden)
    (head(hidden, targets).logps * weights).sum().backward()
    assert head.weight.grad is None
    assert head.bias.grad is None
    torch.testing.assert_close(hidden.grad, expected)


def test_frozen_hidden_states_get_no_gradient_and_the_weight_still_does() -> None:
    head, hidden, targets = inputs()
    head(hidden.detach(), targets).logps.sum().backward()
    assert hidden.grad is None
    (expected,) = torch.autograd.grad(full(head, hidden, targets)[0].sum(), head.weight)
    torch.testing.assert_close(head.weight.grad, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_shares_the_parameters(bias: bool) -> None:
    linear = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=torch.float64).eval()
    head = LogprobHead.from_linear(linear)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert not head.training
    assert (head.in_features, head.out_features) == (WIDTH, VOCABULARY)
    assert list(head.state_dict()) == list(linear.state_dict())


def tiny_llama(**keys) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        **keys,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
def test_installing_the_head_keeps_ties_names_and_logits(tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied).eval()
    ids = torch.arange(5)[None]
    before, names = model(ids).logits, list(model.state_dict())
    for _ in range(2):
        install_head(model)
        assert isinstance(model.lm_head, LogprobHead)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.tie_weights()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


def test_a_tied_weight_gets_the_gradient_of_both_its_uses() -> None:
    model = tiny_llama(tie_word_embeddings=True).double()
    ids, targets = torch.arange(5)[None], torch.arange(1, 6)
    logps = model(ids).logits[0].log_softmax(-1).gather(1, targets[:, None])
    (expected,) = torch.autograd.grad(logps.sum(), model.lm_head.weight)
    install_head(model)
    hidden = model.model(ids).last_hidden_state[0]
    model.lm_head(hidden, targets).logps.sum().backward()
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, expected)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_a_models_own_logits_are_scored_and_sampling_is_left_as_it_is(family: str) -> None:
    model = build(family, "eager")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        before = model(ids).logits
        install_head(model)
        hidden = model.base_model(ids).last_hidden_state[0, :-1]
        found = model.lm_head(hidden, ids[0, 1:], entropy=True)
        after = model(ids).logits
    assert model.lm_head.transform != PLAIN
    assert torch.equal(after, before)
    logps = before[0, :-1].log_softmax(-1)
    expected = logps.gather(1, ids[0, 1:, None]).squeeze(1)
    torch.testing.assert_close(found.logps, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.entropies, -(logps.exp() * logps).sum(-1))


def test_a_scale_that_is_not_known_is_refused() -> None:
    model = tiny_llama()
    model.config.logits_scaling = 0.5
    with pytest.raises(ModelError, match=r"^models of type llama change their logits by logits_sc"):
        install_head(model)
    assert not isinstance(model.lm_head, LogprobHead)
    model.config.logits_scaling = 1.0
    install_head(model)


def test_a_cap_in_the_configuration_of_the_text_part_is_seen() -> None:
    model = tiny_llama()
    text = SimpleNamespace(final_logit_softcapping=30.0)
    model.config.get_text_config = lambda decoder=None: text
    install_head(model)
    assert model.lm_head.transform == LogitTransform(softcap=30.0)


def test_one_models_transform_is_not_anothers() -> None:
    capped = build("gemma2", "eager")
    install_head(capped)
    plain = tiny_llama()
    install_head(plain)
    assert (capped.lm_head.transform.softcap, plain.lm_head.transform) == (3.0, PLAIN)


class ScaledLinear(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


@pytest.mark.parametrize("head", [None, nn.Identity(), ScaledLinear(8, VOCABULARY)])
def test_an_output_that_is_no_plain_linear_layer_is_refused(head: nn.Module | None) -> None:
    model = tiny_llama()
    model.lm_head = head
    with pytest.raises(ModelError, match="has no linear output layer") as error:
        install_head(model)
    assert "\n" not in str(error.value)


def test_layers_between_hidden_states_and_the_output_layer_are_refused() -> None:
    """ModernBERT's decoder has a dense layer and a norm there; log-probs would be wrong."""
    config = ModernBertDecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    with pytest.raises(ModelError):
        install_head(ModernBertDecoderForCausalLM(config))
