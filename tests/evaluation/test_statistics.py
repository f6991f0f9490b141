"""Bootstrap intervals: contain the mean, respect groups, repeat."""

import math

import numpy as np
import pytest

from mallowspo_cli.evaluation.statistics import bootstrap_interval


def normal(count: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).normal(size=count).tolist()


def own_groups(count: int) -> list[str]:
    return [f"prompt-{index}" for index in range(count)]


def test_the_interval_contains_the_mean_and_is_as_wide_as_theory_says() -> None:
    values = normal(400)
    low, high = bootstrap_interval(values, own_groups(400))
    mean = float(np.mean(values))
    assert low < mean < high
    # 2 x 1.96 standard errors.
    assert high - low == pytest.approx(3.92 * np.std(values) / math.sqrt(400), rel=0.1)


def test_the_interval_covers_the_truth_as_often_as_its_level_says() -> None:
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(normal(60, seed), own_groups(60), level=0.8)
        covered += low < 0 < high
    # 160 expected; four standard deviations.
    assert covered / 200 == pytest.approx(0.8, abs=0.12)


def test_a_higher_level_is_wider() -> None:
    values = normal(50)
    narrow = bootstrap_interval(values, own_groups(50), level=0.5)
    wide = bootstrap_interval(values, own_groups(50), level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_values_that_repeat_within_a_prompt_add_no_certainty() -> None:
    values = normal(50)
    alone = bootstrap_interval(values, own_groups(50))
    copied = bootstrap_interval(values * 9, own_groups(50) * 9)
    as_if_free = bootstrap_interval(values * 9, own_groups(450))
    assert copied == pytest.approx(alone)
    # 9 perfectly correlated copies, taken for independent, look 3 times as certain.
    assert (copied[1] - copied[0]) / (as_if_free[1] - as_if_free[0]) == pytest.approx(3, rel=0.1)


def test_groups_of_unequal_size_weigh_by_their_values() -> None:
    values = [0.0] * 90 + [1.0] * 10
    groups = ["big"] * 90 + ["small"] * 10
    assert bootstrap_interval(values, groups) == (0.0, 1.0)
    assert bootstrap_interval([0.3] * 100, groups) == pytest.approx((0.3, 0.3))


def test_one_prompt_gives_an_interval_without_width() -> None:
    assert bootstrap_interval([0.0, 1.0, 1.0, 1.0], ["same"] * 4) == (0.75, 0.75)


def test_the_interval_depends_on_seed_and_data_alone() -> None:
    values = normal(30)
    state = np.random.get_state()[1].copy()
    first = bootstrap_interval(values, own_groups(30))
    assert bootstrap_interval(values, own_groups(30)) == first
    assert bootstrap_interval(values, [f"z{g}" for g in own_groups(30)]) == first
    assert bootstrap_interval(values, own_groups(30), seed=1) != first
    assert np.array_equal(np.random.get_state()[1], state)
