"""Confidence intervals and correlations."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
TERCILES = ("low_dispersion", "middle_dispersion", "high_dispersion")
"""Thirds of the prompts; a low dispersion is a high w."""


def bootstrap_interval(
    values: Sequence[float], groups: Sequence[str], seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of `values`, resampling whole groups.

    Pairs of one prompt are not independent, so `groups` names each value's prompt.
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(group, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(group).astype(np.float64)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its 95 % interval; NaN where one side is constant."""

    value: float
    low: float
    high: float
    pairs: int


def spearman(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    groups: Sequence[Hashable],
    seed: int = 0,
    level: float = 0.95,
) -> Correlation:
    """Spearman's rank correlation of (N,) values, with a bootstrap interval over whole groups.

    Values that are NaN on either side are left out. Ranks are those of the whole sample, ties
    share their mean; a resample draws groups and correlates their ranks, which for many values is
    the same as ranking anew and much faster.
    """
    # A second to import, which training, that needs the rest of this file, does without.
    from scipy.stats import rankdata

    known = ~(np.isnan(first) | np.isnan(second))
    x, y = (rankdata(values[known]) for values in (first, second))
    kept = [group for group, keep in zip(groups, known, strict=True) if keep]
    if len(kept) < 3 or x.std() == 0 or y.std() == 0:
        return Correlation(math.nan, math.nan, math.nan, len(kept))
    x, y = x - x.mean(), y - y.mean()
    numbers = {group: index for index, group in enumerate(dict.fromkeys(kept))}
    index = np.asarray([numbers[group] for group in kept])
    moments = (np.ones_like(x), x, y, x * x, y * y, x * y)
    sums = np.stack([np.bincount(index, weights=m, minlength=len(numbers)) for m in moments])
    generator = np.random.default_rng(seed)
    drawn = [
        _pearson(*sums[:, generator.integers(len(numbers), size=len(numbers))].sum(axis=1))
        for _ in range(RESAMPLES)
    ]
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Correlation(_pearson(*sums.sum(axis=1)), float(low), float(high), len(kept))


def _pearson(count: float, x: float, y: float, xx: float, yy: float, xy: float) -> float:
    """The correlation that these sums give."""
    variances = (count * xx - x * x) * (count * yy - y * y)
    return float((count * xy - x * y) / math.sqrt(variances)) if variances > 0 else math.nan
