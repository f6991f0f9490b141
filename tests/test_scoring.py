"""Scores are those of the plain model on each pair alone, however the pairs are packed."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mallowspo_cli.data.pairs import Message, PreferencePair
from mallowspo_cli.data.tokenize import TokenizedPair, tokenize_pairs
from mallowspo_cli.errors import ModelError
from mallowspo_cli.models import head as head_module
from mallowspo_cli.models.load import add_lora, load_model
from mallowspo_cli.objectives.base import PairEntropies, PairScores
from mallowspo_cli.packing.layout import Layout, collate
from mallowspo_cli.recipe.schema import DatasetConfig, LoraConfig
from mallowspo_cli.scoring import PairScorer
from tests.conftest import pair_rows

NUM_PAIRS = 7


@pytest.fixture(scope="module")
def model(tiny_directory: Path) -> nn.Module:
    """The plain model in float64, as transformers loads it."""
    return load_model(tiny_directory, torch.float64).eval()


@pytest.fixture(scope="module")
def scorer(model: nn.Module) -> PairScorer:
    """Another copy of the model, as a scorer."""
    return PairScorer(copy.deepcopy(model))


@pytest.fixture(scope="module")
def pairs(tiny_tokenizer) -> list[TokenizedPair]:
    """Pairs of different lengths, one of them with responses of one token."""
    made = [
        PreferencePair(
            (Message("user", row["prompt"]),),
            Message("assistant", row["chosen"]),
            Message("assistant", row["rejected"]),
            "row",
        )
        for row in pair_rows(NUM_PAIRS - 1)
    ]
    found = list(tokenize_pairs(made, tiny_tokenizer, DatasetConfig()))
    one_token = [np.array(ids, dtype=np.int32) for ids in ([256, 260], [65], [66])]
    return [*found, TokenizedPair("one token", *one_token)]


def by_definition(
    model: nn.Module, pairs: Sequence[TokenizedPair]
) -> tuple[PairScores, PairEntropies]:
    """One response at a time, without padding, from all logits of the plain model."""
    logps, counts, entropies, firsts = [], [], [], []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(np.concatenate([pair.prompt, response])).long()
            logits = model(input_ids=ids[None]).logits[0]
            predicted = logits[len(pair.prompt) - 1 : -1].log_softmax(-1)
            targets = ids[len(pair.prompt) :, None]
            entropy = -(predicted.exp() * predicted).sum(-1)
            logps.append(predicted.gather(1, targets).sum())
            counts.append(torch.tensor(len(response)))
            entropies.append(entropy.sum())
            firsts.append(entropy[0])

    def split(values: list[Tensor]) -> tuple[Tensor, Tensor]:
        return torch.stack(values[0::2]), torch.stack(values[1::2])

    return PairScores(*split(logps), *split(counts)), PairEntropies(
        *split(entropies), *split(firsts)
    )


def fields_of(scores: PairScores | PairEntropies) -> list[Tensor]:
    return [getattr(scores, name) for name in type(scores).__dataclass_fields__]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_log_probs_and_entropies_are_those_of_the_plain_models_logits(
    scorer: PairScorer, model: nn.Module, pairs: list[TokenizedPair]
) -> None:
    with torch.no_grad():
        scores, entropies = scorer(collate(pairs), entropy=True)
        expected_scores, expected_entropies = by_definition(model, pairs)
    assert_same(fields_of(scores), fields_of(expected_scores))
    assert_same(fields_of(entropies), fields_of(expected_entropies))
    # Distributions that are neither flat nor certain, or this would say little.
    means = entropies.chosen_entropy / scores.chosen_tokens
    assert ((means > 0.2) & (means < 5)).all()


def test_asking_for_entropies_changes_no_score(
    scorer: PairScorer, pairs: list[TokenizedPair]
) -> None:
    with torch.no_grad():
        alone, (beside, _) = scorer(collate(pairs)), scorer(collate(pairs), entropy=True)
    torch.testing.assert_close(fields_of(alone), fields_of(beside), rtol=0, atol=0)


def test_a_pairs_scores_depend_neither_on_its_pack_nor_on_its_place(
    scorer: PairScorer, pairs: list[TokenizedPair]
) -> None:
    with torch.no_grad():
        alone = [scorer(collate([pair]), entropy=True) for pair in pairs]

    @settings(max_examples=15)
    @given(st.lists(st.integers(0, NUM_PAIRS - 1), min_size=1, max_size=6))
    def same(order: list[int]) -> None:
        with torch.no_grad():
            found = scorer(collate([pairs[index] for index in order]), entropy=True)
        for part in (0, 1):
            expected = [fields_of(alone[index][part]) for index in order]
            columns = [torch.cat(values) for values in zip(*expected, strict=True)]
            assert_same(fields_of(found[part]), columns)

    same()


def test_what_pads_is_never_seen(scorer: PairScorer, pairs: list[TokenizedPair]) -> None:
    found = []
    with torch.no_grad():
        for pad_id in (0, 258, 100):
            scores, entropies = scorer(collate(pairs, Layout.padded, pad_id), entropy=True)
            found.append(fields_of(scores) + fields_of(entropies))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("chunk_rows", [1, 5, 512])
def test_scores_do_not_depend_on_the_heads_chunks(
    chunk_rows: int,
    scorer: PairScorer,
    pairs: list[TokenizedPair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with torch.no_grad():
        expected = scorer(collate(pairs), entropy=True)
        monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": chunk_rows * 262 * 8})
        found = scorer(collate(pairs), entropy=True)
    for part in (0, 1):
        assert_same(fields_of(found[part]), fields_of(expected[part]))


def contrast(scores: PairScores) -> Tensor:
    """Something that pulls on each response with another weight."""
    weights = torch.arange(1, len(scores.chosen_logps) + 1)
    gaps = scores.chosen_logps / scores.chosen_tokens - 0.3 * scores.rejected_logps
    return (weights * gaps).sum()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_all_parameters_are_those_of_one_pair_at_a_time(
    checkpointing: bool, model: nn.Module, pairs: list[TokenizedPair], monkeypatch
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": 7 * 262 * 8})
    plain, packed = copy.deepcopy(model), copy.deepcopy(model).train()
    if checkpointing:
        packed.activation_checkpointing_enable()
    contrast(by_definition(plain, pairs)[0]).backward()
    contrast(PairScorer(packed)(collate(pairs))).backward()
    expected = dict(plain.named_parameters())
    assert all(parameter.grad is not None for parameter in expected.values())
    for name, parameter in packed.named_parameters():
        # transformers' RMSNorm computes in float32, whose rounding is what is left.
        difference = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert difference < 1e-6, name


def test_scores_carry_gradients_and_entropies_none(
    scorer: PairScorer, pairs: list[TokenizedPair]
) -> None:
    scores, entropies = scorer(collate(pairs), entropy=True)
    assert scores.chosen_logps.requires_grad
    assert scores.rejected_logps.requires_grad
    assert not any(values.requires_grad for values in fields_of(entropies))


def test_scores_are_float32_for_a_bfloat16_model(
    tiny_directory: Path, pairs: list[TokenizedPair]
) -> None:
    half = PairScorer(load_model(tiny_directory, torch.bfloat16))
    with torch.no_grad():
        scores, entropies = half(collate(pairs), entropy=True)
    for values in (scores.chosen_logps, scores.rejected_logps, *fields_of(entropies)):
        assert values.dtype == torch.float32


def test_the_scorer_names_the_models_vocabulary_and_configuration(
    scorer: PairScorer, model: nn.Module
) -> None:
    assert scorer.vocab_size == model.config.vocab_size == 262
    assert scorer.config is scorer.model.config


def test_adapters_that_are_fresh_change_no_score_and_take_all_gradients(
    model: nn.Module, scorer: PairScorer, pairs: list[TokenizedPair]
) -> None:
    adapted = PairScorer(add_lora(copy.deepcopy(model), LoraConfig(rank=2), seed=0))
    assert adapted.causal_model.config.model_type == "llama"
    assert adapted.vocab_size == 262
    found = adapted(collate(pairs))
    with torch.no_grad():
        assert_same([found.chosen_logps.detach()], [scorer(collate(pairs)).chosen_logps])
    contrast(found).backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


def test_a_model_that_cannot_be_scored_is_refused_when_the_scorer_is_made(
    model: nn.Module,
) -> None:
    scaled = copy.deepcopy(model)
    scaled.config.logits_scaling = 4.0
    with pytest.raises(ModelError, match=r"type llama change their logits by logits_scaling=4\.0"):
        PairScorer(scaled)
