"""A verdict follows from the interval, and the interval covers as often as it says."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from mallowspo_cli.evaluation.claims import Claim, t_estimate
from mallowspo_cli.evaluation.strata import Estimate
from mallowspo_cli.report.claims import claims_table


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.3, "held"), (-0.3, -0.1, "opposite"), (-0.1, 0.2, "not seen"), (0.0, 0.2, "not seen")],
)
def test_a_verdict_needs_an_interval_on_one_side_of_zero(
    low: float, high: float, verdict: str
) -> None:
    claim = Claim("it rises", "difference", Estimate((low + high) / 2, low, high, 5))
    assert claim.verdict == verdict
    assert claim.row()["verdict"] == verdict
    assert f"**{verdict}**" in claims_table([claim])[2]


def test_without_an_interval_nothing_was_seen() -> None:
    claim = Claim("it rises", "difference", t_estimate([3.0]))
    assert claim.verdict == "not seen"
    assert claim.row()["low"] is None
    assert "| - |" in claims_table([claim])[2]


def test_the_interval_is_the_t_tests() -> None:
    values = np.random.default_rng(1).normal(2, 3, 7)
    found, expected = t_estimate(values), ttest_1samp(values, 0).confidence_interval()
    np.testing.assert_allclose((found.low, found.high), (expected.low, expected.high), rtol=1e-12)
    assert found.prompts == 7


def test_nan_is_left_out_and_nothing_has_no_mean() -> None:
    assert t_estimate([1.0, math.nan, 3.0]).value == 2.0
    assert math.isnan(t_estimate([math.nan]).value)
