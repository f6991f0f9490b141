"""Every family: scores and gradients are those of one response at a time, from all logits."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mallowspo_cli.data.table import TokenizedPair
from mallowspo_cli.errors import ModelError
from mallowspo_cli.models.attention import NAME, obstacle_to_sharing
from mallowspo_cli.models.checkpointing import checkpoint_blocks
from mallowspo_cli.packing.layout import Layout, collate
from mallowspo_cli.plan.memory import peak_memory
from mallowspo_cli.plan.setting import PackSize, Setting
from mallowspo_cli.plan.shapes import ModelShape
from mallowspo_cli.recipe.choices import ActivationCheckpointing, Precision
from mallowspo_cli.scoring import PairScorer
from tests.models.families import FAMILIES, PADDED, SHARED, VOCABULARY, build

LENGTHS = [(9, 12, 5), (1, 1, 3), (14, 8, 17), (5, 2, 1)]
WEIGHTS = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)


@pytest.fixture(scope="module")
def pairs() -> list[TokenizedPair]:
    generator = np.random.default_rng(0)
    return [
        TokenizedPair(
            str(index),
            *(generator.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths),
        )
        for index, lengths in enumerate(LENGTHS)
    ]


@pytest.fixture(autouse=True)
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' eager attention asks for a float32 softmax, also of float64 scores."""
    softmax = nn.functional.softmax

    def in_full(values: Tensor, dim: int, dtype: torch.dtype | None = None, **options: Any):
        return softmax(
            values, dim=dim, dtype=dtype and torch.promote_types(values.dtype, dtype), **options
        )

    monkeypatch.setattr(nn.functional, "softmax", in_full)


def one_at_a_time(model: nn.Module, pairs: Sequence[TokenizedPair]) -> tuple[Tensor, Tensor]:
    """Summed log-probs of the chosen and of the rejected responses, (B,) each."""
    found: dict[str, list[Tensor]] = {"chosen": [], "rejected": []}
    for pair in pairs:
        for side, sums in found.items():
            response = getattr(pair, side)
            ids = torch.from_numpy(np.concatenate([pair.prompt, response])).long()
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            logps = logits.log_softmax(-1)[len(pair.prompt) - 1 : -1]
            sums.append(logps.gather(1, ids[len(pair.prompt) :, None]).sum())
    # Mamba's logits are float32 in every case.
    return torch.stack(found["chosen"]).double(), torch.stack(found["rejected"]).double()


def plain(family: str) -> nn.Module:
    """The model as transformers runs it."""
    # Scaled dot-product attention has no caps.
    return build(family, "eager" if family == "gemma2" else None)


def scorer_of(family: str) -> PairScorer:
    attention = NAME if family in SHARED else None
    return PairScorer(build(family, attention))


def contrast(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Something that pulls on each response with another weight."""
    return (chosen * WEIGHTS - rejected * WEIGHTS.square()).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_of_all_parameters(family: str, pairs: list[TokenizedPair]) -> None:
    model, scorer = plain(family), scorer_of(family)
    chosen, rejected = one_at_a_time(model, pairs)
    scores = scorer(collate(pairs, scorer.layout))
    # A scan over time in float32 is what Mamba has on a CPU.
    tolerance = 1e-6 if family == "mamba" else 1e-10
    torch.testing.assert_close(scores.chosen_logps, chosen, rtol=tolerance, atol=0)
    torch.testing.assert_close(scores.rejected_logps, rejected, rtol=tolerance, atol=0)

    contrast(chosen, rejected).backward()
    contrast(scores.chosen_logps, scores.rejected_logps).backward()
    expected = dict(model.named_parameters())
    for name, parameter in scorer.model.named_parameters():
        assert (parameter.grad is None) == (expected[name].grad is None), name
        if parameter.grad is None:
            continue
        # transformers' RMSNorm computes in float32, whose rounding is what is left.
        difference = (parameter.grad - expected[name].grad).norm()
        assert difference <= 1e-6 * expected[name].grad.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_shared_where_the_architecture_allows_it(family: str) -> None:
    model = build(family, None)
    obstacle = obstacle_to_sharing(type(model), model.config)
    assert (obstacle is None) == (family in SHARED)
    if family in PADDED:
        assert obstacle == f"{type(model).__name__} does not take a registered attention"


def test_layers_that_are_no_attention_and_sinks_are_obstacles() -> None:
    model = build("llama", None)
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert obstacle_to_sharing(type(model), model.config) == (
        "LlamaForCausalLM has layers of linear_attention"
    )
    sinks = build("gpt_oss", "eager", torch.float32)
    assert obstacle_to_sharing(type(sinks), sinks.config) == (
        "GptOssForCausalLM has attention sinks or position biases"
    )
    masks = build("doge", None)
    assert obstacle_to_sharing(type(masks), masks.config) == (
        "DogeForCausalLM masks attention in a way of its own"
    )


def test_a_mask_that_a_model_makes_itself_is_refused(pairs: list[TokenizedPair]) -> None:
    scorer = PairScorer(build("doge", NAME))
    with pytest.raises(ModelError, match="DogeAttention has attention with a mask of its own"):
        scorer(collate(pairs))


@pytest.mark.parametrize("family", ["llama tied", "gemma2", "gpt2"])
@pytest.mark.parametrize("policy", ["selective", "full"])
def test_recomputing_activations_changes_no_bit(
    family: str, policy: str, pairs: list[TokenizedPair]
) -> None:
    gradients = []
    for each in ("none", policy):
        scorer = scorer_of(family)
        checkpoint_blocks(scorer.model, ActivationCheckpointing(each))
        scores = scorer(collate(pairs))
        contrast(scores.chosen_logps, scores.rejected_logps).backward()
        gradients.append({n: p.grad for n, p in scorer.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0, msg=name)


def in_float32(family: str, layout: Layout, pairs: list[TokenizedPair]) -> tuple[Tensor, Tensor]:
    """Log-probs (2 B,) and the whole gradient, in float64."""
    scorer = PairScorer(build(family, NAME if layout is Layout.shared else "sdpa", torch.float32))
    scores = scorer(collate(pairs, layout))
    contrast(scores.chosen_logps, scores.rejected_logps).backward()
    gradient = torch.cat([p.grad.flatten() for p in scorer.parameters()])
    logps = torch.cat([scores.chosen_logps, scores.rejected_logps]).detach()
    return logps.double(), gradient.double()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "phi", "gpt_neox", "gpt2"])
def test_float32_is_as_near_the_truth_as_padded_batches_are(
    family: str, pairs: list[TokenizedPair]
) -> None:
    model = plain(family)
    chosen, rejected = one_at_a_time(model, pairs)
    contrast(chosen, rejected).backward()
    truth = (
        torch.cat([chosen, rejected]).detach(),
        torch.cat([p.grad.flatten() for p in model.parameters()]),
    )
    errors = {
        layout: [
            float((found - true).norm() / true.norm())
            for found, true in zip(in_float32(family, layout, pairs), truth, strict=True)
        ]
        for layout in Layout
    }
    # Where both are at the last bit, one may be exact by chance.
    for ours, padded in zip(errors[Layout.shared], errors[Layout.padded], strict=True):
        assert ours <= 2 * max(padded, 1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_models_own_attention_would_be_wrong_on_the_same_pack(
    family: str, pairs: list[TokenizedPair]
) -> None:
    batch = collate(pairs)
    expected = scorer_of(family)(batch)
    model = plain(family)
    hidden = model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state[0]
    logits = model.get_output_embeddings()(hidden[batch.source_index])
    logps = logits.log_softmax(-1).gather(1, batch.target_ids[:, None]).squeeze(1)
    sums = logps.new_zeros(2 * len(pairs)).index_add(0, batch.response_index, logps)
    # Rejected responses are cut off from their prompts, or see what they must not.
    assert (sums[1::2] - expected.rejected_logps).abs().max() > 0.1


def test_a_model_that_does_not_pass_the_segments_on_is_refused(
    pairs: list[TokenizedPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_of("llama")
    layer = scorer.model.model.layers[1]
    forward: Callable[..., Tensor] = layer.forward

    def forgetful(*args: Any, segments: Any = None, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", forgetful)
    with pytest.raises(ModelError, match="LlamaAttention does not pass its arguments on"):
        scorer(collate(pairs))


def test_a_window_that_is_in_the_mask_alone_is_kept(pairs: list[TokenizedPair]) -> None:
    # Its experts are drawn at random in training.
    scores = PairScorer(build("phimoe", NAME).eval())(collate(pairs))
    chosen, rejected = one_at_a_time(build("phimoe", None).eval(), pairs)
    torch.testing.assert_close(scores.chosen_logps, chosen, rtol=1e-10, atol=0)
    torch.testing.assert_close(scores.rejected_logps, rejected, rtol=1e-10, atol=0)


def test_a_shared_pack_is_refused_by_a_model_that_pads(pairs: list[TokenizedPair]) -> None:
    with pytest.raises(ValueError, match="a pack of shared prompts"):
        scorer_of("bloom")(collate(pairs, Layout.shared))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_sampling_is_that_of_the_models_own_attention(family: str) -> None:
    prompts = torch.tensor([[0, 0, 5, 9, 11], [7, 3, 20, 31, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = [
        model.eval().generate(
            prompts, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        for model in (build(family, NAME), plain(family))
    ]
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_memory_of_a_step_can_be_foreseen(family: str) -> None:
    model = build(family, None)
    shape = ModelShape.of(model)
    assert shape.parameters == shape.trained == sum(p.numel() for p in model.parameters())
    assert len(shape.blocks) == 2
    setting = Setting(Precision.fp32, cpu=True)
    peaks = [
        peak_memory(shape, setting, PackSize.of([lengths] * 8), ActivationCheckpointing.none).peak
        for lengths in ((20, 30, 40), (40, 60, 80))
    ]
    assert 16 * shape.parameters < peaks[0] < peaks[1] < 16 * shape.parameters + 2**27
