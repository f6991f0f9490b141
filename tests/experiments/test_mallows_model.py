"""The Mallows model: samples against exact probabilities, marginals against enumeration."""

from itertools import permutations

import numpy as np
import pytest
import torch

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.experiments.mallows_model import (
    pair_marginals,
    preference_counts,
    sample_rankings,
    spearman_rankings,
)
from mallowspo_cli.objectives.links import kendall_log_link, logistic_log_link

PHIS = (0.05, 0.3, np.exp(-0.5), 0.9, 0.999999)


def all_ranks(num_items: int) -> np.ndarray:
    return np.asarray(list(permutations(range(num_items))))


def inversions(ranks: np.ndarray) -> np.ndarray:
    """(N,) pairs that stand against the central order, of (N, n) ranks."""
    first, second = np.triu_indices(ranks.shape[1], 1)
    return (ranks[:, first] > ranks[:, second]).sum(axis=1)


def probabilities(distances: np.ndarray, theta: float) -> np.ndarray:
    odds = np.exp(-theta * distances)
    return odds / odds.sum()


def frequencies(ranks: np.ndarray) -> np.ndarray:
    """(n!,) share of each ranking, in the order of `all_ranks`."""
    found = {tuple(row): 0 for row in all_ranks(ranks.shape[1]).tolist()}
    for row in ranks.tolist():
        found[tuple(row)] += 1
    return np.asarray(list(found.values())) / len(ranks)


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("num_items", [2, 3, 4, 5])
def test_kendall_marginals_in_closed_form_are_those_of_all_rankings(num_items: int, phi: float):
    theta = -np.log(phi)
    ranks = all_ranks(num_items)
    before = (ranks[:, :, None] < ranks[:, None, :]).astype(float)
    summed = np.einsum("r,rij->ij", probabilities(inversions(ranks), theta), before)
    assert pair_marginals("kendall", theta, num_items) == pytest.approx(summed, abs=1e-12)


@pytest.mark.parametrize("distance", ["kendall", "spearman"])
@pytest.mark.parametrize("phi", [0.3, 0.9])
def test_each_ranking_is_drawn_as_often_as_its_probability_says(distance: str, phi: float):
    theta, size = -np.log(phi), 20000
    drawn = sample_rankings(distance, theta, 4, size, np.random.default_rng(0))
    ranks = all_ranks(4)
    squares = ((ranks - np.arange(4)) ** 2).sum(axis=1)
    exact = probabilities(inversions(ranks) if distance == "kendall" else squares, theta)
    # Five standard errors: 24 rankings at once leave that band once in 70,000 times.
    band = 5 * np.sqrt(exact * (1 - exact) / size) + 1 / size
    assert (np.abs(frequencies(drawn) - exact) < band).all()


@pytest.mark.parametrize("distance", ["kendall", "spearman"])
def test_pair_frequencies_are_the_marginals(distance: str):
    theta, size = -np.log(0.6), 20000
    drawn = sample_rankings(distance, theta, 5, size, np.random.default_rng(1))
    found = (drawn[:, :, None] < drawn[:, None, :]).mean(axis=0)
    exact = pair_marginals(distance, theta, 5)
    assert (np.abs(found - exact) < 5 * np.sqrt(exact * (1 - exact) / size) + 1e-12).all()
    assert exact + exact.T == pytest.approx(1 - np.eye(5))


def test_spearman_odds_are_those_of_independent_comparisons_kept_transitive():
    # phi^d is proportional to the product over i < j, i before j, of phi^(-2 (j - i)).
    theta = 0.37
    ranks, exact = spearman_rankings(theta, 5)
    first, second = np.triu_indices(5, 1)
    kept = ranks[:, first] < ranks[:, second]
    odds = np.exp(theta * 2 * ((second - first) * kept).sum(axis=1))
    assert exact == pytest.approx(odds / odds.sum(), rel=1e-12)


def test_spearman_marginal_is_the_theta_link_for_two_items_alone():
    theta = -np.log(0.6)
    link = torch.tensor([1.0, 2.0], dtype=torch.float64)
    link = logistic_log_link(link, torch.full_like(link, theta)).exp().numpy()
    assert pair_marginals("spearman", theta, 2)[0, 1] == pytest.approx(link[0], rel=1e-12)
    three = pair_marginals("spearman", theta, 3)
    assert three[0, 1] > link[0] + 0.01
    assert three[0, 2] > link[1] + 0.01


def test_kendall_marginal_is_the_phi_link_at_the_rank_gap():
    theta = -np.log(0.3)
    gap = torch.tensor([3.0], dtype=torch.float64)
    link = kendall_log_link(gap, torch.full_like(gap, theta)).exp().item()
    assert pair_marginals("kendall", theta, 6)[1, 4] == pytest.approx(link)


def test_full_dispersion_is_the_uniform_law():
    for distance in ("kendall", "spearman"):
        assert pair_marginals(distance, 0.0, 4)[0, 3] == pytest.approx(0.5)
        drawn = sample_rankings(distance, 0.0, 3, 6000, np.random.default_rng(2))
        assert frequencies(drawn) == pytest.approx(np.full(6, 1 / 6), abs=0.025)


def test_a_smaller_sample_is_the_beginning_of_a_larger_one():
    for distance in ("kendall", "spearman"):
        larger = sample_rankings(distance, 0.5, 5, 50, np.random.default_rng(3))
        smaller = sample_rankings(distance, 0.5, 5, 20, np.random.default_rng(3))
        assert (larger[:20] == smaller).all()
        counts = preference_counts(distance, 0.5, 5, (20, 50), (3,))
        assert (counts == preference_counts(distance, 0.5, 5, (20, 50), (3,))).all()
        assert counts.sum(axis=(1, 2)).tolist() == [20, 50]
        assert (counts[1] >= counts[0]).all()
        assert (counts[0] == preference_counts(distance, 0.5, 5, (20,), (3,))[0]).all()


def test_preferences_follow_the_marginals():
    theta, size = -np.log(0.3), 20000
    (counts,) = preference_counts("kendall", theta, 4, (size,), (4,))
    pairs = counts + counts.T
    exact = pair_marginals("kendall", theta, 4)
    first, second = np.triu_indices(4, 1)
    share = counts[first, second] / pairs[first, second]
    expected = exact[first, second]
    band = 5 * np.sqrt(expected * (1 - expected) / pairs[first, second])
    assert (np.abs(share - expected) < band).all()
    assert pairs[first, second] == pytest.approx(np.full(6, size / 6), rel=0.1)


def test_what_cannot_be_drawn_is_refused_in_one_line():
    with pytest.raises(RecipeError, match=r"^found arms=8 with Spearman.*distances=kendall\.$"):
        sample_rankings("spearman", 1.0, 8, 1, np.random.default_rng(0))
    with pytest.raises(RecipeError, match="Did you mean 'kendall'"):
        pair_marginals("kendal", 1.0, 3)
    assert sample_rankings("kendall", 1.0, 12, 3, np.random.default_rng(0)).shape == (3, 12)
