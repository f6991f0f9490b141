"""The bandits' solver: against plain training, identities of the methods, ties and no minimum."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mallowspo_cli.experiments.bandit.methods import METHODS, objective
from mallowspo_cli.experiments.bandit.one_prompt import arm_pairs, without_optimum
from mallowspo_cli.experiments.bandit.outcomes import outcomes
from mallowspo_cli.experiments.bandit.solver import (
    Problem,
    derivatives,
    first_step,
    pair_losses,
    solve,
)
from mallowspo_cli.experiments.mallows_model import pair_marginals
from mallowspo_cli.objectives import PairScores, ReferenceScores
from mallowspo_cli.objectives.mallows import Link, MallowsPhi
from tests.experiments.bandit_problems import problem, some_counts


def trained(method: str, given: Problem, steps: int) -> torch.Tensor:
    """Plain gradient descent on the mean loss from the reference, beta 1, the rate falling to 0."""
    parameters = torch.zeros(len(given.share), given.design.shape[-1], dtype=torch.float64)
    loss = objective(method, 1.0)
    _, curve = derivatives(loss, given.gaps(parameters), given.neg_log_phi, second=True)
    steepest = torch.linalg.eigvalsh(given.curvature(given.share * curve))[:, -1:]
    for step in range(steps):
        slope, _ = derivatives(loss, given.gaps(parameters), given.neg_log_phi)
        rate = (1 - step / steps) ** 1.5 / steepest
        parameters = parameters - rate * given.pull(given.share * slope)
    return parameters


@pytest.mark.parametrize("method", METHODS)
def test_a_gap_has_the_loss_of_the_arms_log_probs(method: str):
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(6, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    reference = torch.full_like(logps, 1 / 5).log()
    ones, theta = torch.ones(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.1
    expected = objective(method, 0.7)(
        PairScores(logps[:, 1], logps[:, 3], ones, ones),
        ReferenceScores(reference[:, 1], reference[:, 3], ones, ones, theta),
    ).losses
    gaps = logps[:, 1] - logps[:, 3]
    assert pair_losses(objective(method, 0.7), gaps, theta) == pytest.approx(expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_solver_ends_where_long_plain_training_ends(method: str):
    agreed, disputed = (problem(some_counts(phi, seeds=2), -np.log(phi)) for phi in (0.3, 0.9))
    both = [torch.cat([getattr(one, key) for one in (agreed, disputed)]) for key in PARTS]
    given = Problem(agreed.design, *both)
    found = solve(objective(method, 1.0), given)
    assert trained(method, given, 500) == pytest.approx(found, abs=5e-3)
    assert (found.abs().amax(-1) > 0.05).all()


PARTS = ("share", "neg_log_phi", "budget")


def test_training_with_the_exact_kendall_link_rests_in_a_tie():
    # Between 1 - g(0+) and g(0+) = 0.542 the slope points to 0 from both sides.
    share = np.asarray([[[0.0, 0.53], [0.47, 0.0]], [[0.0, 0.56], [0.44, 0.0]]])
    given = problem(share, 0.5)
    exact, smooth = (solve(MallowsPhi(beta=1.0, link=link), given) for link in Link)
    gaps = exact[:, 0] - exact[:, 1]
    assert abs(float(gaps[0])) < 1e-3
    assert float(gaps[1]) > 0.1
    assert float(smooth[0, 0] - smooth[0, 1]) > 0.1


def test_a_tie_of_the_exact_link_stops_no_line_search():
    # Of a hundred pairs. Arms 2 and 3 tie; a jump of 1e-10 left over there once held Newton up.
    counts = np.zeros((1, 5, 5))
    counts[0][arm_pairs(5)] = [7, 4, 6, 10, 3, 7, 6, 9, 2, 0, 7, 5, 3, 0, 5, 11, 8, 2, 2, 3]
    given = problem(counts, -np.log(0.6065), budget=1e4)
    found = solve(objective("mallows_phi_exact", 0.15), given)[0]
    assert float(found[2] - found[3]) == pytest.approx(0.0, abs=1e-3)
    assert float(found[1] - found[0]) > 1


def test_one_way_pairs_end_near_plain_training_of_the_budget():
    # The loss falls for ever, and the gap grows with the logarithm of the steps.
    counts, steps = np.asarray([[[0.0, 9.0], [0.0, 0.0]]]), 1000
    given, parameters = problem(counts, 0.5), torch.zeros(1, 2, dtype=torch.float64)
    for _ in range(steps):
        slope, _ = derivatives(objective("dpo", 0.5), given.gaps(parameters), given.neg_log_phi)
        parameters = parameters - given.pull(given.share * slope)
    at, beyond = (
        solve(objective("dpo", 0.5), problem(counts, 0.5, budget=budget))[0, 0]
        for budget in (steps, 20 * steps)
    )
    assert at < parameters[0, 0] < beyond
    assert without_optimum(counts).tolist() == [True]


def test_theta_at_weight_w_is_dpo_at_w_beta():
    counts = some_counts(0.05)
    for theta in (3.0, 0.1):
        own = solve(objective("mallows_theta", 0.2), problem(counts, theta))
        dpo = solve(objective("dpo", 0.2 * 2 * theta), problem(counts, 0.5))
        assert own == pytest.approx(dpo, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_the_path_over_beta_is_one_ray(method: str):
    given = problem(some_counts(0.6), -np.log(0.6))
    at_one, at_half = (solve(objective(method, beta), given) for beta in (1.0, 0.5))
    assert at_half == pytest.approx(2 * at_one, rel=1e-3, abs=1e-3)


def test_ipo_rests_at_the_preference_less_a_half_over_beta_and_w():
    rate = pair_marginals("kendall", -np.log(0.3), 2)[None]
    expected = float(rate[0, 0, 1] - 0.5) / 0.2
    for method, weight in (("ipo", 1.0), ("mallows_ipo", 2.4)):
        found = solve(objective(method, 0.2), problem(rate, weight / 2))
        assert float(found[0, 0] - found[0, 1]) == pytest.approx(expected / weight, rel=1e-5)


def test_phi_recovers_the_rank_gaps_whatever_the_dispersion():
    for phi in (0.3, 0.9):
        rates = pair_marginals("kendall", -np.log(phi), 5)[None]
        found = solve(objective("mallows_phi_exact", 0.5), problem(rates, -np.log(phi)))[0]
        assert (found[:-1] - found[1:]) == pytest.approx(torch.full((4,), 2.0), abs=1e-2)


def test_theta_collapses_less_than_dpo_at_low_dispersion_and_more_at_high():
    for phi, sign in ((0.05, 1), (0.9, -1)):
        counts = some_counts(phi, pairs=1000, seeds=5)
        assert sign > 0 or not without_optimum(counts).any()
        most = [
            outcomes(solve(objective(name, 0.5), problem(counts, -np.log(phi))).numpy(), 1.0)
            for name in ("dpo", "mallows_theta")
        ]
        assert (sign * (most[0]["max_arm"] - most[1]["max_arm"]) > 0.01).all()


def test_a_loss_has_no_optimum_where_an_arm_never_loses_to_those_it_beat():
    cycle = [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    chain = [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    apart = [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert without_optimum(np.asarray([cycle, chain, apart])).tolist() == [False, True, False]


def test_arms_of_which_no_pair_speaks_stay_at_the_reference():
    counts = np.asarray([[[0.0, 3.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    for method in METHODS:
        found = solve(objective(method, 0.5), problem(counts, 0.5))[0]
        assert float(found[2]) == pytest.approx(0.0)
        assert float(found[0]) == pytest.approx(-float(found[1]), abs=1e-6)


def test_a_hessian_that_is_singular_in_float64_is_solved_all_the_same():
    # The bend, rounded to 1e-4 / beta, drowns 1 / budget.
    share = np.asarray([[[0.0, 0.53], [0.47, 0.0]], [[0.0, 0.99], [0.01, 0.0]]])
    steep, known = (
        solve(objective("mallows_phi_exact", beta), problem(share, -np.log(0.05))) * beta
        for beta in (3e3, 1.0)
    )
    gaps, expected = (found[:, 0] - found[:, 1] for found in (steep, known))
    assert float(gaps[0]) == pytest.approx(0.0, abs=1e-3)
    assert float(gaps[1]) == pytest.approx(float(expected[1]), rel=1e-3)
    assert float(expected[1]) > 0.1


def test_the_first_step_weighs_pairs_by_w():
    given = problem(some_counts(0.6), 0.5)
    varied = replace(given, neg_log_phi=torch.linspace(0.1, 2, 20).double().expand(3, 20))
    dpo = first_step(objective("dpo", 0.5), given)
    assert dpo == pytest.approx(given.pull(given.share) * 0.25)
    theta = first_step(objective("mallows_theta", 0.5), varied)
    assert theta == pytest.approx(given.pull(given.share * 2 * varied.neg_log_phi) * 0.25)
