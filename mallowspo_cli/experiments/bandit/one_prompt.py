"""The bandit of one prompt: arms, raters drawn from a Mallows model, and each method's policy.

A tabular softmax policy over the arms, a uniform reference, pairs of raters' preferences from an
exact Mallows law. All settings of a method and a beta are solved in one call (`solver`).

With one prompt the dispersion is one number. So **Mallows-theta at (beta, w) is DPO at w beta**,
and Mallows-IPO is IPO at w beta: what they gain at equal beta is a gain of the choice of beta.
Every loss here reads beta times the gap, so where the loss has a minimum its logits are a direction
over beta: a method's whole path of KL is one ray, on which methods are compared at equal KL without
interpolation. The ray is taken from the largest beta, with the solver's budget divided by w^2,
which makes it the same ray where two methods are the same but for the scale of beta. Where the loss
has no minimum, the budget decides how far the policy goes, and the ray is that of one beta: at
equal beta two budgets are reported, and claims at equal KL leave those samples out. Source of the
protocol: the method notes of this project, 3.1 (ours; the paper's set-up is unread).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from mallowspo_cli.experiments.bandit.methods import (
    METHODS,
    TRUE,
    UNIT_MEAN,
    Variant,
    neg_log,
    objective,
    own_beta,
    unit_mean,
    variants,
)
from mallowspo_cli.experiments.bandit.outcomes import (
    OUTCOMES,
    kl_targets,
    only_at_kl,
    outcomes,
    scale_to_kl,
    tie_width,
    with_ties,
)
from mallowspo_cli.experiments.bandit.solver import BUDGET, Problem, solve
from mallowspo_cli.experiments.mallows_model import DISTANCES, Floats, Ints, preference_counts

KL_TARGETS: Final = (0.1, 0.5, 1.0)
"""Nats at which methods are compared; a policy of five arms has at most log 5 = 1.61."""
BUDGETS: Final = (1e4, BUDGET)
"""Of the solver, at equal beta: a long training and one without end."""


@dataclass(frozen=True)
class Grid:
    """The settings: the product of all."""

    arms: int = 5
    distances: tuple[str, ...] = DISTANCES
    dispersions: tuple[float, ...] = (0.05, 0.3, 0.6065, 0.9)
    """phi of the raters; 0.6065 is where w = 1 and Mallows-theta is DPO."""
    pairs: tuple[int, ...] = (16, 100, 1000)
    betas: tuple[float, ...] = (0.05, 0.1, 0.5, 1.0)
    objectives: tuple[str, ...] = METHODS
    wrong_phi: tuple[float, ...] = (0.05, 0.9)
    """What a method is told instead of the truth; left out where it is the truth."""
    seeds: int = 60
    seed: int = 0


@dataclass(frozen=True)
class OnePrompt:
    """Outcomes of every setting."""

    grid: Grid
    variants: list[Variant]
    at: list[str]
    """Places on a method's path: `equal_beta` of each of BUDGETS, then kl=K of KL_TARGETS."""
    outcomes: dict[str, Floats]
    """Each of OUTCOMES, (variant, at, distance, dispersion, pairs, seed); NaN where a wrong phi is
    the truth, and where ties keep a policy from that KL."""
    without_optimum: Floats
    """(distance, dispersion, pairs, seed): 1 where the loss falls for ever on this sample."""


def run_one_prompt(grid: Grid) -> OnePrompt:
    """Draw, solve and measure. Raises RecipeError for arms that a distance cannot take."""
    counts = draw_counts(grid)
    chosen = variants(grid.objectives, (TRUE, UNIT_MEAN, *wrong_told(grid)))
    measured = [_outcomes_of(grid, variant, counts) for variant in chosen]
    return OnePrompt(
        grid,
        chosen,
        [
            *(place for budget in BUDGETS for place in equal_beta(grid, budget)),
            *(f"kl={kl:g}" for kl in kl_targets(KL_TARGETS, grid.arms)),
        ],
        {name: np.stack([values[name] for values in measured]) for name in OUTCOMES},
        without_optimum(counts).astype(np.float64),
    )


def equal_beta(grid: Grid, budget: float) -> list[str]:
    """Names of the places at equal beta under one of BUDGETS."""
    return [f"beta={beta:g} budget={budget_name(budget)}" for beta in grid.betas]


def budget_name(budget: float) -> str:
    """As 1e8."""
    return f"1e{round(np.log10(budget))}"


def draw_counts(grid: Grid) -> Floats:
    """(distance, dispersion, pairs, seed, arms, arms) how often one arm was preferred to another.

    A seed's samples are nested in size, and share their random numbers over the dispersions.
    """
    found = [
        [
            [
                preference_counts(distance, neg_log(phi), grid.arms, grid.pairs, (seed,))
                for seed in range(grid.seed, grid.seed + grid.seeds)
            ]
            for phi in grid.dispersions
        ]
        for distance in grid.distances
    ]
    return np.swapaxes(np.asarray(found), 2, 3)


def without_optimum(counts: Floats) -> NDArray[np.bool_]:
    """(...,) whether DPO's loss falls for ever on (..., arms, arms) counts.

    It has a minimum unless some arm beat another that never, directly or through others, beat it
    (Ford 1957). The same holds for the other losses but the squared ones, which always have one.
    """
    reached = counts > 0
    for _ in range(counts.shape[-1]):
        reached = reached | (reached.astype(np.int64) @ reached.astype(np.int64) > 0)
    one_way = (counts > 0) & ~np.swapaxes(reached, -1, -2)
    return np.asarray(one_way.any(axis=(-1, -2)))


def arm_pairs(arms: int) -> tuple[Ints, Ints]:
    """(winner, loser) of all ordered pairs, arms (arms - 1) of each."""
    winner, loser = np.nonzero(~np.eye(arms, dtype=bool))
    return winner, loser


def wrong_told(grid: Grid) -> list[str]:
    """The wrong phi of which at least one dispersion of the grid is another."""
    told = (f"{phi:g}" for phi in grid.wrong_phi)
    return [what for what in told if not np.isnan(told_theta(grid, what)).all()]


def told_theta(grid: Grid, told: str) -> Floats:
    """(dispersion,) theta that a method is told; NaN where a wrong phi is the truth."""
    truth = np.asarray([neg_log(phi) for phi in grid.dispersions])
    match told:
        case "":
            # Read by no loss of theirs; the weight of DPO.
            return np.full_like(truth, 0.5)
        case "true":
            return truth
        case "unit_mean":
            return unit_mean(truth)
    wrong = neg_log(float(told))
    return np.where(np.abs(truth - wrong) < 1e-9, np.nan, wrong)


def _outcomes_of(grid: Grid, variant: Variant, counts: Floats) -> dict[str, Floats]:
    """Each of OUTCOMES, (at, distance, dispersion, pairs, seed), of one method."""
    shape = counts.shape[:-2]
    theta = told_theta(grid, variant.told)[None, :, None, None]
    theta = np.broadcast_to(theta, shape)
    known = ~np.isnan(theta)
    weight = 2 * theta[known]
    found = []
    for budget in BUDGETS:
        bounds = np.full_like(weight, budget)
        for beta in (own_beta(variant.method, beta) for beta in grid.betas):
            logits = _solve(variant, beta, counts[known], theta[known], bounds)
            found.append(outcomes(logits, beta * weight))
    most = max(grid.betas)
    ray = _solve(variant, most, counts[known], theta[known], BUDGET / weight**2)
    ray = with_ties(ray, tie_width(most * weight, ray))
    for target in kl_targets(KL_TARGETS, grid.arms):
        scale = scale_to_kl(ray, target)
        scaled = outcomes(scale[:, None] * ray, most * weight / scale)
        found.append(only_at_kl(scaled, target))
    return {name: np.stack([_placed(values[name], known) for values in found]) for name in OUTCOMES}


def _solve(variant: Variant, beta: float, counts: Floats, theta: Floats, budget: Floats) -> Floats:
    """(B, arms) logits from (B, arms, arms) counts, (B,) theta and (B,) budget."""
    winner, loser = arm_pairs(counts.shape[-1])
    identity = torch.eye(counts.shape[-1], dtype=torch.float64)
    share = torch.from_numpy(counts[:, winner, loser])
    problem = Problem(
        design=identity[winner] - identity[loser],
        share=share / share.sum(-1, keepdim=True),
        neg_log_phi=torch.from_numpy(theta)[:, None].expand_as(share).contiguous(),
        budget=torch.from_numpy(budget),
    )
    return solve(objective(variant.method, beta), problem).numpy()


def _placed(values: Floats, known: NDArray[np.bool_]) -> Floats:
    """Values of the known settings in their places, NaN elsewhere."""
    whole = np.full(known.shape, np.nan)
    whole[known] = values
    return whole
