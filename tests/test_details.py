"""Details of scores are sums over the plain model's tokens, however the pairs are packed."""

import copy
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mallowspo_cli.data.table import TokenizedPair
from mallowspo_cli.models import head as head_module
from mallowspo_cli.objectives.base import PairScores, ReferenceScores, registered
from mallowspo_cli.objectives.details import DetailedScores
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.packing.layout import Layout, collate
from mallowspo_cli.scoring import PairScorer, scorer_for
from tests.token_level import LENGTHS, detailed, responses, tiny_model, token_pairs

VOCABULARY = 262


def distant(count: int) -> ReferenceScores:
    """Scores of a reference that likes every response less."""
    values, tokens = torch.full((count,), -30.0, dtype=torch.float64), torch.ones(count)
    return ReferenceScores(values, values, tokens, tokens, tokens)


@pytest.fixture(scope="module")
def model(tiny_directory: Path) -> nn.Module:
    return tiny_model(tiny_directory)


@pytest.fixture(scope="module")
def scorer(model: nn.Module) -> PairScorer:
    return PairScorer(copy.deepcopy(model))


@pytest.fixture(scope="module")
def padding_scorer(model: nn.Module) -> PairScorer:
    """The same weights behind an attention that takes padded rows."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("sdpa")  # type: ignore[operator]
    return PairScorer(other)


@pytest.fixture(scope="module")
def pairs() -> list[TokenizedPair]:
    return token_pairs()


def columns_of(scores: PairScores) -> list[Tensor]:
    return [getattr(scores, field.name) for field in fields(scores)]


def assert_same(found: PairScores, expected: PairScores) -> None:
    assert type(found) is type(expected)
    torch.testing.assert_close(columns_of(found), columns_of(expected), rtol=1e-9, atol=0)


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("chunk_rows", [1, 5, 512])
def test_details_are_sums_over_the_plain_models_tokens(
    layout: Layout,
    chunk_rows: int,
    scorer: PairScorer,
    padding_scorer: PairScorer,
    model: nn.Module,
    pairs: list[TokenizedPair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", {"cpu": chunk_rows * VOCABULARY * 8})
    scorers = {Layout.shared: scorer, Layout.padded: padding_scorer}
    assert scorers[layout].layout is layout
    with torch.no_grad():
        found = scorers[layout](collate(pairs, layout), details=True)
        expected = detailed(responses(model, pairs))
    assert_same(found, expected)
    # Distributions that are neither flat nor certain, or this would say little.
    means = (expected.chosen_log_collisions / expected.chosen_tokens).exp()
    assert ((means > 2 / VOCABULARY) & (means < 0.5)).all()


def test_details_depend_neither_on_the_pack_nor_on_the_place(
    scorer: PairScorer, pairs: list[TokenizedPair]
) -> None:
    with torch.no_grad():
        alone = [scorer(collate([pair]), details=True) for pair in pairs]

    @settings(max_examples=15)
    @given(st.lists(st.integers(0, len(LENGTHS) - 1), min_size=1, max_size=6))
    def same(order: list[int]) -> None:
        with torch.no_grad():
            found = scorer(collate([pairs[index] for index in order]), details=True)
        rows = zip(*(columns_of(alone[index]) for index in order), strict=True)
        assert_same(found, DetailedScores(*(torch.cat(values) for values in rows)))

    same()


def test_the_common_part_of_the_shorter_response_is_all_of_it(
    scorer: PairScorer, pairs: list[TokenizedPair]
) -> None:
    found = scorer(collate(pairs), details=True)
    chosen, rejected = torch.tensor(LENGTHS)[:, 1:].T
    whole = found.chosen_common_logps == found.chosen_logps
    assert torch.equal(whole, chosen <= rejected)
    whole = found.rejected_common_logps == found.rejected_logps
    assert torch.equal(whole, rejected <= chosen)


def test_gradients_flow_through_the_common_part_and_through_no_collision(
    scorer: PairScorer, model: nn.Module, pairs: list[TokenizedPair]
) -> None:
    def contrast(scores: DetailedScores) -> Tensor:
        weights = torch.arange(1, len(LENGTHS) + 1)
        gaps = scores.chosen_common_logps - 0.3 * scores.rejected_common_logps
        return (weights * (gaps + 0.1 * scores.chosen_logps)).sum()

    plain, packed = copy.deepcopy(model), copy.deepcopy(scorer)
    found = packed(collate(pairs), details=True)
    assert not found.chosen_log_collisions.requires_grad
    contrast(detailed(responses(plain, pairs))).backward()
    contrast(found).backward()
    expected = dict(plain.named_parameters())
    for name, parameter in packed.model.named_parameters():
        ours, theirs = parameter.grad, expected[name].grad
        assert ours is not None
        assert theirs is not None
        # transformers' RMSNorm computes in float32, whose rounding is what is left.
        assert (ours - theirs).norm() < 1e-6 * theirs.norm(), name


def test_asking_for_details_changes_neither_scores_nor_entropies(
    scorer: PairScorer, pairs: list[TokenizedPair]
) -> None:
    with torch.no_grad():
        plain, entropies = scorer(collate(pairs), entropy=True)
        found, beside = scorer(collate(pairs), entropy=True, details=True)
    assert type(plain) is PairScores
    for field in fields(PairScores):
        assert torch.equal(getattr(found, field.name), getattr(plain, field.name))
    for field in fields(entropies):
        assert torch.equal(getattr(beside, field.name), getattr(entropies, field.name))


@pytest.mark.parametrize("name", ["wpo", "ld_dpo", "bco", "beta_dpo"])
def test_a_pairs_loss_and_gradient_do_not_depend_on_its_pack(
    name: str, scorer: PairScorer, pairs: list[TokenizedPair]
) -> None:
    running = {"shift": -0.3, "steps": 2.0, "gap": 1.5, "usual_gap": 0.5}
    objective = registered()[name]().at_step(running)
    score = scorer_for(objective, scorer)
    parameters = list(scorer.parameters())

    def losses_and_gradient(packs: list[list[TokenizedPair]]) -> list[Tensor]:
        outputs = [objective(score(collate(pack)), distant(len(pack))) for pack in packs]
        losses = torch.cat([output.losses for output in outputs])
        return [losses, *torch.autograd.grad(losses.sum(), parameters)]

    together = losses_and_gradient([pairs])
    alone = losses_and_gradient([[pair] for pair in pairs])
    torch.testing.assert_close(together[0], alone[0], rtol=1e-9, atol=1e-14)
    for found, expected in zip(together[1:], alone[1:], strict=True):
        assert (found - expected).norm() < 1e-6 * expected.norm()


def test_a_scorer_is_asked_for_details_by_the_objective_that_needs_them(
    scorer: PairScorer, pairs: list[TokenizedPair]
) -> None:
    class Curious(DPO):
        @property
        def needs_details(self) -> bool:
            return True

    assert scorer_for(DPO(), scorer) is scorer
    with torch.no_grad():
        assert type(scorer_for(Curious(), scorer)(collate(pairs))) is DetailedScores
