"""The frontier's numbers: areas by hand, pairing by seed, verdicts either way."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.evaluation.claims import t_estimate
from mallowspo_cli.experiments.sentiment import (
    CONTROLS,
    Curve,
    analyse,
    area,
    claims,
    frontier,
)
from mallowspo_cli.experiments.sentiment_methods import METHODS, all_jobs, chosen_methods


def row(method: str, seed: int, *points: tuple[float, float], beta: float = 0.1) -> dict[str, Any]:
    """A row whose points are (KL, reward), every beginning having that reward."""
    found = [
        {"step": i, "kl": kl, "reward": r, "rewards": [r] * 4} for i, (kl, r) in enumerate(points)
    ]
    return {"method": method, "seed": seed, "beta": beta, "points": found}


REFERENCES = {seed: {"reward": 0.5, "rewards": [0.5] * 4} for seed in range(4)}


def curve(kl: list[float], gain: list[float]) -> Curve:
    return Curve(np.asarray(kl), np.asarray([gain, gain]))


def test_the_area_of_two_points_is_that_of_a_triangle_and_a_trapezium() -> None:
    found = curve([2.0, 1.0], [0.3, 0.2])
    # 1/2 * 1 * 0.2 + (0.2 + 0.3) / 2 * 1, over a width of 2
    assert area(found, 2.0) == pytest.approx((0.1 + 0.25) / 2, abs=1e-6)
    assert area(found, 1.0) == pytest.approx(0.1, abs=1e-6)
    assert math.isnan(area(found, 0.0))


def test_points_below_the_line_of_their_neighbours_and_behind_the_best_are_passed_over() -> None:
    kl, gain = np.array([1.0, 2.0, 3.0, 2.0]), np.array([0.05, 0.4, 0.1, 0.3])
    assert frontier(kl, gain) == [1]
    assert frontier(kl, -gain) == []
    assert frontier(np.array([-0.1, 1.0]), np.array([0.2, 0.3])) == [1]


def test_a_method_that_only_loses_has_no_area() -> None:
    assert area(curve([1.0], [-0.5]), 1.0) == 0


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(-1, 1)), min_size=1, max_size=6),
    st.tuples(st.floats(0, 5), st.floats(-1, 1)),
)
def test_another_point_never_lowers_the_area(
    points: list[tuple[float, float]], extra: tuple[float, float]
) -> None:
    few, more = (
        curve(*map(list, zip(*some, strict=True)))  # type: ignore[arg-type]
        for some in (points, [*points, extra])
    )
    assert area(more, 6.0) >= area(few, 6.0) - 1e-9


def test_noise_alone_has_no_area_on_average_however_many_points_lie_near() -> None:
    generator = np.random.default_rng(0)
    found = {}
    for name, reach in (("slow", 0.5), ("fast", 6.0)):
        kl = np.linspace(reach / 4, reach, 4)
        noise = generator.normal(0, 0.02, (4000, 2, 4))
        found[name] = t_estimate(np.asarray([area(Curve(kl, both), 3.0) for both in noise]))
    for estimate in found.values():
        assert estimate.low < 0 < estimate.high or abs(estimate.value) < 2e-4


def test_areas_end_where_the_shortest_curve_ends() -> None:
    rows = [row("dpo", 0, (4.0, 0.9)), row("mallows_theta", 0, (1.0, 0.6))]
    found = analyse(rows, REFERENCES, 1)
    assert found["kl_until"] == 1.0
    assert found["areas"]["dpo"]["value"] == pytest.approx(0.4 / 4 / 2, abs=1e-6)
    assert found["areas"]["mallows_theta"]["value"] == pytest.approx(0.1 / 2, abs=1e-6)


def test_a_third_method_does_not_change_the_difference_of_two() -> None:
    rows = [row("dpo", 0, (4.0, 0.9)), row("mallows_theta", 0, (2.0, 0.9))]
    more = [*rows, row("simpo", 0, (0.5, 0.55))]
    first, second = (analyse(some, REFERENCES, 1)["differences"][0] for some in (rows, more))
    assert first == second
    assert first["kl_until"] == 2.0


def test_a_seed_of_which_a_run_is_missing_or_failed_counts_nowhere() -> None:
    rows = [row(m, s, (1.0, 0.7), beta=b) for m in ("dpo", "ipo") for s in (0, 1) for b in (1, 2)]
    whole = analyse(rows, REFERENCES, 2)
    failed = [*rows[:-1], {**rows[-1], "points": [], "error": "not finite"}]
    for some in (rows[:-1], failed):
        found = analyse(some, REFERENCES, 2)
        assert found["left_out"] == ["ipo seed 1"]
        assert found["areas"]["ipo"]["count"] == 1
        assert found["differences"][0]["count"] == 1
    assert whole["left_out"] == []


def test_differences_are_paired_by_seed_and_only_over_shared_ones() -> None:
    rewards = {0: (0.6, 0.7), 1: (0.55, 0.62), 2: (0.7, 0.79)}
    rows = [row("dpo", seed, (1.0, a)) for seed, (a, _) in rewards.items()]
    rows += [row("mallows_theta", seed, (1.0, b)) for seed, (_, b) in rewards.items()]
    rows += [row("dpo", 3, (1.0, 0.9))]
    (entry,) = analyse(rows, REFERENCES, 1)["differences"]
    halves = np.asarray(list(rewards.values())) - 0.5
    expected = ttest_rel(halves[:, 1], halves[:, 0])
    assert entry["count"] == 3
    assert entry["value"] == pytest.approx((halves[:, 1] - halves[:, 0]).mean() / 2, abs=1e-6)
    assert entry["p"] == pytest.approx(expected.pvalue, rel=1e-6)
    assert entry["p_holm"] == entry["p"]


def test_a_point_is_the_same_of_all_seeds_though_one_has_a_step_less() -> None:
    rows = [row("dpo", seed, (1.0, 0.7)) for seed in range(2)]
    rows[1]["points"][0]["step"] = 1
    (entry,) = analyse(rows, REFERENCES, 1)["points"]
    assert (entry["step"], entry["kl"]["count"]) == (0.5, 2)


@pytest.mark.parametrize(
    ("sign", "verdict"), [(1, "held"), (-1, "opposite"), (0, "not seen")], ids=str
)
def test_a_claim_can_come_out_either_way(sign: int, verdict: str) -> None:
    noise = {0: 0.01, 1: -0.01, 2: 0.0}
    rows = [row("dpo", seed, (1.0, 0.7)) for seed in noise]
    rows += [row("mallows_theta", s, (1.0, 0.7 + sign * 0.1 + n)) for s, n in noise.items()]
    (claim,) = claims(analyse(rows, REFERENCES, 1))
    assert claim.verdict == verdict


def test_controls_decide_claims_of_their_own() -> None:
    rows = [row(name, s, (1.0, 0.6 + s / 100)) for name in METHODS for s in range(3)]
    found = claims(analyse(rows, REFERENCES, 1))
    assert len(found) == 3 + len(CONTROLS)
    assert {c.text for c in found} >= set(CONTROLS.values())


def test_seeds_are_run_whole_one_after_another() -> None:
    jobs = all_jobs(chosen_methods("dpo,mallows_phi"), [0.3, 3.0], range(2))
    assert [job.seed for job in jobs] == [0] * 4 + [1] * 4
    assert len({job.name for job in jobs}) == 8
    assert jobs[1].words() == [
        *("objective=mallows_phi", "dispersion.mode=estimated"),
        *("objective.beta=0.09", "seed=0"),
    ]


def test_a_method_that_is_not_there_is_named_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no method named 'mallows_thet'.*mallows_theta"):
        chosen_methods("dpo,mallows_thet")
