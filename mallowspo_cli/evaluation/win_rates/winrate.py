"""Win rates as AlpacaEval counts them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.outputs import BASE_WINS, DRAW
from mallowspo_cli.evaluation.statistics import bootstrap_interval


@dataclass(frozen=True)
class WinRate:
    """How often a model's answers are preferred; names and meaning are AlpacaEval's."""

    win_rate: float
    """Percent: the mean preference, each judgement counting by the judge's probability."""
    standard_error: float
    """Percent; NaN of one judgement."""
    n_wins: int
    n_wins_base: int
    n_draws: int
    """Preferences of exactly 1.5."""
    n_total: int
    """Judgements, without those that failed."""
    discrete_win_rate: float
    """Percent: a judgement is a win, a loss, or a draw, which counts half."""
    low: float
    """Percent: lower end of the 95 % bootstrap interval of `win_rate`. Not AlpacaEval's."""
    high: float
    """Percent: its upper end."""


def win_rate(preferences: NDArray[np.float64], seed: int = 0) -> WinRate:
    """Count (N,) preferences in [1, 2], one for each instruction; NaN is a failed judgement.

    Raises:
        EvalError: all have failed.
    """
    known = preferences[~np.isnan(preferences)]
    count = len(known)
    if not count:
        raise EvalError(
            f"none of {len(preferences)} pairs is judged, so there is no win rate. See why the "
            "judgements failed, and judge again."
        )
    shares = known - BASE_WINS
    wins, losses, draws = (
        int(found.sum()) for found in (known > DRAW, known < DRAW, known == DRAW)
    )
    error = shares.std(ddof=1) / math.sqrt(count) * 100 if count > 1 else math.nan
    low, high = bootstrap_interval(shares.tolist(), [str(row) for row in range(count)], seed)
    return WinRate(
        win_rate=float(shares.mean() * 100),
        standard_error=float(error),
        n_wins=wins,
        n_wins_base=losses,
        n_draws=draws,
        n_total=count,
        discrete_win_rate=(wins + draws / 2) / count * 100,
        low=low * 100,
        high=high * 100,
    )


def average_length(outputs: Sequence[str]) -> int:
    """AlpacaEval's avg_length: mean characters of the answers, without its fraction."""
    return int(sum(map(len, outputs)) / len(outputs))


def extreme_change(win_rate: float, controlled: float) -> str | None:
    """A warning where length control moves the win rate (percent) by more than is usual.

    AlpacaEval's bounds: 10 points, and a quarter of the way to 0 or to 100.
    """
    low = min(win_rate - win_rate / 4, win_rate - 10)
    high = max(win_rate + (100 - win_rate) / 4, win_rate + 10)
    if low <= controlled <= high:
        return None
    return (
        f"length control moves the win rate from {win_rate:.1f} to {controlled:.1f}: either length "
        "decides most judgements, or the fit has failed (few judgements, odd lengths)."
    )
