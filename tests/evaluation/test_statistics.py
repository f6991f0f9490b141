"""Bootstrap intervals: contain the mean, respect groups, repeat."""

import math

import numpy as np
import pytest
from scipy import stats

from mallowspo_cli.evaluation import statistics
from mallowspo_cli.evaluation.statistics import bootstrap_interval, spearman


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


def test_spearman_is_that_of_scipy_with_ties_and_without_what_is_missing() -> None:
    draw = np.random.default_rng(1)
    first = draw.normal(size=300)
    second = np.round(first + draw.normal(size=300), 1)
    expected = stats.spearmanr(first, second).statistic
    first[[4, 9]], second[7] = np.nan, np.nan
    known = ~(np.isnan(first) | np.isnan(second))
    expected = stats.spearmanr(first[known], second[known]).statistic
    found = spearman(first, second, range(300))
    assert found.value == pytest.approx(expected)
    assert found.pairs == 297
    assert found.low < expected < found.high


def test_the_interval_of_a_correlation_covers_the_truth_about_as_often_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    draw = np.random.default_rng(2)
    truth = 6 / np.pi * np.arcsin(0.5 / 2)
    inside = 0
    for trial in range(100):
        x = draw.normal(size=150)
        y = 0.5 * x + np.sqrt(0.75) * draw.normal(size=150)
        found = spearman(x, y, range(150), seed=trial)
        inside += found.low <= truth <= found.high
    assert 88 <= inside <= 100


def test_pairs_of_one_prompt_do_not_count_as_many_observations() -> None:
    draw = np.random.default_rng(3)
    x, y = draw.normal(size=60), draw.normal(size=60)
    alone = spearman(x, y, range(60))
    repeated = spearman(np.repeat(x, 20), np.repeat(y, 20), np.repeat(np.arange(60), 20).tolist())
    assert repeated.value == pytest.approx(alone.value, abs=1e-9)
    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_a_constant_has_no_correlation() -> None:
    found = spearman(np.ones(9), np.arange(9.0), range(9))
    assert np.isnan([found.value, found.low, found.high]).all()
