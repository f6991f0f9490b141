"""Samples repeat, stop and keep their prompts; the sequence KL is the mean log-ratio on them."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from mallowspo_cli.data.tokenize import TokenizedPair
from mallowspo_cli.errors import ModelError
from mallowspo_cli.evaluation.generate import sample_pairs, sequence_kl, stop_ids
from mallowspo_cli.evaluation.statistics import bootstrap_interval
from mallowspo_cli.models.load import load_model
from mallowspo_cli.packing.layout import Layout, collate
from mallowspo_cli.scoring import PairScorer

CPU = torch.device("cpu")
PROMPTS = [np.arange(5, 5 + length, dtype=np.int32) for length in (2, 11, 5, 7, 3, 4, 6, 9, 8, 10)]
MAX_TOKENS = 6


@pytest.fixture(scope="module")
def model(tiny_directory: Path) -> nn.Module:
    return load_model(tiny_directory, torch.float32)


@pytest.fixture(scope="module")
def eager_to_stop(tiny_directory: Path) -> nn.Module:
    """A model that ends its responses early: a constant hidden state pulls to the end token."""
    model = load_model(tiny_directory, torch.float32)
    end = model.generation_config.eos_token_id
    head = nn.Linear(64, model.config.vocab_size)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[end] = 5.0
    model.set_output_embeddings(head)
    return model


def sampled(model: nn.Module, tokenizer, seed: int = 0, prompts=PROMPTS) -> list[TokenizedPair]:
    return sample_pairs(model, tokenizer, prompts, MAX_TOKENS, seed)


def responses(pairs: list[TokenizedPair]) -> list[list[int]]:
    return [r.tolist() for pair in pairs for r in (pair.chosen, pair.rejected)]


def test_the_same_seed_gives_the_same_samples_and_another_others(model, tiny_tokenizer) -> None:
    first = responses(sampled(model, tiny_tokenizer))
    torch.rand(7)
    assert responses(sampled(model, tiny_tokenizer)) == first
    assert responses(sampled(model, tiny_tokenizer, seed=1)) != first


def test_the_global_generator_is_left_alone(model, tiny_tokenizer) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    sampled(model, tiny_tokenizer)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_prompt_comes_back_with_two_responses_of_its_own(model, tiny_tokenizer) -> None:
    pairs = sampled(model, tiny_tokenizer)
    assert [pair.prompt.tolist() for pair in pairs] == [prompt.tolist() for prompt in PROMPTS]
    assert len({pair.pair_id for pair in pairs}) == len(PROMPTS)
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            assert 1 <= len(response) <= MAX_TOKENS
            assert response.dtype == np.int32
    assert any(pair.chosen.tolist() != pair.rejected.tolist() for pair in pairs)


def test_a_response_ends_with_its_first_end_token_or_at_the_limit(
    eager_to_stop, tiny_tokenizer
) -> None:
    end = tiny_tokenizer.eos_token_id
    found = responses(sampled(eager_to_stop, tiny_tokenizer))
    lengths = [len(response) for response in found]
    assert min(lengths) < MAX_TOKENS == max(lengths)
    for response in found:
        assert end not in response[:-1]
        assert response[-1] == end or len(response) == MAX_TOKENS


def test_left_padding_does_not_change_the_distribution(model, tiny_tokenizer) -> None:
    # The frequency of the first token over many samples of a short prompt beside a long one,
    # against its probability when the prompt stands alone.
    short, long = PROMPTS[0], PROMPTS[1]
    with torch.no_grad():
        logits = model(torch.from_numpy(short.astype(np.int64))[None]).logits[0, -1]
    probabilities = logits.softmax(0)
    pairs = sample_pairs(model, tiny_tokenizer, [short, long] * 600, 1, seed=3)
    first = [int(r[0]) for pair in pairs[::2] for r in (pair.chosen, pair.rejected)]
    counts = torch.bincount(torch.tensor(first), minlength=len(probabilities))
    assert counts.sum() == 1200
    for token in probabilities.topk(5).indices.tolist():
        expected = 1200 * probabilities[token].item()
        spread = (expected * (1 - probabilities[token].item())) ** 0.5
        assert counts[token].item() == pytest.approx(expected, abs=4 * spread)


def test_samples_can_be_scored(model, tiny_directory: Path, tiny_tokenizer) -> None:
    scorer = PairScorer(load_model(tiny_directory, torch.float32)).eval()
    scores = scorer(collate(sampled(model, tiny_tokenizer)))
    assert torch.isfinite(scores.chosen_logps).all()
    assert (scores.chosen_logps < 0).all()


def test_the_end_token_is_the_models_else_the_tokenizers(model, tiny_tokenizer) -> None:
    end = tiny_tokenizer.eos_token_id
    assert stop_ids(model, tiny_tokenizer) == [end]
    assert stop_ids(nn.Linear(1, 1), tiny_tokenizer) == [end]
    several = nn.Linear(1, 1)
    several.generation_config = GenerationConfig(eos_token_id=[3, 4])  # type: ignore[assignment]
    assert stop_ids(several, tiny_tokenizer) == [3, 4]


def test_a_model_that_cannot_stop_is_refused() -> None:
    class Tokenizer:
        eos_token_id = None

    with pytest.raises(ModelError, match="names no end-of-sequence token"):
        stop_ids(nn.Linear(1, 1), Tokenizer())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def scorers(tiny_directory: Path) -> tuple[PairScorer, PairScorer]:
    """A policy that has moved from the reference, and the reference."""
    policy, reference = (
        PairScorer(load_model(tiny_directory, torch.float32)).eval() for _ in range(2)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return policy, reference


def test_the_sequence_kl_of_a_model_to_itself_is_zero(scorers, tiny_tokenizer) -> None:
    _, reference = scorers
    samples = sampled(reference.causal_model, tiny_tokenizer)
    found = sequence_kl(reference, reference, samples, CPU, MAX_TOKENS, Layout.shared)
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_the_sequence_kl_is_the_mean_log_ratio_of_the_samples_by_hand(
    scorers, tiny_tokenizer
) -> None:
    policy, reference = scorers
    samples = sampled(policy.causal_model, tiny_tokenizer)
    found = sequence_kl(policy, reference, samples, CPU, MAX_TOKENS, Layout.shared)
    gaps: list[float] = []
    for pair in samples:
        for response in (pair.chosen, pair.rejected):
            total = [0.0, 0.0]
            for index, model in enumerate((policy.causal_model, reference.causal_model)):
                ids = torch.tensor([[*pair.prompt.tolist(), *response.tolist()]])
                with torch.no_grad():
                    logps = model(ids).logits[0, len(pair.prompt) - 1 : -1].log_softmax(1)
                targets = torch.tensor(response.tolist())[:, None]
                total[index] = logps.gather(1, targets).sum().item()
            gaps.append(total[0] - total[1])
    assert found.mean == pytest.approx(np.mean(gaps), rel=1e-4)
    groups = [pair.pair_id for pair in samples for _ in range(2)]
    assert (found.low, found.high) == pytest.approx(bootstrap_interval(gaps, groups), rel=1e-3)
    assert (found.responses, found.max_tokens) == (2 * len(PROMPTS), MAX_TOKENS)
    assert found.mean > 0


def test_the_sequence_kl_of_one_prompt_has_the_interval_of_its_samples(
    scorers, tiny_tokenizer
) -> None:
    policy, reference = scorers
    samples = sampled(policy.causal_model, tiny_tokenizer, prompts=PROMPTS[:1])
    found = sequence_kl(policy, reference, samples, CPU, MAX_TOKENS, Layout.shared)
    assert found.responses == 2
    assert found.low < found.mean < found.high


def test_the_sequence_kl_grows_with_the_distance(scorers, tiny_tokenizer) -> None:
    policy, reference = scorers
    samples = sampled(policy.causal_model, tiny_tokenizer)
    near = sequence_kl(policy, reference, samples, CPU, MAX_TOKENS, Layout.shared).mean

    def farther(batch):
        ours, theirs = policy(batch), reference(batch)
        return type(ours)(
            2 * ours.chosen_logps - theirs.chosen_logps,
            2 * ours.rejected_logps - theirs.rejected_logps,
            ours.chosen_tokens,
            ours.rejected_tokens,
        )

    far = sequence_kl(farther, reference, samples, CPU, MAX_TOKENS, Layout.shared)
    assert far.mean == pytest.approx(2 * near)


def test_the_models_own_taste_in_sampling_is_left_out(model, tiny_tokenizer) -> None:
    # A released repetition penalty would make the samples another distribution's than the policy's.
    changed = copy.deepcopy(model)
    changed.generation_config.update(temperature=0.1, top_k=1, top_p=0.1, min_p=0.9, typical_p=0.1)
    changed.generation_config.update(repetition_penalty=9.0, no_repeat_ngram_size=1)
    released = changed.generation_config.to_dict()
    prompts = [np.arange(5, dtype=np.int32), np.arange(9, dtype=np.int32)]
    found, expected = (
        [
            (s.chosen.tolist(), s.rejected.tolist())
            for s in sample_pairs(m, tiny_tokenizer, prompts, 12, 5)
        ]
        for m in (changed, model)
    )
    assert found == expected
    assert changed.generation_config.to_dict() == released
