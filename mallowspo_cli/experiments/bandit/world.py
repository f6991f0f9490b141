"""What the many-prompts bandit is made of: features, central rankings, raters' preferences.

The logits of prompt x are features(x) @ u, of fewer parameters than there are arms: what is learned
on one prompt is used on all, so the weight w(x) can do what it cannot do with one prompt, let some
prompts speak louder. The features are Gaussian, drawn per seed. The central ranking of a prompt is
by features(x) @ u* + conflict * noise: with conflict 0 one u ranks all arms rightly, with 1 half of
the variance is of what the features do not see. Half of the prompts have the grid's lowest
dispersion, half its highest, and nothing else tells them apart.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from mallowspo_cli.experiments.bandit.methods import neg_log, unit_mean
from mallowspo_cli.experiments.bandit.one_prompt import Grid
from mallowspo_cli.experiments.mallows_model import Floats, Ints, preference_counts

NEW_PROMPTS: Final = 64
"""Prompts that are not trained on."""


@dataclass(frozen=True)
class PromptsGrid:
    """The settings beside the one-prompt grid's arms, distances, extremes of phi and seeds."""

    prompts: int = 16
    features: int = 8
    prompt_pairs: tuple[int, ...] = (8, 64)
    """Pairs of each prompt."""
    conflicts: tuple[float, ...] = (0.0, 1.0)


@dataclass(frozen=True)
class World:
    """What is drawn; the arms of each prompt are in their central order."""

    features: Floats
    """(conflict, seed, prompts, arms, features)."""
    new_features: Floats
    """The same of NEW_PROMPTS others."""
    counts: Floats
    """(conflict, distance, prompt_pairs, seed, prompts, arms, arms)."""
    theta: Floats
    """(prompts,) of the raters: the first half low in dispersion."""
    shuffles: Ints
    """(seed, prompts) the prompt whose theta is told instead."""


def draw_world(grid: Grid, wanted: PromptsGrid) -> World:
    """All that chance decides. A seed's world depends on arms, prompts and features, and not on the
    other seeds or the methods; its samples are nested in size.
    """
    arms, seeds = grid.arms, range(grid.seed, grid.seed + grid.seeds)
    shape = (wanted.prompts + NEW_PROMPTS, arms, wanted.features)
    theta = np.repeat(
        [neg_log(min(grid.dispersions)), neg_log(max(grid.dispersions))],
        [wanted.prompts // 2, wanted.prompts - wanted.prompts // 2],
    )
    features, shuffles = [], []
    for seed in seeds:
        generator = np.random.default_rng([seed, 2])
        drawn = generator.standard_normal(shape) / np.sqrt(wanted.features)
        seen = drawn @ generator.standard_normal(wanted.features)
        unseen = generator.standard_normal(shape[:2])
        order = [np.argsort(-(seen + conflict * unseen), axis=-1) for conflict in wanted.conflicts]
        features.append([np.take_along_axis(drawn, o[..., None], axis=1) for o in order])
        shuffles.append(generator.permutation(wanted.prompts))
    ordered = np.swapaxes(np.asarray(features), 0, 1)
    # The raters know the central order alone: preferences between its places, of any conflict.
    counts = np.asarray(
        [
            [
                [
                    preference_counts(distance, value, arms, wanted.prompt_pairs, (seed, 3, prompt))
                    for prompt, value in enumerate(theta)
                ]
                for seed in seeds
            ]
            for distance in grid.distances
        ]
    )
    counts = np.moveaxis(counts, 3, 1)
    return World(
        ordered[:, :, : wanted.prompts],
        ordered[:, :, wanted.prompts :],
        np.broadcast_to(counts, (len(wanted.conflicts), *counts.shape)),
        theta,
        np.asarray(shuffles),
    )


def told_thetas(theta: Floats, shuffles: Ints, told: str) -> Floats:
    """(seed, prompts) theta that a method is told."""
    every = np.broadcast_to(theta, shuffles.shape)
    match told:
        case "true":
            return every
        case "unit_mean":
            return unit_mean(every, axis=1)
        case "constant":
            return np.full(shuffles.shape, theta.mean())
        case "shuffled":
            return np.take(theta, shuffles)
    return np.full(shuffles.shape, 0.5)
