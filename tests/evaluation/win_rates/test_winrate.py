"""Win rates are AlpacaEval's, and their interval covers the truth."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.win_rates.winrate import average_length, extreme_change, win_rate

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "length_control.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_every_figure_is_alpaca_evals(case: dict[str, Any]) -> None:
    chosen = [math.nan if value is None else value for value in case["preference"]]
    found = win_rate(np.asarray(chosen))
    recorded = case["figures"]["length_controlled_v1"]["metrics"]
    for name, value in recorded.items():
        if name not in ("length_controlled_winrate", "lc_standard_error"):
            assert getattr(found, name) == pytest.approx(value, rel=1e-12), name


def test_draws_count_half_and_failures_not_at_all() -> None:
    found = win_rate(np.asarray([2.0, 2.0, 1.5, 1.0, math.nan, 1.75, 1.4999]))
    assert (found.n_wins, found.n_draws, found.n_wins_base, found.n_total) == (3, 1, 2, 6)
    assert found.discrete_win_rate == pytest.approx(100 * 3.5 / 6)
    assert found.win_rate == pytest.approx(100 * (1 + 1 + 0.5 + 0 + 0.75 + 0.4999) / 6)
    assert found.low <= found.win_rate <= found.high


def test_of_one_judgement_there_is_no_standard_error() -> None:
    found = win_rate(np.asarray([1.25]))
    assert math.isnan(found.standard_error)
    assert (found.win_rate, found.low, found.high) == (25.0, 25.0, 25.0)


def test_without_a_judgement_there_is_no_win_rate() -> None:
    with pytest.raises(EvalError, match="none of 3 pairs is judged"):
        win_rate(np.full(3, math.nan))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(4)
    inside = 0
    for _ in range(200):
        found = win_rate(1 + generator.beta(0.4, 0.6, size=100))
        inside += found.low <= 40 <= found.high
    # 95 % of 200, give or take three standard errors.
    assert 180 <= inside <= 199


def test_average_length_drops_its_fraction() -> None:
    assert average_length(["ab", "abc"]) == 2


@pytest.mark.parametrize(
    ("plain", "controlled", "warned"),
    [
        (20.0, 10.1, False),
        (20.0, 9.9, True),
        (20.0, 39.9, False),
        (20.0, 40.1, True),
        (50.0, 37.6, False),
        (50.0, 37.4, True),
        (50.0, 62.6, True),
        (98.0, 100.0, False),
    ],
)
def test_a_large_move_is_warned_of(plain: float, controlled: float, warned: bool) -> None:
    text = extreme_change(plain, controlled)
    assert (text is not None) == warned
    if text:
        assert f"{controlled:.1f}" in text
