"""Controlled sentiment: what runs say as a frontier of reward against KL.

A frontier is what a method reaches over its betas and over the steps of a run, one for each seed.
Seeds have beginnings, pairs and an order of their own; methods share them, so differences are
paired, and their spread over seeds holds all that was drawn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_1samp

from mallowspo_cli.evaluation.claims import Claim, t_estimate
from mallowspo_cli.evaluation.comparing.paired import detectable, holm

Floats = NDArray[np.float64]
BASELINE: Final = "dpo"

CONTROLS: Final = {
    ("mallows_theta", "theta_shuffled"): "what theta does comes of w(x), not of its spread",
    ("mallows_theta", "theta_inverse"): "theta's w(x) points the right way",
    ("mallows_phi", "phi_constant"): "what phi does comes of w(x), not of its link",
    ("mallows_phi", "phi_smooth"): "the exact link is better than the smooth one",
}
"""What a method less its control says where it is above 0."""


@dataclass(frozen=True)
class Curve:
    """What a method reached with one seed, over betas and steps: N points."""

    kl: Floats
    """(N,) nats to the reference."""
    gains: Floats
    """(2, N) reward less the reference's, on either half of the seed's beginnings."""


def frontier(kl: Floats, gain: Floats) -> list[int]:
    """Positions of the points on the upper hull of (N,) points and the reference, (0, 0).

    From left to right, up to the best point; behind it the hull is flat. A policy drawn at random
    for each answer mixes two points: its reward lies on the line between them, and its KL not above
    (KL is convex), so the hull is what is attainable.
    """
    hull: list[tuple[float, float, int]] = [(0.0, 0.0, -1)]
    for x, y, place in sorted(zip(np.maximum(kl, 0), gain, range(len(kl)), strict=True)):
        if y <= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], (x, y)) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        if x > hull[-1][0]:
            hull.append((float(x), float(y), place))
    return [place for _, _, place in hull[1:]]


def _slope(first: Sequence[float], second: Sequence[float]) -> float:
    rise, run = second[1] - first[1], second[0] - first[0]
    return rise / run if run else math.inf


def area(curve: Curve, until: float) -> float:
    """The mean gain of a curve's frontier over KL from 0 to `until`; NaN where that is 0.

    The points of the frontier are chosen by one half of the beginnings and valued by the other,
    both ways round: a frontier valued by what it was chosen by lies above the truth, and the more
    so the more of its points lie at a small KL.
    """
    if until <= 0:
        return math.nan
    grid = np.linspace(0, until, 513)
    found = []
    for chosen_by, valued_by in ((0, 1), (1, 0)):
        places = frontier(curve.kl, curve.gains[chosen_by])
        xs = np.append(0.0, np.maximum(curve.kl[places], 0))
        ys = np.append(0.0, curve.gains[valued_by][places])
        found.append(np.trapezoid(np.interp(grid, xs, ys), grid) / until)
    return float(np.mean(found))


def curves(
    rows: Sequence[Mapping[str, Any]],
    references: Mapping[int, Mapping[str, Any]],
    factors: int,
) -> dict[str, dict[int, Curve]]:
    """For each method, its seeds of which all `factors` runs are there, with points.

    A seed of which one is missing could reach less only, so it is left out.
    """
    cells: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["points"]:
            cells.setdefault((row["method"], row["seed"]), []).append(row)
    found: dict[str, dict[int, Curve]] = {}
    for (method, seed), of_cell in cells.items():
        if len(of_cell) == factors:
            points = [point for row in of_cell for point in row["points"]]
            found.setdefault(method, {})[seed] = _curve(points, references[seed])
    return found


def _curve(points: Sequence[Mapping[str, Any]], reference: Mapping[str, Any]) -> Curve:
    gains = np.stack([_halves(point) for point in points], axis=1) - _halves(reference)[:, None]
    return Curve(np.asarray([point["kl"] for point in points], dtype=np.float64), gains)


def _halves(point: Mapping[str, Any]) -> Floats:
    """(2,) mean rewards of the beginnings at even and at odd places."""
    rewards = np.asarray(point["rewards"], dtype=np.float64)
    return np.asarray([rewards[half::2].mean() for half in (0, 1)])


def analyse(
    rows: Sequence[Mapping[str, Any]],
    references: Mapping[int, Mapping[str, Any]],
    factors: int,
) -> dict[str, Any]:
    """Areas, differences and points, in plain values.

    Args:
        rows: one a run: method, beta, seed, and points with kl, reward and the beginnings' rewards.
        references: for each seed the reference's own rewards on the same beginnings.
        factors: runs of a method and a seed.

    A difference is taken up to the KL that both of its methods reached with every seed they share:
    what other methods reached does not enter.
    """
    found = curves(rows, references, factors)
    until = _reach(found, list(found))
    areas = {
        method: {seed: area(curve, until) for seed, curve in seeds.items()}
        for method, seeds in found.items()
    }
    there = {(row["method"], row["seed"]) for row in rows}
    whole = {(method, seed) for method, seeds in found.items() for seed in seeds}
    return {
        "kl_until": until,
        "areas": {
            method: {
                **_estimate(list(of_seeds.values())),
                "seeds": {str(seed): _plain(value) for seed, value in of_seeds.items()},
            }
            for method, of_seeds in areas.items()
        },
        "left_out": [f"{method} seed {seed}" for method, seed in sorted(there - whole)],
        "differences": _differences(found),
        "points": _points(rows, references),
    }


def _reach(
    found: Mapping[str, Mapping[int, Curve]],
    methods: Sequence[str],
    seeds: Sequence[int] | None = None,
) -> float:
    """The largest KL that all of the methods attain with every seed (of `seeds`)."""
    reaches = [
        float(curve.kl.max())
        for method in methods
        for seed, curve in found[method].items()
        if seeds is None or seed in seeds
    ]
    return max(0.0, min(reaches, default=0.0))


def claims(results: Mapping[str, Any]) -> list[Claim]:
    """What the paper says, as numbers of `analyse` that can come out either way."""
    texts = {
        "mallows_theta": "MallowsPO-theta has a better frontier than DPO",
        "mallows_phi": "MallowsPO-phi has a better frontier than DPO",
        "mallows_ipo": "Mallows-IPO has a better frontier than IPO",
    }
    found = []
    for entry in results["differences"]:
        name = entry["method"]
        if name in texts and entry["against"] == ("ipo" if name == "mallows_ipo" else BASELINE):
            found.append(_claim(texts[name], entry))
        elif (name, entry["against"]) in CONTROLS:
            found.append(_claim(CONTROLS[name, entry["against"]], entry))
    return found


def _claim(text: str, entry: Mapping[str, Any]) -> Claim:
    measure = f"area of {entry['method']} minus {entry['against']}, probability of positive"
    return Claim(text, measure, t_estimate([v for v in entry["seeds"].values() if v is not None]))


def _differences(found: Mapping[str, Mapping[int, Curve]]) -> list[dict[str, Any]]:
    """Paired by seed: each method less the baseline, and the pairs that a control decides."""
    wanted = [(name, BASELINE) for name in found if name != BASELINE]
    wanted += [("mallows_ipo", "ipo"), *CONTROLS]
    rows = []
    for name, other in wanted:
        if name not in found or other not in found:
            continue
        shared = sorted(set(found[name]) & set(found[other]))
        until = _reach(found, (name, other), shared)
        gaps = [area(found[name][seed], until) - area(found[other][seed], until) for seed in shared]
        rows.append(
            {
                "method": name,
                "against": other,
                "kl_until": until,
                **_estimate(gaps),
                "p": _p_value(gaps),
                "detectable": _detectable(gaps),
                "seeds": {str(s): _plain(g) for s, g in zip(shared, gaps, strict=True)},
            }
        )
    tested = [entry for entry in rows if entry["p"] is not None]
    for entry, corrected in zip(tested, holm([e["p"] for e in tested]), strict=True):
        entry["p_holm"] = corrected
    return rows


def _p_value(gaps: Sequence[float]) -> float | None:
    """Two-sided paired t test over seeds; None where there is no spread to test by."""
    known = np.asarray(gaps)
    if len(known) < 2 or np.isnan(known).any() or known.std() == 0:
        return None
    return float(ttest_1samp(known, 0).pvalue)  # type: ignore[union-attr]


def _detectable(gaps: Sequence[float]) -> float | None:
    known = np.asarray(gaps)
    if len(known) < 2 or np.isnan(known).any():
        return None
    return detectable(float(known.std(ddof=1)) / math.sqrt(len(known)), len(known) - 1)


def _points(
    rows: Sequence[Mapping[str, Any]], references: Mapping[int, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """For each method, beta and point of a run: reward, gain and KL, means over seeds."""
    groups: dict[tuple[str, float, int], list[tuple[float, float, float, float]]] = {}
    for row in rows:
        for number, point in enumerate(row["points"]):
            gain = point["reward"] - references[row["seed"]]["reward"]
            values = (point["step"], point["reward"], gain, point["kl"])
            groups.setdefault((row["method"], row["beta"], number), []).append(values)
    found = []
    for (method, beta, _), values in groups.items():
        steps, *columns = np.asarray(values).T
        estimates = zip(("reward", "gain", "kl"), map(_estimate, columns), strict=True)
        # Seeds may differ by a pair whose rewards are equal, and so by a step.
        step = round(float(steps.mean()), 1)
        found.append({"method": method, "beta": beta, "step": step, **dict(estimates)})
    return found


def point_rows(
    rows: Sequence[Mapping[str, Any]], references: Mapping[int, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each point of each run, and for each seed's reference: what areas are made of."""
    wholes = [{"method": "reference", "seed": seed, **point} for seed, point in references.items()]
    wholes += [{**row, **point} for row in rows for point in row["points"]]
    names = ("method", "beta", "seed", "step", "reward", "kl", "log_odds", "tokens_mean")
    return [
        {name: whole.get(name) for name in names}
        | dict(zip(("reward_even", "reward_odd"), _halves(whole).tolist(), strict=True))
        for whole in wholes
    ]


def _estimate(values: Sequence[float] | Floats) -> dict[str, Any]:
    found = t_estimate(values)
    names = ("value", "low", "high")
    return {**{name: _plain(getattr(found, name)) for name in names}, "count": found.prompts}


def _plain(value: float) -> float | None:
    return None if value != value else float(value)
