"""The bandit's methods: which objective, and which dispersion it is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from mallowspo_cli.experiments.mallows_model import Floats
from mallowspo_cli.objectives import Objective
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.ipo import IPO
from mallowspo_cli.objectives.mallows import Link, MallowsIPO, MallowsPhi, MallowsTheta

LABELS = {
    "dpo": "DPO",
    "ipo": "IPO",
    "mallows_theta": "Mallows-theta",
    "mallows_phi_exact": "Mallows-phi, exact",
    "mallows_phi_smooth": "Mallows-phi, smooth",
    "mallows_ipo": "Mallows-IPO",
}
METHODS = tuple(LABELS)
TRUE, UNIT_MEAN, CONSTANT, SHUFFLED = "true", "unit_mean", "constant", "shuffled"
"""What a method is told of phi: the truth; the truth with w scaled to mean 1 over the prompts or
dispersions of the grid, as training does; the mean of w for all; the truth of other prompts."""

PHI_BETAS: Final = 3.0
"""Mallows-phi's beta over the others' at "equal" beta. Its link is a third as steep at a gap of 0
(the method notes, 1.5), so with the same number it would be the others at a third of beta."""


@dataclass(frozen=True)
class Variant:
    """A method with what it is told of phi."""

    method: str
    told: str = ""
    """TRUE, UNIT_MEAN, CONSTANT, SHUFFLED, a wrong phi as a number, or nothing."""

    @property
    def baseline(self) -> str:
        """The method that it is compared with: what it would be with w = 1, or nearest to it."""
        return "ipo" if self.method == "mallows_ipo" else "dpo"


def objective(method: str, beta: float) -> Objective:
    """One of METHODS, as it trains. Its loss reads beta times the log-ratio gap, and phi."""
    match method:
        case "dpo":
            return DPO(beta=beta)
        case "ipo":
            return IPO(beta=beta)
        case "mallows_theta":
            return MallowsTheta(beta=beta)
        case "mallows_phi_exact":
            return MallowsPhi(beta=beta, link=Link.exact)
        case "mallows_phi_smooth":
            return MallowsPhi(beta=beta, link=Link.smooth)
        case "mallows_ipo":
            return MallowsIPO(beta=beta)
    raise ValueError(f"expected one of {METHODS}, found {method!r}")


def own_beta(method: str, beta: float) -> float:
    """The beta of a method that counts as equal to DPO's `beta`."""
    return PHI_BETAS * beta if method.startswith("mallows_phi") else beta


def variants(methods: Sequence[str], told: Sequence[str]) -> list[Variant]:
    """Each method with each of what it can be told; DPO and IPO are told nothing."""
    found = []
    for method in methods:
        needs = objective(method, 1.0).needs_dispersion
        found += [Variant(method, what) for what in (told if needs else ("",))]
    return found


def neg_log(phi: float) -> float:
    """theta = -log phi."""
    return float(-np.log(phi))


def unit_mean(theta: Floats, axis: int | None = None) -> Floats:
    """theta scaled so that w = 2 theta has mean 1 along the axis."""
    return theta / (2 * theta.mean(axis=axis, keepdims=axis is not None))
