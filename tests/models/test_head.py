"""The head against full logits: values, gradients, memory, precision, and what it refuses."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from mallowspo_cli.errors import ModelError
from mallowspo_cli.models.head import LOGIT_CHANGES, LogprobHead, TokenStatistics, install_head

ROWS, WIDTH, VOCABULARY = 11, 6, 23


def inputs(
    dtype: torch.dtype = torch.float64, bias: bool = True, scale: float = 1.0
) -> tuple[LogprobHead, Tensor, Tensor]:
    """A head, hidden states (N, d) and targets (N,)."""
    generator = torch.Generator().manual_seed(5)
    head = LogprobHead(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(scale * values)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return head, hidden.requires_grad_(), targets


def full(head: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropies, (N,) each, from all logits in float64."""
    bias = None if head.bias is None else head.bias.double()
    logits = nn.functional.linear(hidden.double(), head.weight.double(), bias)
    logps = logits.log_softmax(-1)
    return logps.gather(1, targets[:, None]).squeeze(1), -(logps.exp() * logps).sum(-1)


@pytest.fixture(params=[1, 3, 4, 11, 512])
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("mallowspo_cli.models.head.CHUNK_ROWS", request.param)
    return request.param


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_chunks_equal_full_log_softmax_and_entropy(
    chunk_rows: int, dtype: torch.dtype, tolerance: float, bias: bool
) -> None:
    head, hidden, targets = inputs(dtype, bias)
    found = head(hidden, targets, entropy=True)
    logps, entropies = full(head, hidden, targets)
    assert found.logps.dtype == found.entropies.dtype == dtype
    torch.testing.assert_close(found.logps.double(), logps, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.entropies.double(), entropies, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
def test_gradients_equal_those_of_the_full_computation(
    chunk_rows: int, entropy: bool, bias: bool
) -> None:
    head, hidden, targets = inputs(bias=bias)
    leaves = (hidden, *head.parameters())
    weights = torch.linspace(-2, 3, ROWS, dtype=torch.float64)
    found = torch.autograd.grad((head(hidden, targets, entropy).logps * weights).sum(), leaves)
    expected = torch.autograd.grad((full(head, hidden, targets)[0] * weights).sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_gradients_pass_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mallowspo_cli.models.head.CHUNK_ROWS", 4)
    head, hidden, targets = inputs()

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


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation's result has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_no_tensor_of_all_tokens_by_all_words_is_ever_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, width, words, chunk = 64, 4, 40, 8
    monkeypatch.setattr("mallowspo_cli.models.head.CHUNK_ROWS", chunk)
    head = LogprobHead(width, words)
    hidden = torch.randn(rows, width, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.long)
    with LargestTensor() as chunked:
        head(hidden, targets, entropy=True).logps.sum().backward()
    with LargestTensor() as whole:
        full(head, hidden, targets)[0].sum().backward()
    assert whole.elements >= rows * words
    assert chunked.elements <= max(chunk * words, rows * width, words * width)


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


def test_a_frozen_weight_gets_no_gradient_and_the_hidden_states_still_do() -> None:
    head, hidden, targets = inputs()
    head.requires_grad_(False)
    (expected,) = torch.autograd.grad(full(head, hidden, targets)[0].sum(), hidden)
    head(hidden, targets).logps.sum().backward()
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


@pytest.mark.parametrize("key", LOGIT_CHANGES)
def test_a_model_that_changes_its_logits_is_refused(key: str) -> None:
    model = tiny_llama()
    setattr(model.config, key, 0.5)
    with pytest.raises(ModelError, match=rf"^LlamaForCausalLM changes its logits \({key}\)"):
        install_head(model)
    setattr(model.config, key, 1.0)
    install_head(model)


def test_gemma_2_with_its_capped_logits_is_refused() -> None:
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        install_head(Gemma2ForCausalLM(config))


def test_a_cap_in_the_configuration_of_the_text_part_is_seen() -> None:
    model = tiny_llama()
    text = SimpleNamespace(final_logit_softcapping=30.0)
    model.config.get_text_config = lambda decoder=None: text
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        install_head(model)


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
