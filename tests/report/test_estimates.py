"""Numbers and their intervals as text: what is not known is a dash, and a dash alone."""

import math
from typing import Any

import pytest

from mallowspo_cli.report.estimates import interval, number, with_interval

NAN = math.nan


@pytest.mark.parametrize(
    ("entry", "value", "ends", "both"),
    [
        ((1.0, 0.5, 1.5), "1.00", "[0.50, 1.50]", "1.00 [0.50, 1.50]"),
        ((-1.0, -1.5, -0.5), "-1.00", "[-1.50, -0.50]", "-1.00 [-1.50, -0.50]"),
        ((1.0, None, None), "1.00", "-", "1.00"),
        ((1.0, NAN, NAN), "1.00", "-", "1.00"),
        ((NAN, NAN, NAN), "-", "-", "-"),
        ((None, None, None), "-", "-", "-"),
    ],
)
def test_an_estimate_is_its_number_and_its_interval_where_it_has_one(
    entry: tuple[Any, ...], value: str, ends: str, both: str
) -> None:
    estimate = dict(zip(("value", "low", "high"), entry, strict=True))
    assert number(estimate["value"], 2) == value
    assert interval(estimate, 2) == ends
    assert with_interval(estimate, 2) == both


@pytest.mark.parametrize(("value", "told"), [(0.12345, "0.123"), (None, "-"), (NAN, "-")])
def test_a_plain_number_has_no_interval(value: float | None, told: str) -> None:
    assert with_interval(value) == told
