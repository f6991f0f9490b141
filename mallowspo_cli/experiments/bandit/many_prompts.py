"""The bandit of many prompts: half of low and half of high dispersion, with shared parameters.

What is drawn is in `world`. Two regimes: **converged** as in `solver`, and
**first_step**, the direction of the first plain gradient step, where fine-tuning begins. A regime
gives a direction; a policy is the direction times a scale. For a converged one that is 1 / beta
(every loss reads beta times the gap), so where the loss has a minimum the path over beta is one
ray. Methods are compared at equal mean KL *of the prompts that are measured*: each group of prompts
at a scale of its own, as else the group that got more of one KL would win for that alone. Converged
ones are compared at equal beta too, and where beta is chosen for each by one rule: the most of
reward - penalty * KL over the *other* seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
import torch

from mallowspo_cli.experiments.bandit.methods import (
    CONSTANT,
    SHUFFLED,
    TRUE,
    UNIT_MEAN,
    Variant,
    objective,
    own_beta,
    variants,
)
from mallowspo_cli.experiments.bandit.one_prompt import Grid, arm_pairs
from mallowspo_cli.experiments.bandit.outcomes import (
    TIE,
    divergence,
    kl_targets,
    only_at_kl,
    order_accuracy,
    regret,
    scale_to_kl,
    softmax,
    with_ties,
)
from mallowspo_cli.experiments.bandit.solver import BUDGET, Problem, first_step, solve
from mallowspo_cli.experiments.bandit.world import PromptsGrid, World, draw_world, told_thetas
from mallowspo_cli.experiments.mallows_model import Floats, Ints

REGIMES: Final = ("converged", "first_step")
TOLD: Final = (TRUE, UNIT_MEAN, CONSTANT, SHUFFLED)
MEAN_KL_TARGETS: Final = (0.1, 0.3, 0.5, 0.8)
"""Nats, averaged over the prompts."""
PENALTIES: Final = (0.05, 0.1, 0.3)
"""Reward that a nat of KL costs where beta is chosen."""
TUNING_BETAS: Final = tuple(float(beta) for beta in np.geomspace(1e-4, 1e3, 71))
"""Times the mean weight. Wide, so that no method's choice is at an end."""
GROUPS: Final = ("all", "low", "high", "new")
"""Prompts trained on: all, those of low and of high dispersion; and prompts not trained on."""
MEASURES: Final = ("reward", "accuracy", "kl", "max_arm")


@dataclass(frozen=True)
class ManyPrompts:
    """Outcomes of every setting."""

    grid: PromptsGrid
    distances: tuple[str, ...]
    variants: list[Variant]
    at: list[str]
    """kl=K of MEAN_KL_TARGETS, of each group of prompts its own; beta=B of the grid and tuned=P of
    PENALTIES, one policy for all groups, which are NaN for the first step."""
    values: dict[str, Floats]
    """Each of MEASURES, (variant, regime, at, group, conflict, distance, prompt_pairs, seed)."""
    chosen_betas: Floats
    """(variant, penalty, conflict, distance, prompt_pairs, seed) times the mean weight."""

    @property
    def chosen_at_an_end(self) -> int:
        """How many choices are the least or the most peaked policy that was tried."""
        ends = (TUNING_BETAS[0], TUNING_BETAS[-1])
        return int(np.isin(self.chosen_betas, ends).sum())


def tuned(penalty: float) -> str:
    """Name of the place where beta is chosen."""
    return f"tuned={penalty:g}"


def run_many_prompts(grid: Grid, wanted: PromptsGrid) -> ManyPrompts:
    """Draw, solve and measure; the grid has at least two dispersions."""
    world = draw_world(grid, wanted)
    chosen = variants(grid.objectives, TOLD)
    targets, most = kl_targets(MEAN_KL_TARGETS, grid.arms), max(grid.betas)
    at = [*(f"kl={kl:g}" for kl in targets), *(f"beta={beta:g}" for beta in grid.betas)]
    at += [tuned(penalty) for penalty in PENALTIES]
    settings = world.counts.shape[:4]
    shape = (len(chosen), len(REGIMES), len(at), len(GROUPS), *settings)
    values = {name: np.full(shape, np.nan) for name in MEASURES}
    betas = np.full((len(chosen), len(PENALTIES), *settings), np.nan)
    for (index, variant), (regime, name) in product(enumerate(chosen), enumerate(REGIMES)):
        ray, strength = _ray(world, variant, name, most)
        trained, new = (_logits(of, ray) for of in (world.features, world.new_features))
        tie = tie_of(trained, strength if name == "converged" else None)
        if name == "converged":
            # A large scale would make a preference of the hair that the solver leaves in ties.
            trained, new = with_ties(trained, tie), with_ties(new, tie)
        groups = _groups(world, trained, new)
        found = [_at_kl(groups, tie, target) for target in targets]
        if name == "converged":
            scales = [most / own_beta(variant.method, beta) for beta in grid.betas]
            choices, betas[index] = _choose(groups[0], strength)
            scales = [*(np.full(settings, scale) for scale in scales), *choices]
            found += [[_measures(logits, tie, scale) for logits in groups] for scale in scales]
        for place, of_groups in enumerate(found):
            for group, measured in enumerate(of_groups):
                for measure in MEASURES:
                    values[measure][index, regime, place, group] = measured[measure]
    return ManyPrompts(wanted, grid.distances, chosen, at, values, betas)


def tie_of(logits: Floats, strength: Floats | None) -> Floats:
    """(conflict, distance, prompt_pairs, seed, 1, 1) width of a tie between (..., prompts, arms).

    In units of the link where there is a strength, beta times the mean weight, (seed,). A first
    step has no such unit, it grows with beta: there the unit is its largest logit.
    """
    if strength is None:
        return TIE * np.abs(logits).max(axis=(-1, -2), keepdims=True)
    return np.broadcast_to(TIE / strength, logits.shape[:-2])[..., None, None]


def choose_betas(worth: Floats) -> Ints:
    """(..., seed) place of the beta that does best on the *other* seeds, of (beta, ..., seed)."""
    return (worth.sum(axis=-1, keepdims=True) - worth).argmax(axis=0)


def _ray(world: World, variant: Variant, regime: str, beta: float) -> tuple[Floats, Floats]:
    """(conflict, distance, prompt_pairs, seed, features) parameters at `beta` in that regime, and
    their strength, beta times the mean weight, (seed,).
    """
    *settings, prompts, arms, _ = world.counts.shape
    winner, loser = arm_pairs(arms)
    theta = told_thetas(world.theta, world.shuffles, variant.told)
    gaps = world.features[..., winner, :] - world.features[..., loser, :]
    gaps = gaps.reshape(*gaps.shape[:2], prompts * len(winner), -1)[:, None, None]
    share = world.counts[..., winner, loser].reshape(*settings, -1)
    every = np.repeat(theta, len(winner), axis=-1)
    weight = 2 * theta.mean(axis=-1)
    problem = Problem(
        design=_flat(gaps, (*settings, *gaps.shape[-2:]), 2),
        share=_flat(share / share.sum(-1, keepdims=True), share.shape, 1),
        neg_log_phi=_flat(every, share.shape, 1),
        budget=_flat(BUDGET / weight**2, tuple(settings), 0),
    )
    run = solve if regime == "converged" else first_step
    found = run(objective(variant.method, beta), problem).numpy()
    return found.reshape(*settings, -1), beta * weight


def _flat(values: Floats, shape: tuple[int, ...], last: int) -> torch.Tensor:
    """Spread to the shape, all but the `last` axes in one."""
    spread = np.broadcast_to(values, shape)
    return torch.from_numpy(spread.reshape(-1, *shape[len(shape) - last :]).copy())


def _logits(features: Floats, ray: Floats) -> Floats:
    """(conflict, distance, prompt_pairs, seed, prompts, arms)."""
    return np.einsum("cspaf,cdksf->cdkspa", features, ray)


def _groups(world: World, trained: Floats, new: Floats) -> list[Floats]:
    """Logits of each of GROUPS."""
    half = int((world.theta == world.theta[0]).sum())
    return [trained, trained[..., :half, :], trained[..., half:, :], new]


def _at_kl(groups: Sequence[Floats], tie: Floats, target: float) -> list[dict[str, Floats]]:
    """MEASURES of each group at that mean KL of its own, NaN where it cannot have it."""
    return [
        only_at_kl(_measures(logits, tie, scale_to_kl(logits, target, prompts=1)), target)
        for logits in groups
    ]


def _measures(logits: Floats, tie: Floats, scale: Floats) -> dict[str, Floats]:
    """Each of MEASURES, (conflict, distance, prompt_pairs, seed), means over the prompts."""
    scaled = scale[..., None, None] * logits
    probabilities = softmax(scaled)
    return {
        "reward": 1 - regret(probabilities).mean(axis=-1),
        "accuracy": order_accuracy(logits, tie).mean(axis=-1),
        "kl": divergence(scaled).mean(axis=-1),
        "max_arm": probabilities.max(axis=-1).mean(axis=-1),
    }


def _choose(logits: Floats, strength: Floats) -> tuple[list[Floats], Floats]:
    """A scale for each of PENALTIES, (conflict, distance, prompt_pairs, seed), and the betas,
    (penalty, ...), times the mean weight, that do best on the other seeds of a setting.
    """
    # Scale times beta is the same policy whatever mean weight a method was told.
    tried = np.stack([np.broadcast_to(strength / b, logits.shape[:-2]) for b in TUNING_BETAS])
    rewards, costs = np.empty_like(tried), np.empty_like(tried)
    for index, scale in enumerate(tried):
        scaled = scale[..., None, None] * logits
        rewards[index] = 1 - regret(softmax(scaled)).mean(axis=-1)
        costs[index] = divergence(scaled).mean(axis=-1)
    best = np.stack([choose_betas(rewards - penalty * costs) for penalty in PENALTIES])
    scales = [np.take_along_axis(tried, one[None], axis=0)[0] for one in best]
    return scales, np.asarray(TUNING_BETAS)[best]
