"""The frontier's numbers: areas by hand, pairing by seed, verdicts either way."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.experiments.sentiment import (
    CONTROLS,
    METHODS,
    all_jobs,
    analyse,
    area,
    chosen_methods,
    claims,
    gain_at,
)


def row(method: str, seed: int, *points: tuple[float, float], beta: float = 0.1) -> dict[str, Any]:
    """A row whose points are (KL, reward)."""
    found = [{"step": i, "kl": kl, "reward": r} for i, (kl, r) in enumerate(points)]
    return {"method": method, "seed": seed, "beta": beta, "points": found}


def test_the_area_of_two_points_is_that_of_a_triangle_and_a_trapezium() -> None:
    kl, gain = np.array([2.0, 1.0]), np.array([0.3, 0.2])
    # 1/2 * 1 * 0.2 + (0.2 + 0.3) / 2 * 1, over a width of 2
    assert area(kl, gain, 2.0) == pytest.approx((0.1 + 0.25) / 2, abs=1e-6)
    assert area(kl, gain, 1.0) == pytest.approx(0.1, abs=1e-6)


def test_a_point_below_the_line_of_its_neighbours_is_passed_over() -> None:
    kl, gain = np.array([1.0, 2.0]), np.array([0.05, 0.4])
    np.testing.assert_allclose(gain_at(kl, gain, np.array([1.0, 2.0])), [0.2, 0.4])


def test_a_worse_point_further_out_does_not_lower_the_frontier() -> None:
    kl, gain = np.array([1.0, 3.0]), np.array([0.2, -0.4])
    np.testing.assert_allclose(gain_at(kl, gain, np.array([0.5, 1.0, 2.0, 3.0])), [0.1, *[0.2] * 3])


def test_a_method_that_only_loses_has_no_area() -> None:
    assert area(np.array([1.0]), np.array([-0.5]), 1.0) == 0


def test_a_divergence_below_zero_counts_as_none() -> None:
    assert gain_at(np.array([-0.1]), np.array([0.2]), np.array([0.0]))[0] == pytest.approx(0.2)


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(-1, 1)), min_size=1, max_size=6),
    st.tuples(st.floats(0, 5), st.floats(-1, 1)),
)
def test_another_point_never_lowers_the_frontier(
    points: list[tuple[float, float]], extra: tuple[float, float]
) -> None:
    kl, gain = np.asarray(points).T
    more_kl, more_gain = np.asarray([*points, extra]).T
    grid = np.linspace(0, 6, 20)
    assert (gain_at(more_kl, more_gain, grid) >= gain_at(kl, gain, grid) - 1e-9).all()


def test_areas_end_where_the_shortest_curve_ends() -> None:
    rows = [row("dpo", 0, (4.0, 0.9)), row("mallows_theta", 0, (1.0, 0.6))]
    found = analyse(rows, 0.5)
    assert found["kl_until"] == 1.0
    assert found["areas"]["dpo"]["value"] == pytest.approx(0.4 / 4 / 2, abs=1e-6)
    assert found["areas"]["mallows_theta"]["value"] == pytest.approx(0.1 / 2, abs=1e-6)


def test_differences_are_paired_by_seed_and_only_over_shared_ones() -> None:
    rewards = {0: (0.6, 0.7), 1: (0.55, 0.62), 2: (0.7, 0.79)}
    rows = [row("dpo", seed, (1.0, a)) for seed, (a, _) in rewards.items()]
    rows += [row("mallows_theta", seed, (1.0, b)) for seed, (_, b) in rewards.items()]
    rows += [row("dpo", 3, (1.0, 0.9))]
    (entry,) = analyse(rows, 0.5)["differences"]
    halves = np.asarray(list(rewards.values())) - 0.5
    expected = ttest_rel(halves[:, 1], halves[:, 0])
    assert entry["count"] == 3
    assert entry["value"] == pytest.approx((halves[:, 1] - halves[:, 0]).mean() / 2, abs=1e-6)
    assert entry["p"] == pytest.approx(expected.pvalue, rel=1e-6)
    assert entry["p_holm"] == entry["p"]


@pytest.mark.parametrize(
    ("sign", "verdict"), [(1, "held"), (-1, "opposite"), (0, "not seen")], ids=str
)
def test_a_claim_can_come_out_either_way(sign: int, verdict: str) -> None:
    noise = {0: 0.01, 1: -0.01, 2: 0.0}
    rows = [row("dpo", seed, (1.0, 0.7)) for seed in noise]
    rows += [row("mallows_theta", s, (1.0, 0.7 + sign * 0.1 + n)) for s, n in noise.items()]
    (claim,) = claims(analyse(rows, 0.5))
    assert claim.verdict == verdict


def test_controls_decide_claims_of_their_own() -> None:
    rows = [row(name, s, (1.0, 0.6 + s / 100)) for name in METHODS for s in range(3)]
    found = claims(analyse(rows, 0.5))
    assert len(found) == 3 + len(CONTROLS)
    assert {c.text for c in found} >= set(CONTROLS.values())


def test_seeds_are_run_whole_one_after_another() -> None:
    jobs = all_jobs(chosen_methods("dpo,mallows_phi"), [0.3, 3.0], range(2))
    assert [job.seed for job in jobs] == [0] * 4 + [1] * 4
    assert len({job.name for job in jobs}) == 8
    assert jobs[1].words() == ["objective=mallows_phi", "objective.beta=0.09", "seed=0"]


def test_a_method_that_is_not_there_is_named_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no method named 'mallows_thet'.*mallows_theta"):
        chosen_methods("dpo,mallows_thet")
