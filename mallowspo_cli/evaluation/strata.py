"""Means over prompts with intervals, and how they differ by the prompts' dispersion."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mallowspo_cli import dispersion
from mallowspo_cli.evaluation.preference import TERCILES
from mallowspo_cli.evaluation.statistics import RESAMPLES, bootstrap_interval

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % interval (bootstrap over prompts)."""

    value: float
    low: float
    high: float
    """Both NaN with fewer than two prompts."""
    prompts: int
    """Those of which the value is defined."""


def estimate(values: Floats, seed: int = 0) -> Estimate:
    """The mean of (N,) values of prompts, those that are NaN left out."""
    known = values[~np.isnan(values)]
    if len(known) < 2:
        return Estimate(mean_known(known), math.nan, math.nan, len(known))
    low, high = bootstrap_interval(known.tolist(), [str(i) for i in range(len(known))], seed)
    return Estimate(float(known.mean()), low, high, len(known))


def difference(first: Floats, second: Floats, seed: int = 0) -> Estimate:
    """Mean of the first minus that of the second, of other prompts, each resampled by itself."""
    sides = [values[~np.isnan(values)] for values in (first, second)]
    count = sum(map(len, sides))
    gap = mean_known(sides[0]) - mean_known(sides[1])
    if min(map(len, sides)) < 2:
        return Estimate(gap, math.nan, math.nan, count)
    generator = np.random.default_rng(seed)
    drawn = [
        side[generator.integers(len(side), size=(RESAMPLES, len(side)))].mean(axis=1)
        for side in sides
    ]
    low, high = np.quantile(drawn[0] - drawn[1], [0.025, 0.975])
    return Estimate(gap, float(low), float(high), count)


def tercile_members(entropies: Sequence[float]) -> dict[str, NDArray[np.int64]]:
    """Positions of the prompts of each third by dispersion, from (N,) normalised entropies.

    As everywhere, thirds are by w = -ln entropy. Prompts without an entropy (NaN) are in none;
    empty where fewer than three have one, or where all have the same.
    """
    weights = -torch.tensor(list(entropies), dtype=torch.float64).log()
    known = (~weights.isnan()).nonzero().flatten()
    if len(known) < len(TERCILES) or bool((weights[known] == weights[known[0]]).all()):
        return {}
    # A low weight is a high dispersion.
    third = 2 - dispersion.terciles(weights[known])
    return {name: known[third == index].numpy() for index, name in enumerate(TERCILES)}


def by_dispersion(
    values: Mapping[str, Floats], members: Mapping[str, NDArray[np.int64]]
) -> tuple[dict[str, dict[str, Estimate]], dict[str, Estimate]]:
    """Each metric in each third, and its value in the high third minus that in the low one."""
    if not members:
        return {}, {}
    thirds = {
        name: {metric: estimate(column[rows]) for metric, column in values.items()}
        for name, rows in members.items()
    }
    low, high = members[TERCILES[0]], members[TERCILES[-1]]
    gaps = {metric: difference(column[high], column[low]) for metric, column in values.items()}
    return thirds, gaps


def mean_known(values: Iterable[float]) -> float:
    """Of those that are not NaN; NaN where there are none."""
    known = [float(value) for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
