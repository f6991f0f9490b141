"""The bandit of many prompts: half of low and half of high dispersion, with shared parameters.

What is drawn is in `world`. Two regimes: **converged** as in `solver`, and
**first_step**, the direction of the first plain gradient step, where fine-tuning begins. A regime
gives a direction; a policy is the direction times a scale. For a converged one that is 1 / beta
(every loss reads beta times the gap), so the path over beta is one ray. Methods are compared at
equal mean KL; converged ones at equal beta too, and where beta is chosen for each by one rule: the
most of reward - PENALTY * KL over the *other* seeds.
"""

from dataclasses import dataclass
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
    variants,
)
from mallowspo_cli.experiments.bandit.one_prompt import Grid, arm_pairs
from mallowspo_cli.experiments.bandit.outcomes import (
    TIE,
    divergence,
    order_accuracy,
    regret,
    scale_to_kl,
    softmax,
)
from mallowspo_cli.experiments.bandit.solver import BUDGET, Problem, first_step, solve
from mallowspo_cli.experiments.bandit.world import PromptsGrid, World, draw_world, told_thetas
from mallowspo_cli.experiments.mallows_model import Floats

REGIMES: Final = ("converged", "first_step")
TOLD: Final = (TRUE, UNIT_MEAN, CONSTANT, SHUFFLED)
MEAN_KL_TARGETS: Final = (0.1, 0.3, 0.5, 0.8)
"""Nats, averaged over the prompts."""
PENALTY: Final = 0.1
"""Reward that a nat of KL costs where beta is chosen."""
TUNING_BETAS: Final = tuple(float(beta) for beta in np.geomspace(0.001, 100, 51))
"""Times the mean weight. Wide, so that no method's choice is at an end."""
GROUPS: Final = ("all", "low", "high", "new")
"""Prompts trained on: all, those of low and of high dispersion; and prompts not trained on."""
MEASURES: Final = ("reward", "accuracy", "kl", "max_arm")


@dataclass(frozen=True)
class ManyPrompts:
    """Outcomes of every setting."""

    grid: PromptsGrid
    variants: list[Variant]
    at: list[str]
    """kl=K of MEAN_KL_TARGETS; beta=B of the grid and tuned, which are NaN for the first step."""
    values: dict[str, Floats]
    """Each of MEASURES, (variant, regime, at, group, conflict, distance, prompt_pairs, seed)."""
    chosen_betas: Floats
    """(variant, conflict, distance, prompt_pairs, seed) times the mean weight, at `tuned`."""


def run_many_prompts(grid: Grid, wanted: PromptsGrid) -> ManyPrompts:
    """Draw, solve and measure; the grid has at least two dispersions."""
    world = draw_world(grid, wanted)
    chosen = variants(grid.objectives, TOLD)
    at = [*(f"kl={kl:g}" for kl in MEAN_KL_TARGETS)]
    at += [*(f"beta={beta:g}" for beta in grid.betas), "tuned"]
    settings = world.counts.shape[:4]
    shape = (len(chosen), len(REGIMES), len(at), len(GROUPS), *settings)
    values = {name: np.full(shape, np.nan) for name in MEASURES}
    betas = np.full((len(chosen), *settings), np.nan)
    for index, variant in enumerate(chosen):
        for regime, name in enumerate(REGIMES):
            ray, strength = _ray(world, variant, name, max(grid.betas))
            logits = _logits(world.features, ray)
            scales = [scale_to_kl(logits, target, prompts=1) for target in MEAN_KL_TARGETS]
            if name == "converged":
                tuned, betas[index] = _tuned(logits, strength)
                scales += [np.full(settings, max(grid.betas) / beta) for beta in grid.betas]
                scales.append(tuned)
            for place, scale in enumerate(scales):
                for measure, found in _measures(world, ray, strength, scale).items():
                    values[measure][index, regime, place] = found
    return ManyPrompts(wanted, chosen, at, values, betas)


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


def _tuned(logits: Floats, strength: Floats) -> tuple[Floats, Floats]:
    """(scale, beta), (conflict, distance, prompt_pairs, seed) each: beta, times the mean weight,
    does best on the other seeds of a setting.
    """
    # Scale times beta is the same policy whatever mean weight a method was told.
    tried = [np.broadcast_to(strength / beta, logits.shape[:-2]) for beta in TUNING_BETAS]
    worth = np.stack([_worth(logits, scale) for scale in tried])
    best = (worth.sum(axis=-1, keepdims=True) - worth).argmax(axis=0)
    scale = np.take_along_axis(np.stack(tried), best[None], axis=0)[0]
    return scale, np.asarray(TUNING_BETAS)[best]


def _worth(logits: Floats, scale: Floats) -> Floats:
    """(...,) mean reward less PENALTY times mean KL over the prompts trained on."""
    scaled = scale[..., None, None] * logits
    reward = 1 - regret(softmax(scaled)).mean(axis=-1)
    return reward - PENALTY * divergence(scaled).mean(axis=-1)


def _measures(world: World, ray: Floats, strength: Floats, scale: Floats) -> dict[str, Floats]:
    """Each of MEASURES, (group, conflict, distance, prompt_pairs, seed)."""
    half = int((world.theta == world.theta[0]).sum())
    tie = (TIE / strength)[:, None, None]
    of = []
    for features in (world.features, world.new_features):
        logits = _logits(features, ray)
        scaled = scale[..., None, None] * logits
        probabilities = softmax(scaled)
        of.append(
            {
                "reward": 1 - regret(probabilities),
                "accuracy": order_accuracy(logits, tie),
                "kl": divergence(scaled),
                "max_arm": probabilities.max(axis=-1),
            }
        )
    old, new = of
    return {
        name: np.stack(
            [
                old[name].mean(axis=-1),
                old[name][..., :half].mean(axis=-1),
                old[name][..., half:].mean(axis=-1),
                new[name].mean(axis=-1),
            ]
        )
        for name in MEASURES
    }
