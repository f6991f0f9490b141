"""The entropy estimate of dispersion from exact conditionals of a Mallows model.

Under Mallows with Kendall's distance a ranking is a sequence of tokens: the best item, the second
best, and so on. With k items left the next is the j-th of them, j = 0 .. k - 1, with a probability
proportional to phi^j, whatever came before, so the entropies are known exactly. The last item is
certain and is no token; with it every -ln H would be larger by ln(n / (n - 1)), no correlation
other. Derived; the set-up of the paper's own figure could not be read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mallowspo_cli.dispersion import normalised_entropy, raw_weight
from mallowspo_cli.evaluation.claims import Claim
from mallowspo_cli.evaluation.statistics import RESAMPLES, Correlation
from mallowspo_cli.evaluation.strata import Estimate

Floats = NDArray[np.float64]

LOWEST_THETA, HIGHEST_THETA = 0.05, 4.0
"""The sweep of theta = -log phi: from almost uniform to almost a single ranking."""
SWEEP = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Closer together where dispersion is high."""
EVEN_VALUES = 80
"""Values of the other sweep, evenly spaced: a correlation depends on which values are compared."""
FOLLOWS = 0.99
"""Above this correlation the estimate is said to follow the truth."""
CLAIMED_ITEMS = (10, 100)
"""Fewest and most items for which that is claimed."""
LOW_THETA = 0.3
SLOPE_STEP = 0.005
"""In theta, of the search for where the estimate is flat."""


@dataclass(frozen=True)
class ExactSweep:
    """The estimate from exact conditionals of rankings of one number of items."""

    items: int
    curves: dict[str, tuple[Floats, Floats]]
    """Sweep name to theta and the estimate before its scale phi*, (M,) each."""
    summary: dict[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each theta of each sweep."""
        scale = self.summary["phi_star"]
        return [
            {"items": self.items, "sweep": name, "theta": t, "estimate": e, "scaled": scale * e}
            for name, (theta, estimate) in self.curves.items()
            for t, e in zip(theta.tolist(), estimate.tolist(), strict=True)
        ]


def exact_sweep(num_items: int, seed: int) -> ExactSweep:
    """Estimate against truth over both sweeps; the seed is that of the bootstrap."""
    sweeps = {
        "listed": np.asarray(SWEEP),
        "even": np.linspace(LOWEST_THETA, HIGHEST_THETA, EVEN_VALUES),
    }
    curves = {name: (theta, exact_estimate(theta, num_items)) for name, theta in sweeps.items()}
    scale = best_scale(*curves["listed"])
    at_zero, low, at_bound = scale * exact_estimate(
        np.asarray([0, LOWEST_THETA, LOW_THETA]), num_items
    )
    summary = {
        "items": num_items,
        "phi_star": scale,
        "phi_star_even": best_scale(*curves["even"]),
        "correlation": vars(pearson(*curves["listed"], seed)),
        "correlation_even": vars(pearson(*curves["even"], seed)),
        "monotone": bool((np.diff(curves["even"][1]) > 0).all()),
        "scaled_at_zero": float(at_zero),
        "scaled_at_lowest": float(low),
        "scaled_at_low_theta": float(at_bound),
        "slope_below_low_theta": float((at_bound - low) / (LOW_THETA - LOWEST_THETA)),
        "flat_below": flat_below(num_items, scale),
    }
    return ExactSweep(num_items, curves, summary)


def exact_estimate(theta: Floats, num_items: int) -> Floats:
    """-ln H from exact conditionals, (M,) for (M,) theta: the estimate before its scale phi*.

    By the code that training uses, with ln(num_items) in the place of ln(vocabulary). Every ranking
    of a prompt has the same entropies, so both responses of a pair have them.
    """
    total = torch.from_numpy(step_entropies(theta, num_items).sum(axis=1))
    tokens = torch.full_like(total, num_items - 1)
    return raw_weight(normalised_entropy(total, tokens, total, tokens, num_items)).numpy()


def step_entropies(theta: Floats, num_items: int) -> Floats:
    """(M, num_items - 1) nats: entropies of the next item with num_items, ..., 2 items left.

    Truncated geometric over k items: H = ln Z + theta E[j], Z = sum of exp(-theta j). At theta = 0
    it is ln k, as theta grows it goes to 0.
    """
    places = np.arange(num_items)
    weights = np.exp(-theta[:, None] * places)
    totals = weights.cumsum(axis=1)
    means = (weights * places).cumsum(axis=1) / totals
    entropies = np.log(totals) + theta[:, None] * means
    return entropies[:, :0:-1]


def best_scale(theta: Floats, estimate: Floats) -> float:
    """phi*: the least-squares slope through the origin of theta on the estimate."""
    return float((theta * estimate).sum() / (estimate**2).sum())


def flat_below(num_items: int, scale: float) -> float | None:
    """The theta up to which the scaled estimate rises by less than half of what theta does.

    None where it does all over the sweep; the flat part begins at theta = 0, where the slope is 0.
    """
    theta = np.arange(0, HIGHEST_THETA + SLOPE_STEP / 2, SLOPE_STEP)
    slope = np.diff(scale * exact_estimate(theta, num_items)) / SLOPE_STEP
    steep = slope >= 0.5
    return float(theta[steep.argmax()]) if steep.any() else None


def pearson(first: Floats, second: Floats, seed: int) -> Correlation:
    """Pearson's correlation of (N,) values, with a 95 % bootstrap interval over the N places.

    A sweep is no sample: there the interval tells how much hangs on which values were taken.
    NaN where a side is constant.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(first), size=(RESAMPLES, len(first)))
    low, high = np.nan, np.nan
    resampled = _pearson(first[drawn], second[drawn])
    known = resampled[~np.isnan(resampled)]
    if len(known):
        low, high = np.quantile(known, [0.025, 0.975])
    return Correlation(float(_pearson(first, second)), float(low), float(high), len(first))


def _pearson(first: Floats, second: Floats) -> Floats:
    """Along the last axis."""
    x = first - first.mean(axis=-1, keepdims=True)
    y = second - second.mean(axis=-1, keepdims=True)
    product = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    covariance = (x * y).sum(axis=-1)
    return np.divide(covariance, product, out=np.full_like(product, np.nan), where=product > 1e-12)


def exact_claims(sweeps: Sequence[ExactSweep], seed: int) -> list[Claim]:
    """Whether the least correlation over the numbers of items claimed is above FOLLOWS.

    A claim for each sweep; none where no such number was asked for.
    """
    claimed = [s for s in sweeps if CLAIMED_ITEMS[0] <= s.items <= CLAIMED_ITEMS[1]]
    if not claimed:
        return []
    numbers = ", ".join(str(sweep.items) for sweep in claimed)
    return [
        Claim(
            f"the estimate follows the true -log phi, exact conditionals of {numbers} items, "
            f"{len(claimed[0].curves[name][0])} {spacing} values",
            f"least correlation, minus {FOLLOWS}",
            _least_correlation([sweep.curves[name] for sweep in claimed], seed),
        )
        for name, spacing in (("listed", "listed"), ("even", "evenly spaced"))
    ]


def _least_correlation(curves: Sequence[tuple[Floats, Floats]], seed: int) -> Estimate:
    """Of curves over one sweep, minus FOLLOWS, with a bootstrap interval over its values."""
    theta = curves[0][0]
    drawn = np.random.default_rng(seed).integers(len(theta), size=(RESAMPLES, len(theta)))
    least = np.min([_pearson(theta[drawn], estimate[drawn]) for _, estimate in curves], axis=0)
    low, high = np.nanquantile(least, [0.025, 0.975]) - FOLLOWS
    value = min(float(_pearson(theta, estimate)) for _, estimate in curves) - FOLLOWS
    return Estimate(value, float(low), float(high), len(theta))
