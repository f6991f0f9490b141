"""The bandits' outcomes as rows: single seeds, means over seeds, and means over settings too."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any, Final

import numpy as np
from scipy.stats import t as student

from mallowspo_cli.evaluation.claims import Claim, t_estimate
from mallowspo_cli.experiments.bandit.claims import AT_KL
from mallowspo_cli.experiments.bandit.many_prompts import (
    GROUPS,
    MEAN_KL_TARGETS,
    MEASURES,
    PENALTY,
    REGIMES,
    ManyPrompts,
)
from mallowspo_cli.experiments.bandit.methods import LABELS, TRUE, Variant
from mallowspo_cli.experiments.bandit.one_prompt import KL_TARGETS, OnePrompt
from mallowspo_cli.experiments.bandit.outcomes import OUTCOMES
from mallowspo_cli.experiments.bandit.solver import BUDGET
from mallowspo_cli.experiments.mallows_model import Floats

Rows = Iterator[Sequence[Any]]
SUMMARISED: Final = ("max_arm", "kl", "regret", "accuracy")
"""Of OUTCOMES; entropy is log(arms) less kl."""


def results(
    one: OnePrompt, many: ManyPrompts | None, claims: dict[str, list[Claim]]
) -> dict[str, Any]:
    """Plain values: the set-up, means over seeds and settings with intervals, the claims."""
    return {
        "grid": asdict(one.grid),
        "prompts_grid": None if many is None else asdict(many.grid),
        "budget": BUDGET,
        "penalty": PENALTY,
        "kl_targets": list(KL_TARGETS),
        "mean_kl_targets": list(MEAN_KL_TARGETS),
        "compared_at": AT_KL,
        "labels": LABELS,
        "without_optimum": _without_optimum(one),
        "by_dispersion": _by_dispersion(one),
        "largest_sample": _by_dispersion(one, distance=0, pairs=int(np.argmax(one.grid.pairs))),
        "prompts": [] if many is None else _by_group(many),
        "prompts_by_setting": [] if many is None else _by_setting(one, many),
        "claims": {section: [claim.row() for claim in group] for section, group in claims.items()},
    }


def one_prompt_rows(one: OnePrompt) -> Rows:
    """A head, then a row for each setting and seed; settings that are none are left out."""
    yield ("method", "phi_told", "at", "distance", "dispersion", "pairs", "seed", *OUTCOMES)
    grid = one.grid
    seeds = range(grid.seed, grid.seed + grid.seeds)
    settings = list(product(grid.distances, grid.dispersions, grid.pairs, seeds))
    for (v, variant), (a, at) in product(enumerate(one.variants), enumerate(one.at)):
        columns = np.stack([one.outcomes[name][v, a].ravel() for name in OUTCOMES], axis=1)
        for setting, numbers in zip(settings, columns, strict=True):
            if not np.isnan(numbers[0]):
                yield (variant.method, variant.told, at, *setting, *numbers)


def one_prompt_summary(one: OnePrompt) -> Rows:
    """The same over the seeds: means, and half the width of the 95 % t interval."""
    names = [name for outcome in SUMMARISED for name in (outcome, f"{outcome}_half")]
    yield ("method", "phi_told", "at", "distance", "dispersion", "pairs", *names)
    grid = one.grid
    settings = list(product(grid.distances, grid.dispersions, grid.pairs))
    for (v, variant), (a, at) in product(enumerate(one.variants), enumerate(one.at)):
        columns = []
        for name in SUMMARISED:
            columns += _mean_and_half(one.outcomes[name][v, a].reshape(len(settings), -1))
        for setting, numbers in zip(settings, np.stack(columns, axis=1), strict=True):
            if not np.isnan(numbers[0]):
                yield (variant.method, variant.told, at, *setting, *numbers)


def many_prompts_rows(many: ManyPrompts, one: OnePrompt) -> Rows:
    """A head, then a row for each setting and seed, at AT_KL and at the chosen beta."""
    names = [f"{measure}_{group}" for measure, group in product(MEASURES, GROUPS)]
    yield (
        *("method", "phi_told", "regime", "at", "conflict", "distance", "pairs_of_a_prompt"),
        *("seed", "chosen_beta", *names),
    )
    grid = one.grid
    seeds = range(grid.seed, grid.seed + grid.seeds)
    settings = list(product(many.grid.conflicts, grid.distances, many.grid.prompt_pairs, seeds))
    places = [(many.at.index(name), name) for name in (AT_KL, "tuned")]
    for (v, variant), (r, regime), (a, at) in product(
        enumerate(many.variants), enumerate(REGIMES), places
    ):
        columns = np.concatenate([many.values[name][v, r, a] for name in MEASURES])
        betas = many.chosen_betas[v].ravel()
        for index, setting in enumerate(settings):
            numbers = columns.reshape(len(names), -1)[:, index]
            if not np.isnan(numbers[0]):
                beta = betas[index] if at == "tuned" else ""
                yield (variant.method, variant.told, regime, at, *setting, beta, *numbers)


def as_csv(rows: Rows) -> str:
    """Text of rows of names and numbers, the numbers to five digits or a millionth."""
    lines = (
        ",".join(f"{round(v, 6):.5g}" if isinstance(v, float) else str(v) for v in row)
        for row in rows
    )
    return "\n".join(lines) + "\n"


def _by_dispersion(
    one: OnePrompt, distance: int | None = None, pairs: int | None = None
) -> list[dict[str, Any]]:
    """Means over seeds, and over distances and sizes unless one is named, for each phi and all."""
    found = []
    for (v, variant), (a, at) in product(enumerate(one.variants), enumerate(one.at)):
        for place, phi in enumerate((*one.grid.dispersions, "all")):
            entry: dict[str, Any] = {**asdict(variant), "at": at, "phi": phi}
            for name in OUTCOMES:
                values = one.outcomes[name][v, a]
                values = values if distance is None else values[[distance]]
                values = values if phi == "all" else values[:, [place]]
                values = values if pairs is None else values[:, :, [pairs]]
                # A mean over some of the phi would be compared with one over all.
                entry[name] = _estimate(values if not np.isnan(values).any() else values[:0])
            found.append(entry)
    return found


def _without_optimum(one: OnePrompt) -> list[dict[str, Any]]:
    grid = one.grid
    return [
        {
            "distance": distance,
            "phi": phi,
            "share": [float(one.without_optimum[d, p, k].mean()) for k in range(len(grid.pairs))],
        }
        for d, distance in enumerate(grid.distances)
        for p, phi in enumerate(grid.dispersions)
    ]


def _by_group(many: ManyPrompts) -> list[dict[str, Any]]:
    """Means over seeds and settings by group of prompts, and the gain in reward."""
    found = []
    for (v, variant), (r, regime), (a, at), (g, group) in product(
        enumerate(many.variants), enumerate(REGIMES), enumerate(many.at), enumerate(GROUPS)
    ):
        if np.isnan(many.values["reward"][v, r, a, g]).all():
            continue
        entry = {**asdict(variant), "regime": regime, "at": at, "group": group}
        entry |= {name: _estimate(many.values[name][v, r, a, g]) for name in MEASURES}
        base = Variant(variant.baseline)
        if base in many.variants:
            rewards = many.values["reward"][:, r, a, g]
            entry["gain"] = _estimate(rewards[v] - rewards[many.variants.index(base)])
        found.append(entry)
    return found


def _by_setting(one: OnePrompt, many: ManyPrompts) -> list[dict[str, Any]]:
    """The gain in reward at AT_KL, all prompts, told the truth, setting by setting."""
    rewards = many.values["reward"][:, :, many.at.index(AT_KL), GROUPS.index("all")]
    found = []
    for variant in many.variants:
        base = Variant(variant.baseline)
        if variant.told != TRUE or base not in many.variants:
            continue
        gain = rewards[many.variants.index(variant)] - rewards[many.variants.index(base)]
        for (r, regime), (c, conflict), (d, distance), (k, pairs) in product(
            *map(
                enumerate,
                (REGIMES, many.grid.conflicts, one.grid.distances, many.grid.prompt_pairs),
            )
        ):
            found.append(
                {
                    **asdict(variant),
                    "regime": regime,
                    "conflict": conflict,
                    "distance": distance,
                    "pairs": pairs,
                    "gain": _estimate(gain[r, c, d, k]),
                }
            )
    return found


def _estimate(values: Floats) -> dict[str, float | int]:
    """Of (..., seed): averaged over the settings, then a t interval over seeds."""
    if not values.size:
        return asdict(t_estimate([]))
    return asdict(t_estimate(values.reshape(-1, values.shape[-1]).mean(axis=0)))


def _mean_and_half(values: Floats) -> list[Floats]:
    """[mean, half width of the 95 % t interval], (N,) each, of (N, seeds)."""
    seeds = values.shape[1]
    if seeds < 2:
        return [values.mean(axis=1), np.full(len(values), np.nan)]
    quantile = float(student.ppf(0.975, seeds - 1))
    return [values.mean(axis=1), quantile * values.std(axis=1, ddof=1) / np.sqrt(seeds)]
