"""Means over prompts and over thirds of them by dispersion, with their intervals."""

import math

import numpy as np
import pytest

from mallowspo_cli.evaluation.preference import TERCILES
from mallowspo_cli.evaluation.strata import (
    by_dispersion,
    difference,
    estimate,
    mean_known,
    tercile_members,
)


def test_an_estimate_leaves_unknown_prompts_out_and_counts_the_others() -> None:
    found = estimate(np.asarray([1.0, math.nan, 3.0, 2.0]))
    assert (found.value, found.prompts) == (2, 3)
    assert 1 <= found.low < 2 < found.high <= 3


def test_fewer_than_two_prompts_have_no_interval() -> None:
    one, none = estimate(np.asarray([4.0])), estimate(np.asarray([math.nan]))
    assert one.value == 4
    assert math.isnan(one.low)
    assert math.isnan(none.value)
    assert none.prompts == 0
    assert math.isnan(difference(np.asarray([4.0]), np.asarray([1.0, 2.0])).low)


def test_the_interval_of_a_difference_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        found = difference(draw.normal(1, 2, 40), draw.normal(0.5, 1, 60), seed)
        covered += found.low <= 0.5 <= found.high
    # 190 expected; four standard deviations.
    assert covered / 200 == pytest.approx(0.95, abs=0.06)


def test_high_entropy_is_high_dispersion_and_unknown_is_in_no_third() -> None:
    entropies = [0.9, 0.1, math.nan, 0.5, 0.2, 0.8, 0.4]
    members = tercile_members(entropies)
    assert list(members) == list(TERCILES)
    assert {name: sorted(rows.tolist()) for name, rows in members.items()} == {
        "low_dispersion": [1, 4],
        "middle_dispersion": [3, 6],
        "high_dispersion": [0, 5],
    }


@pytest.mark.parametrize("entropies", [[], [0.5, 0.4], [0.5] * 9, [math.nan] * 9])
def test_there_are_no_thirds_of_too_few_or_of_equals(entropies: list[float]) -> None:
    assert tercile_members(entropies) == {}
    assert by_dispersion({"length": np.ones(len(entropies))}, {}) == ({}, {})


def test_the_difference_is_that_of_high_dispersion_less_that_of_low() -> None:
    entropies = np.linspace(0.1, 0.9, 30)
    thirds, gaps = by_dispersion({"diversity": entropies}, tercile_members(entropies.tolist()))
    high, low = thirds["high_dispersion"]["diversity"], thirds["low_dispersion"]["diversity"]
    assert high.prompts == low.prompts == 10
    assert gaps["diversity"].value == pytest.approx(high.value - low.value)
    assert gaps["diversity"].low > 0


def test_a_mean_of_what_is_known() -> None:
    assert mean_known([1, math.nan, 2]) == 1.5
    assert math.isnan(mean_known([]))
