"""The bandits' results as plain values: the set-up, means over seeds and settings, claims."""

from dataclasses import asdict
from itertools import product
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mallowspo_cli.evaluation.claims import Claim, t_estimate
from mallowspo_cli.experiments.bandit.claims import AT_KL
from mallowspo_cli.experiments.bandit.many_prompts import (
    GROUPS,
    MEASURES,
    PENALTIES,
    REGIMES,
    ManyPrompts,
)
from mallowspo_cli.experiments.bandit.methods import LABELS, PHI_BETAS, TRUE, Variant, neg_log
from mallowspo_cli.experiments.bandit.one_prompt import (
    BUDGETS,
    Grid,
    OnePrompt,
    budget_name,
    equal_beta,
)
from mallowspo_cli.experiments.bandit.outcomes import OUTCOMES, mean_by_seed
from mallowspo_cli.experiments.mallows_model import Floats, pair_marginals

MOST_MISSED: Final = 0.01
"""Share of samples without the KL asked for up to which a mean over the others is shown."""


def results(
    one: OnePrompt,
    many: ManyPrompts | None,
    claims: dict[str, list[Claim]],
    main: dict[str, list[Claim]],
) -> dict[str, Any]:
    """Plain values: the set-up, means over seeds and settings with intervals, the claims."""
    return {
        "grid": asdict(one.grid),
        "prompts_grid": None if many is None else asdict(many.grid),
        "budgets": {budget_name(b): equal_beta(one.grid, b) for b in BUDGETS},
        "phi_betas": PHI_BETAS,
        "penalties": list(PENALTIES),
        "compared_at": AT_KL,
        "labels": LABELS,
        "agreement": _agreement(one.grid),
        "without_optimum": _without_optimum(one),
        "missed_kl": _missed_kl(one),
        "by_dispersion": _by_dispersion(one),
        "prompts": [] if many is None else _by_group(many),
        "prompts_by_setting": [] if many is None else _by_setting(many),
        "chosen_at_an_end": None if many is None else many.chosen_at_an_end,
        "claims": {name: [claim.row() for claim in group] for name, group in claims.items()},
        "headline": {name: [claim.row() for claim in group] for name, group in main.items()},
    }


def _by_dispersion(one: OnePrompt) -> list[dict[str, Any]]:
    """Means over seeds, distances and sizes, for each phi and all.

    At equal KL over the samples whose loss has a minimum; none where a wrong phi is the truth, or
    where ties keep more than MOST_MISSED of them from that KL.
    """
    found = []
    for (v, variant), (a, at) in product(enumerate(one.variants), enumerate(one.at)):
        meant = _meant(one, at)
        for place, phi in enumerate((*one.grid.dispersions, "all")):
            taken = slice(None) if phi == "all" else slice(place, place + 1)
            asked = meant[:, taken]
            entry: dict[str, Any] = {**asdict(variant), "at": at, "phi": phi}
            for name in OUTCOMES:
                values = np.where(asked, one.outcomes[name][v, a][:, taken], np.nan)
                # A mean over some of the phi or samples would be compared with one over all.
                some = np.isnan(values[asked]).mean() > MOST_MISSED if asked.any() else True
                entry[name] = _estimate(values[:0] if some else values)
            found.append(entry)
    return found


def _meant(one: OnePrompt, at: str) -> NDArray[np.bool_]:
    """(distance, dispersion, pairs, seed) samples that a mean at this place is over."""
    return (one.without_optimum == 0) | (not at.startswith("kl="))


def _agreement(grid: Grid) -> dict[str, list[float]]:
    """Least and most often that raters of the highest phi prefer the best arm to another."""
    theta = neg_log(max(grid.dispersions))
    found = {name: pair_marginals(name, theta, grid.arms)[0, 1:] for name in grid.distances}
    return {name: [float(rates.min()), float(rates.max())] for name, rates in found.items()}


def _missed_kl(one: OnePrompt) -> list[dict[str, Any]]:
    """Share of the samples of each phi on which ties keep a method from AT_KL, where any does."""
    found = []
    meant = _meant(one, AT_KL)
    for v, variant in enumerate(one.variants):
        # At equal beta only those are missing of which a wrong phi is the truth.
        known = meant & ~np.isnan(one.outcomes["kl"][v, 0])
        missed = known & np.isnan(one.outcomes["kl"][v, one.at.index(AT_KL)])
        if missed.any():
            counts = known.sum(axis=(0, 2, 3))
            share = missed.sum(axis=(0, 2, 3)) / np.where(counts > 0, counts, np.nan)
            found.append({**asdict(variant), "share": share.tolist()})
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
    """Means over seeds and settings by distance and group of prompts, and the gain in reward."""
    found = []
    for (v, variant), (r, regime), (a, at), (g, group), (d, distance) in product(
        enumerate(many.variants),
        enumerate(REGIMES),
        enumerate(many.at),
        enumerate(GROUPS),
        enumerate(many.distances),
    ):
        if np.isnan(many.values["reward"][v, r, a, g, :, d]).all():
            continue
        entry = {**asdict(variant), "regime": regime, "at": at, "group": group}
        entry["distance"] = distance
        entry |= {name: _estimate(many.values[name][v, r, a, g, :, d]) for name in MEASURES}
        base = Variant(variant.baseline)
        if base in many.variants:
            rewards = many.values["reward"][:, r, a, g, :, d]
            entry["gain"] = _estimate(rewards[v] - rewards[many.variants.index(base)])
        found.append(entry)
    return found


def _by_setting(many: ManyPrompts) -> list[dict[str, Any]]:
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
                (REGIMES, many.grid.conflicts, many.distances, many.grid.prompt_pairs),
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
    return asdict(t_estimate(mean_by_seed(values) if values.size else []))
