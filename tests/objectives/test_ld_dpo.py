"""LD-DPO: the split at the common length, and what stands for the reference's."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mallowspo_cli.data.table import TokenizedPair
from mallowspo_cli.errors import RecipeError
from mallowspo_cli.objectives.base import ReferenceScores
from mallowspo_cli.objectives.details import DetailedScores
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.ld_dpo import LDDPO
from mallowspo_cli.packing.layout import collate
from mallowspo_cli.scoring import PairScorer
from tests.token_level import (
    LENGTHS,
    Response,
    detailed,
    responses,
    tiny_model,
    token_pairs,
    whole_sums,
)

WEIGHTS = torch.tensor([0.4, 1.0, 1.7, 0.8, 1.2], dtype=torch.float64)
Pairs = list[tuple[Response, Response]]


@pytest.fixture(scope="module")
def model(tiny_directory: Path) -> nn.Module:
    return tiny_model(tiny_directory, seed=1)


@pytest.fixture(scope="module")
def frozen(tiny_directory: Path) -> Pairs:
    """The reference's tokens, which a store does not know."""
    with torch.no_grad():
        return responses(tiny_model(tiny_directory), token_pairs())


@pytest.fixture(scope="module")
def reference(frozen: Pairs) -> ReferenceScores:
    return whole_sums(frozen, WEIGHTS)


def silent(response: Response) -> Response:
    """Its tokens with log-probs of 0."""
    return Response(0 * response.logps, response.squares)


def split_sum(logps: Tensor, common: int, alpha: float) -> Tensor:
    """A weight of 1 for each of the common tokens and alpha for those behind, as TRL's masks."""
    common_mask = (torch.arange(len(logps)) < common).double()
    return (logps * (common_mask + alpha * (1 - common_mask))).sum()


def split_gaps(policy: Pairs, frozen: Pairs, alpha: float) -> Tensor:
    """(B,) log-ratio gaps with policy and reference split alike: TRL's `ld_alpha`."""
    gaps = []
    for ours, theirs in zip(policy, frozen, strict=True):
        common = min(len(response.logps) for response in ours)
        chosen, rejected = (
            split_sum(p.logps, common, alpha) - split_sum(r.logps, common, alpha)
            for p, r in zip(ours, theirs, strict=True)
        )
        gaps.append(chosen - rejected)
    return torch.stack(gaps)


def logistic(margins: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-margins))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_policys_log_probs_count_alpha_beyond_the_common_length(
    alpha: float, model: nn.Module, reference: ReferenceScores
) -> None:
    """With a reference of zeros nothing else is in the loss."""
    nothing = torch.zeros(len(LENGTHS), dtype=torch.float64)
    zeros = replace(reference, chosen_logps=nothing, rejected_logps=nothing)
    with torch.no_grad():
        policy = responses(model, token_pairs())
        scores = PairScorer(model)(collate(token_pairs()), details=True)
        output = LDDPO(beta=0.2, excess_weight=alpha)(scores, zeros)
    still = [(silent(chosen), silent(rejected)) for chosen, rejected in policy]
    expected = logistic(0.2 * split_gaps(policy, still, alpha))
    torch.testing.assert_close(output.losses, expected, rtol=1e-9, atol=1e-12)


def test_alpha_one_is_dpo(model: nn.Module, reference: ReferenceScores) -> None:
    scores = PairScorer(model)(collate(token_pairs()), details=True)
    found = LDDPO(excess_weight=1.0)(scores, reference)
    expected = DPO()(scores, reference)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.chosen_rewards, expected.chosen_rewards, rtol=1e-9, atol=1e-12)
    gradients = [
        torch.autograd.grad(o.losses.sum(), list(model.parameters()), retain_graph=True)
        for o in (found, expected)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_where_policy_and_reference_are_one_loss_and_gradient_are_those_of_the_exact_split(
    alpha: float, model: nn.Module
) -> None:
    policy = responses(model, token_pairs())
    with torch.no_grad():
        same = responses(model, token_pairs())
    output = LDDPO(beta=0.3, excess_weight=alpha)(detailed(policy), whole_sums(same, WEIGHTS))
    expected = logistic(0.3 * split_gaps(policy, same, alpha))
    torch.testing.assert_close(output.losses, torch.full_like(output.losses, math.log(2)))
    torch.testing.assert_close(output.chosen_rewards, torch.zeros_like(output.chosen_rewards))
    leaves = list(model.parameters())
    found = torch.autograd.grad(output.losses.sum(), leaves, retain_graph=True)
    wanted = torch.autograd.grad(expected.sum(), leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-15)


def test_every_pairs_gradient_has_the_direction_of_the_exact_split(
    model: nn.Module, frozen: Pairs, reference: ReferenceScores
) -> None:
    policy = responses(model, token_pairs())
    losses = LDDPO(excess_weight=0.4)(detailed(policy), reference).losses
    exact = logistic(0.1 * split_gaps(policy, frozen, 0.4))
    leaves = [response.logps for pair in policy for response in pair]
    for index in range(len(LENGTHS)):
        found, wanted = (
            torch.cat(
                torch.autograd.grad(
                    *(values[index], leaves),
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
            for values in (losses, exact)
        )
        cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=0)
        assert cosine == pytest.approx(1, abs=1e-12)


def test_a_change_in_proportion_over_a_response_gives_the_exact_splits_loss(frozen: Pairs) -> None:
    moved = [
        (
            Response(0.8 * chosen.logps, chosen.squares),
            Response(1.3 * rejected.logps, chosen.squares),
        )
        for chosen, rejected in frozen
    ]
    output = LDDPO(excess_weight=0.25)(detailed(moved), whole_sums(frozen, WEIGHTS))
    torch.testing.assert_close(output.losses, logistic(0.1 * split_gaps(moved, frozen, 0.25)))


def worded_pairs() -> list[TokenizedPair]:
    """Responses of 2 to 11 words, kind ones preferred to unkind ones."""
    draw = np.random.default_rng(0)
    kind, unkind = ["yes", "good", "fine", "great"], ["no", "bad", "poor", "wrong"]

    def text(words: list[str], most: int) -> NDArray[np.int32]:
        chosen = " ".join(draw.choice(words, draw.integers(2, most)))
        return np.frombuffer(chosen.encode(), dtype=np.uint8).astype(np.int32)

    prompts = [*kind, *unkind]
    return [
        TokenizedPair(f"{i}", text(prompts, 4), text(kind, 12), text(unkind, 12)) for i in range(16)
    ]


def test_after_training_margins_are_near_those_of_the_exact_split(tiny_directory: Path) -> None:
    """docs/decisions/0014: dividing the sums by tokens, or not at all, would be further off."""
    pairs, scorer = worded_pairs(), PairScorer(tiny_model(tiny_directory))
    with torch.no_grad():
        before = responses(scorer.model, pairs)
    reference = whole_sums(before, torch.ones(len(pairs), dtype=torch.float64))
    optimizer = torch.optim.Adam(scorer.parameters(), lr=5e-5)
    for _ in range(15):
        loss = LDDPO()(scorer(collate(pairs), details=True), reference).losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = scorer(collate(pairs), details=True)
        exact = 0.1 * split_gaps(responses(scorer.model, pairs), before, alpha=0.5)
    output = LDDPO(dispersion=True)(scores, reference)
    common = scores.chosen_tokens.minimum(scores.rejected_tokens)
    # w is 1: the margin that is in the loss.
    offs = {"ours": output.metrics["weighted_margin"] - exact}
    for name, (chosen, rejected) in {
        "by tokens": (common / scores.chosen_tokens, common / scores.rejected_tokens),
        "whole": (1.0, 1.0),
    }.items():
        kept = 0.5 * (1 + chosen) * reference.chosen_logps
        gap = kept - 0.5 * (1 + rejected) * reference.rejected_logps
        ours = 0.5 * (scores.chosen_logps + scores.chosen_common_logps)
        theirs = 0.5 * (scores.rejected_logps + scores.rejected_common_logps)
        offs[name] = 0.1 * (ours - theirs - gap) - exact
    mean_off = {name: float(off.abs().mean()) for name, off in offs.items()}
    assert exact.mean() > 0.5
    assert mean_off["ours"] < 0.05 * float(exact.mean())
    assert 1.5 * mean_off["ours"] < mean_off["by tokens"] < 0.2 * mean_off["whole"]


def test_length_normalised_counts_the_tokens_of_the_excess_alpha_too(
    model: nn.Module, frozen: Pairs, reference: ReferenceScores
) -> None:
    alpha = 0.5
    with torch.no_grad():
        scores = detailed(responses(model, token_pairs()))
    output = LDDPO(beta=1.0, excess_weight=alpha, length_normalised=True)(scores, reference)
    _, chosen, rejected = torch.tensor(LENGTHS, dtype=torch.float64).T
    common = chosen.minimum(rejected)
    means = []
    for side, tokens in (("chosen", chosen), ("rejected", rejected)):
        share = getattr(scores, f"{side}_common_logps") / getattr(scores, f"{side}_logps")
        ratio = getattr(scores, f"{side}_logps") - getattr(reference, f"{side}_logps")
        split = ratio * (share + alpha * (1 - share))
        means.append(split / (common + alpha * (tokens - common)))
    torch.testing.assert_close(output.losses, logistic(means[0] - means[1]))


def test_with_dispersion_w_multiplies_the_rewards_inside(
    model: nn.Module, reference: ReferenceScores
) -> None:
    with torch.no_grad():
        scores = PairScorer(model)(collate(token_pairs()), details=True)
    plain = LDDPO(beta=0.2)(scores, reference)
    output = LDDPO(beta=0.2, dispersion=True)(scores, reference)
    margins = -plain.losses.expm1().log()
    torch.testing.assert_close(output.losses, logistic(WEIGHTS * margins))


@pytest.mark.parametrize("normalised", [False, True])
def test_rewards_are_logged_of_whole_log_ratios(
    normalised: bool, model: nn.Module, reference: ReferenceScores
) -> None:
    with torch.no_grad():
        scores = PairScorer(model)(collate(token_pairs()), details=True)
    knobs = {"beta": 0.2, "length_normalised": normalised}
    found, expected = LDDPO(**knobs)(scores, reference), DPO(**knobs)(scores, reference)
    assert not torch.allclose(found.losses, expected.losses)
    torch.testing.assert_close(found.chosen_rewards, expected.chosen_rewards)
    torch.testing.assert_close(found.rejected_rewards, expected.rejected_rewards)


def test_a_response_that_is_certain_leaves_everything_finite() -> None:
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([4])
    other = torch.tensor([-3.0], dtype=torch.float64)
    scores = DetailedScores(zero, other, tokens, tokens - 2, zero, other, other, other)
    reference = ReferenceScores(other, other, tokens, tokens - 2, torch.ones(1))
    losses = LDDPO()(scores, reference).losses
    assert torch.isfinite(losses).all()
    (gradient,) = torch.autograd.grad(losses.sum(), zero)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_an_alpha_outside_zero_to_one_is_refused(bad: float) -> None:
    with pytest.raises(RecipeError, match=r"objective\.excess_weight="):
        LDDPO(excess_weight=bad)
