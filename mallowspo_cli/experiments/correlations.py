"""Rank correlations of several columns at once, with bootstrap intervals and a shuffled control."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from scipy.stats import rankdata

from mallowspo_cli.experiments.rated_texts import Floats

RESAMPLES: Final = 2000


Measure = Callable[[Floats], float]
"""From the rank correlation matrix of a table's columns to a number."""


def _partial(r: Floats, x: int, y: int, given: int) -> float:
    """Correlation of x and y without what the third column explains of both."""
    explained = (1 - r[x, given] ** 2) * (1 - r[y, given] ** 2)
    if not explained > 0:
        return math.nan
    return float((r[x, y] - r[x, given] * r[y, given]) / math.sqrt(explained))


PAIR_MEASURES: Final[Mapping[str, Measure]] = {
    "entropy": lambda r: float(r[0, 1]),
    "entropy_given_length": lambda r: _partial(r, 0, 1, given=3),
    "entropy_second_wording": lambda r: float(r[0, 2]),
    "length": lambda r: float(r[0, 3]),
    "length_gap": lambda r: float(r[0, 4]),
    "margin": lambda r: float(r[0, 5]),
    "entropy_with_length": lambda r: float(r[1, 3]),
    "entropy_between_wordings": lambda r: float(r[1, 2]),
}
"""Rank correlations over `pair_columns`; those without a `with` or `between` are with phi_human."""


TEXT_MEASURES: Final[Mapping[str, Measure]] = {
    "text_entropy": lambda r: float(r[0, 1]),
    "text_entropy_given_length": lambda r: _partial(r, 0, 1, given=2),
}
"""Rank correlations over `text_columns`, with the standard deviation of a text's ratings."""


def rank_matrix(groups: Sequence[Floats]) -> Floats:
    """(K, K): correlations of within-group ranks; for one group, Spearman's.

    Each of `groups` is (N_g, K). Ranks (ties share their mean) are divided by N_g and centred, so
    that groups differ neither in mean nor in range. NaN where a column is constant.
    """
    ranks = np.concatenate([_centred_ranks(group) for group in groups])
    products = ranks.T @ ranks
    norms = np.sqrt(np.diag(products))
    with np.errstate(invalid="ignore", divide="ignore"):
        return products / np.outer(norms, norms)


def _centred_ranks(group: Floats) -> Floats:
    ranks = rankdata(group, axis=0)
    return (ranks - ranks.mean(axis=0)) / len(group)


def correlate(
    groups: Sequence[Floats],
    measures: Mapping[str, Measure],
    seed: int,
    resamples: int = RESAMPLES,
) -> dict[str, dict[str, float | None]]:
    """Each measure with its 95% bootstrap interval, resampling rows within each group.

    No text is in two pairs, so rows can be drawn independently. None where it is undefined.
    """
    generator = np.random.default_rng(seed)
    point = rank_matrix(groups)
    draws: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(resamples):
        matrix = rank_matrix(
            [group[generator.integers(len(group), size=len(group))] for group in groups]
        )
        for name, measure in measures.items():
            draws[name].append(measure(matrix))
    found = {}
    for name, measure in measures.items():
        low, high = _interval(np.asarray(draws[name]))
        found[name] = {"value": _finite(measure(point)), "low": low, "high": high}
    return found


def shuffled_control(
    groups: Sequence[Floats], seed: int, resamples: int = RESAMPLES
) -> dict[str, float | None]:
    """Correlations of phi_human (column 0) with entropies (column 1) that belong to other pairs.

    `value`, `low`, `high`: mean and 95% interval over permutations within each group. `p_value`:
    how often one is at least as far from 0 as the true correlation, two-sided.
    """
    generator = np.random.default_rng(seed)
    actual = abs(float(rank_matrix([group[:, :2] for group in groups])[0, 1]))
    ranks = [_centred_ranks(group[:, :2]) for group in groups]
    both = np.concatenate(ranks)
    norm = math.sqrt(float((both**2).sum(axis=0).prod()))
    if norm == 0:
        return {"value": None, "low": None, "high": None, "p_value": None}
    draws = np.zeros(resamples)
    for x, y in (rank.T for rank in ranks):
        draws += [float(x @ generator.permutation(y)) / norm for _ in range(resamples)]
    low, high = _interval(draws)
    # A permutation that is the truth itself must not fall short of it by rounding.
    as_far = int((np.abs(draws) >= actual - 1e-12).sum())
    return {
        "value": float(draws.mean()),
        "low": low,
        "high": high,
        "p_value": (1 + as_far) / (1 + resamples),
    }


def _interval(draws: Floats) -> tuple[float | None, float | None]:
    known = draws[np.isfinite(draws)]
    if len(known) == 0:
        return None, None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
