"""WPO: its weights from single tokens, its arithmetic, its gradient."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.objectives.base import PairScores, ReferenceScores
from mallowspo_cli.objectives.details import DetailedScores
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.mallows import MallowsTheta
from mallowspo_cli.objectives.wpo import WPO
from mallowspo_cli.packing.layout import collate
from mallowspo_cli.scoring import PairScorer
from tests.token_level import Response, responses, tiny_model, token_pairs, whole_sums

WEIGHTS = torch.tensor([0.4, 1.0, 1.7, 0.8, 1.2], dtype=torch.float64)
"""w(x) of each pair."""


@pytest.fixture(scope="module")
def policy(tiny_directory: Path) -> list[tuple[Response, Response]]:
    return responses(tiny_model(tiny_directory, seed=1), token_pairs())


@pytest.fixture(scope="module")
def reference(tiny_directory: Path) -> ReferenceScores:
    with torch.no_grad():
        return whole_sums(responses(tiny_model(tiny_directory), token_pairs()), WEIGHTS)


@pytest.fixture(scope="module")
def scores(tiny_directory: Path) -> DetailedScores:
    """The policy's, by the scorer from a pack."""
    return PairScorer(tiny_model(tiny_directory, seed=1))(collate(token_pairs()), details=True)


def alignment(response: Response) -> Tensor:
    """exp of the mean over tokens of log p(y_t) - log sum_v p_t(v)^2."""
    return (response.logps - response.squares).mean().exp().detach()


def by_tokens(
    policy: list[tuple[Response, Response]], reference: ReferenceScores, bound: float, beta: float
) -> Tensor:
    """Losses of a loop over pairs: the form with which TRL's `use_weighting` agrees, unbounded."""
    losses = []
    for index, (chosen, rejected) in enumerate(policy):
        gap = chosen.logps.sum() - reference.chosen_logps[index]
        gap = gap - rejected.logps.sum() + reference.rejected_logps[index]
        weight = torch.clamp(alignment(chosen) * alignment(rejected), max=bound)
        losses.append(weight * torch.log1p(torch.exp(-beta * gap)))
    return torch.stack(losses)


@pytest.mark.parametrize("bound", [1.0, 1e-3, math.inf])
def test_losses_are_those_of_single_tokens(
    bound: float,
    policy: list[tuple[Response, Response]],
    scores: DetailedScores,
    reference: ReferenceScores,
) -> None:
    found = WPO(beta=0.2, largest_weight=bound)(scores, reference)
    expected = by_tokens(policy, reference, bound, beta=0.2)
    torch.testing.assert_close(found.losses, expected, rtol=1e-9, atol=0)
    plain = DPO(beta=0.2)(scores, reference)
    torch.testing.assert_close(found.losses, plain.losses * found.metrics["pair_weight"])
    assert torch.equal(found.chosen_rewards, plain.chosen_rewards)
    assert torch.equal(found.rejected_rewards, plain.rejected_rewards)


def test_the_weights_differ_between_pairs_and_some_reach_the_bound(
    policy: list[tuple[Response, Response]], scores: DetailedScores, reference: ReferenceScores
) -> None:
    free = WPO(largest_weight=math.inf)(scores, reference).metrics["pair_weight"]
    expected = torch.stack([alignment(chosen) * alignment(rejected) for chosen, rejected in policy])
    torch.testing.assert_close(free, expected, rtol=1e-9, atol=0)
    assert free.max() / free.min() > 3
    bound = float(free.median())
    bounded = WPO(largest_weight=bound)(scores, reference).metrics["pair_weight"]
    torch.testing.assert_close(bounded, free.clamp(max=bound))


def test_a_response_from_a_flat_distribution_has_weight_one() -> None:
    tokens, words = torch.tensor([4, 7]), 50
    logps = -tokens * math.log(words)
    scores = DetailedScores(logps, logps, tokens, tokens, logps, logps, logps, logps)
    reference = ReferenceScores(logps, logps, tokens, tokens, torch.ones(2))
    output = WPO()(scores, reference)
    torch.testing.assert_close(output.metrics["pair_weight"], torch.ones(2))
    torch.testing.assert_close(output.losses, torch.full((2,), math.log(2)))


def test_the_weight_counts_without_a_gradient(reference: ReferenceScores) -> None:
    tokens = torch.tensor([3, 8, 12, 1, 1])
    chosen = (-2.0 * tokens).double().requires_grad_()
    common = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    other = (-1.0 * tokens).double()
    policy = DetailedScores(chosen, other, tokens, tokens, common, common, 0.7 * other, 0.9 * other)
    output = WPO()(policy, reference)
    assert not output.metrics["pair_weight"].requires_grad
    (found,) = torch.autograd.grad(output.losses.sum(), chosen)
    plain = DPO()(PairScores(chosen, other, tokens, tokens), reference)
    (expected,) = torch.autograd.grad(plain.losses.sum(), chosen)
    torch.testing.assert_close(found, output.metrics["pair_weight"] * expected)


def test_with_dispersion_w_multiplies_the_rewards_inside(
    scores: DetailedScores, reference: ReferenceScores
) -> None:
    objective = WPO(dispersion=True)
    assert objective.needs_dispersion
    assert not WPO().needs_dispersion
    output = objective(scores, reference)
    inside = MallowsTheta(beta=0.1)(scores, reference).losses
    torch.testing.assert_close(output.losses, output.metrics["pair_weight"] * inside)
    torch.testing.assert_close(output.metrics["weight"], WEIGHTS)


def test_scores_without_details_are_refused(
    scores: DetailedScores, reference: ReferenceScores
) -> None:
    plain = PairScores(*(vars(scores)[name] for name in PairScores.__dataclass_fields__))
    with pytest.raises(TypeError, match="WPO needs DetailedScores, found PairScores"):
        WPO()(plain, reference)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_a_bound_that_is_not_above_zero_is_refused(bad: float) -> None:
    with pytest.raises(RecipeError, match=r"objective\.largest_weight="):
        WPO(largest_weight=bad)
