"""Controlled sentiment: which runs make a frontier of reward against KL, and what it says.

A frontier is what a method reaches over its betas and over the steps of a run, one for each seed.
Seeds draw their own beginnings, pairs and order; methods share them, so differences are paired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_1samp

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.evaluation.claims import Claim, t_estimate
from mallowspo_cli.evaluation.comparing.paired import holm
from mallowspo_cli.recipe.nearest import nearest

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
class Method:
    """A loss as the experiment runs it."""

    name: str
    words: tuple[str, ...]
    """Recipe words without beta."""
    beta: float
    """At factor 1."""
    what: str


METHODS: Final[Mapping[str, Method]] = {
    method.name: method
    for method in (
        Method("dpo", ("objective=dpo",), 0.1, "DPO"),
        Method("ipo", ("objective=ipo",), 0.1, "IPO, (beta h - 1/2)^2 on summed log-probs"),
        # 2 on mean log-probs of 16 tokens starts about as fast as 0.1 on sums.
        Method("simpo", ("objective=simpo",), 2.0, "SimPO, no reference, mean log-probs"),
        Method("mallows_theta", ("objective=mallows_theta",), 0.1, "MallowsPO-theta"),
        # The link's slope at 0 is theta / 6 against theta / 2.
        Method("mallows_phi", ("objective=mallows_phi",), 0.3, "MallowsPO-phi, exact link"),
        Method("mallows_ipo", ("objective=mallows_ipo",), 0.1, "Mallows-IPO"),
        Method(
            "theta_shuffled",
            ("objective=mallows_theta", "dispersion.mode=shuffled"),
            0.1,
            "control: MallowsPO-theta with the weights of other pairs",
        ),
        # With a constant weight theta is DPO to the bit, so the control is phi's.
        Method(
            "phi_constant",
            ("objective=mallows_phi", "dispersion.mode=constant"),
            0.3,
            "control: MallowsPO-phi with w = 1 for every pair",
        ),
        Method(
            "theta_inverse",
            ("objective=mallows_theta", "dispersion.mode=inverse"),
            0.1,
            "control: MallowsPO-theta with weights the wrong way round",
        ),
        Method(
            "phi_smooth",
            ("objective=mallows_phi", "objective.link=smooth"),
            0.3,
            "MallowsPO-phi, smooth link",
        ),
    )
}


MAIN: Final = tuple(METHODS)[:8]
"""What `all` stands for."""


@dataclass(frozen=True)
class Job:
    """One training run."""

    method: Method
    factor: float
    seed: int

    @property
    def beta(self) -> float:
        """The run's objective.beta."""
        return float(f"{self.method.beta * self.factor:.12g}")

    @property
    def name(self) -> str:
        """Of its row's file."""
        return f"{self.method.name}-beta{self.beta:g}-seed{self.seed}"

    def words(self) -> list[str]:
        """Recipe words."""
        return [*self.method.words, f"objective.beta={self.beta:g}", f"seed={self.seed}"]


def chosen_methods(text: str) -> list[Method]:
    """The methods of NAME,NAME or `all`.

    Raises:
        RecipeError: an unknown name.
    """
    names = list(MAIN) if text == "all" else list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in METHODS:
            raise RecipeError(
                f"no method named '{name}'.{nearest(name, METHODS)} Choices: all, or some of "
                f"{','.join(METHODS)}."
            )
    return [METHODS[name] for name in names]


def all_jobs(
    methods: Sequence[Method], factors: Sequence[float], seeds: Sequence[int]
) -> list[Job]:
    """Every run, seed by seed, so that an unfinished experiment has whole seeds."""
    return [Job(method, factor, seed) for seed in seeds for factor in factors for method in methods]


def gain_at(kl: Floats, gain: Floats, grid: Floats) -> Floats:
    """(G,) the gain that points make attainable at a KL of each of (G,) `grid`: their upper hull.

    Points (N,) lie in any order; the reference itself, (0, 0), is one of them. A policy drawn at
    random for each answer mixes two points: its reward lies on the line between them, and its KL
    not above (KL is convex). Behind the best point the hull is flat.
    """
    points = sorted(zip(np.maximum(kl, 0).tolist(), gain.tolist(), strict=True))
    hull = [(0.0, max([0.0, *(y for x, y in points if x == 0)]))]
    for x, y in points:
        if y <= hull[-1][1] or x == 0:
            continue
        while len(hull) > 1 and _slope(hull[-2], (x, y)) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append((x, y))
    xs, ys = zip(*hull, strict=True)
    return np.interp(grid, xs, ys)


def _slope(first: tuple[float, float], second: tuple[float, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


def area(kl: Floats, gain: Floats, until: float) -> float:
    """Mean of `gain_at` over KL from 0 to `until`: the gain in reward at a KL drawn evenly."""
    if until <= 0:
        return float("nan")
    grid = np.linspace(0, until, 513)
    return float(np.trapezoid(gain_at(kl, gain, grid), grid) / until)


@dataclass(frozen=True)
class Curve:
    """What a method reached with one seed, over betas and steps."""

    kl: Floats
    gain: Floats
    """Reward less the reference's on the same beginnings."""


def curves(rows: Sequence[Mapping[str, Any]], reference: float) -> dict[str, dict[int, Curve]]:
    """For each method and seed, its points. `reference` is the reference's own reward."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for row in rows:
        points = found.setdefault(row["method"], {}).setdefault(row["seed"], [])
        points += [(point["kl"], point["reward"] - reference) for point in row["points"]]
    return {
        method: {
            seed: Curve(*np.asarray(points, dtype=np.float64).T)
            for seed, points in sorted(of_method.items())
        }
        for method, of_method in found.items()
    }


def analyse(rows: Sequence[Mapping[str, Any]], reference: float) -> dict[str, Any]:
    """Areas, differences from the baseline and points, in plain values.

    Areas reach to the KL that every method attains with every seed, so that none is extrapolated.
    """
    found = curves(rows, reference)
    reaches = [float(curve.kl.max()) for seeds in found.values() for curve in seeds.values()]
    until = max(0.0, min(reaches, default=0.0))
    areas = {
        method: {seed: area(curve.kl, curve.gain, until) for seed, curve in seeds.items()}
        for method, seeds in found.items()
    }
    return {
        "kl_until": until,
        "areas": {
            method: {
                **_estimate(list(of_seeds.values())),
                "seeds": {str(seed): _plain(value) for seed, value in of_seeds.items()},
            }
            for method, of_seeds in areas.items()
        },
        "differences": _differences(areas),
        "points": _points(rows, reference),
    }


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


def _differences(areas: Mapping[str, Mapping[int, float]]) -> list[dict[str, Any]]:
    """Paired by seed: each method less the baseline, and the pairs that a control decides."""
    wanted = [(name, BASELINE) for name in areas if name != BASELINE]
    wanted += [("mallows_ipo", "ipo"), *CONTROLS]
    found = []
    for name, other in wanted:
        if name not in areas or other not in areas:
            continue
        shared = sorted(set(areas[name]) & set(areas[other]))
        gaps = [areas[name][seed] - areas[other][seed] for seed in shared]
        found.append(
            {
                "method": name,
                "against": other,
                **_estimate(gaps),
                "p": _p_value(gaps),
                "seeds": {str(s): _plain(g) for s, g in zip(shared, gaps, strict=True)},
            }
        )
    tested = [entry for entry in found if entry["p"] is not None]
    for entry, corrected in zip(tested, holm([e["p"] for e in tested]), strict=True):
        entry["p_holm"] = corrected
    return found


def _p_value(gaps: Sequence[float]) -> float | None:
    """Two-sided paired t test over seeds; None where there is no spread to test by."""
    known = np.asarray(gaps)
    if len(known) < 2 or np.isnan(known).any() or known.std() == 0:
        return None
    return float(ttest_1samp(known, 0).pvalue)  # type: ignore[union-attr]


def _points(rows: Sequence[Mapping[str, Any]], reference: float) -> list[dict[str, Any]]:
    """For each method, beta and step: reward, gain and KL, means over seeds."""
    groups: dict[tuple[str, float, int], list[tuple[float, float]]] = {}
    for row in rows:
        for point in row["points"]:
            key = (row["method"], row["beta"], point["step"])
            groups.setdefault(key, []).append((point["reward"], point["kl"]))
    found = []
    for (method, beta, step), values in groups.items():
        rewards, kls = np.asarray(values).T
        found.append(
            {
                "method": method,
                "beta": beta,
                "step": step,
                "reward": _estimate(rewards),
                "gain": _estimate(rewards - reference),
                "kl": _estimate(kls),
            }
        )
    return found


def _estimate(values: Sequence[float] | Floats) -> dict[str, Any]:
    found = t_estimate(values)
    names = ("value", "low", "high")
    return {**{name: _plain(getattr(found, name)) for name in names}, "count": found.prompts}


def _plain(value: float) -> float | None:
    return None if value != value else float(value)
