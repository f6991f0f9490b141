"""What the bandits say of the claims: less collapse, a better trade-off. Each can be refuted.

The unit is the seed: a number is averaged over all other settings first, and the methods are
compared on the same seeds, that is on the same samples.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from mallowspo_cli.evaluation.claims import Claim, t_estimate
from mallowspo_cli.experiments.bandit.many_prompts import (
    GROUPS,
    PENALTY,
    REGIMES,
    ManyPrompts,
)
from mallowspo_cli.experiments.bandit.methods import LABELS, SHUFFLED, TRUE, UNIT_MEAN, Variant
from mallowspo_cli.experiments.bandit.one_prompt import OnePrompt, wrong_told
from mallowspo_cli.experiments.bandit.outcomes import COLLAPSED
from mallowspo_cli.experiments.mallows_model import Floats

AT_KL: Final = "kl=0.5"
NOTHING: Final = 1e-6
"""Differences below it are those of the solver: they count as none."""
GROUP_NAMES: Final = dict(
    zip(GROUPS, ("", " on agreed prompts", " on disputed prompts", " on new prompts"), strict=True)
)


def one_prompt_claims(found: OnePrompt) -> dict[str, list[Claim]]:
    """Claims by section; a method without its baseline in the grid has none."""
    phis = found.grid.dispersions
    low, high = int(np.argmin(phis)), int(np.argmax(phis))
    every = list(range(len(phis)))
    wrong = [(told, every, f"told phi = {told} always") for told in wrong_told(found.grid)]
    told_truth = [
        (TRUE, [low], f"raters agree (phi {phis[low]:g})"),
        (TRUE, [high], f"raters disagree (phi {phis[high]:g})"),
        (TRUE, every, "averaged over phi"),
    ]
    collapse, trade = [], []
    for method, base in _compared(found.variants):
        name, of = LABELS[method], LABELS[base]
        measure = f"max-arm probability, {of} minus method, same beta"
        for told, places, where in [
            *told_truth,
            (UNIT_MEAN, every, "averaged over phi, w scaled to mean 1"),
            *wrong,
        ]:
            values = _one_prompt_gain(found, "max_arm", Variant(method, told), places, "beta=")
            collapse.append(_claim(f"{name}: less collapse: {where}", measure, values))
        measure = (
            f"share of policies above {COLLAPSED:g} on a wrong arm, {of} minus method, same beta"
        )
        for told, places, where in told_truth:
            values = _one_prompt_gain(
                found, "wrong_collapse", Variant(method, told), places, "beta="
            )
            text = f"{name}: fewer collapses onto a wrong arm: {where}"
            collapse.append(_claim(text, measure, values))
        measure = f"regret at {AT_KL}, {of} minus method"
        for told, places, where in [*told_truth, *wrong]:
            values = _one_prompt_gain(found, "regret", Variant(method, told), places, AT_KL)
            trade.append(_claim(f"{name}: less regret: {where}", measure, values))
        measure = f"pair accuracy at any KL, method minus {of}"
        values = _one_prompt_gain(found, "accuracy", Variant(method, TRUE), every, AT_KL)
        trade.append(_claim(f"{name}: more pairs of arms in order", measure, values))
    return {"One prompt: collapse at equal beta": collapse, "One prompt: equal KL": trade}


def many_prompts_claims(found: ManyPrompts) -> dict[str, list[Claim]]:
    """Claims by section, of each regime and of a chosen beta."""
    sections: dict[str, list[Claim]] = {}
    conflicts = [
        (index, f"conflict {conflict:g}" if conflict else "features that rank all arms rightly")
        for index, conflict in enumerate(found.grid.conflicts)
    ]
    for regime, title in zip(REGIMES, ("converged", "first gradient step"), strict=True):
        claims = []
        for method, base in _compared(found.variants):
            name, of = LABELS[method], LABELS[base]
            told, other = Variant(method, TRUE), Variant(base)
            for group, where in GROUP_NAMES.items():
                values = _difference(found, "reward", regime, AT_KL, group, told, other)
                measure = f"reward at {AT_KL}, method minus {of}"
                claims.append(_claim(f"{name}: more reward{where}", measure, values))
            for conflict, where in conflicts:
                values = _difference(found, "reward", regime, AT_KL, "all", told, other, conflict)
                measure = f"reward at {AT_KL}, method minus {of}"
                claims.append(_claim(f"{name}: more reward, {where}", measure, values))
            values = _difference(found, "accuracy", regime, AT_KL, "all", told, other)
            measure = f"pair accuracy, method minus {of}"
            claims.append(_claim(f"{name}: more pairs of arms in order", measure, values))
            misled = Variant(method, SHUFFLED)
            values = _difference(found, "reward", regime, AT_KL, "all", misled, other)
            measure = f"reward at {AT_KL}, method told shuffled phi minus {of}"
            claims.append(_claim(f"{name}: more reward even if phi is shuffled", measure, values))
        sections[f"Many prompts, {title}"] = claims
    sections["Many prompts, converged: equal or chosen beta"] = _beta_claims(found)
    return sections


def _beta_claims(found: ManyPrompts) -> list[Claim]:
    claims = []
    for method, base in _compared(found.variants):
        name, of = LABELS[method], LABELS[base]
        scaled, other = Variant(method, UNIT_MEAN), Variant(base)
        for group in ("low", "high"):
            values = -_difference(found, "max_arm", "converged", "beta=", group, scaled, other)
            measure = f"max-arm probability, {of} minus method, same beta, w of mean 1"
            claims.append(_claim(f"{name}: less collapse{GROUP_NAMES[group]}", measure, values))
        told = Variant(method, TRUE)
        values = _difference(found, "reward", "converged", "tuned", "all", told, other)
        cost = _difference(found, "kl", "converged", "tuned", "all", told, other)
        measure = f"reward - {PENALTY:g} KL, method minus {of}, beta chosen for each"
        text = f"{name}: better trade-off at the chosen beta"
        claims.append(_claim(text, measure, values - PENALTY * cost))
    return claims


def _compared(variants: Sequence[Variant]) -> list[tuple[str, str]]:
    """(method, baseline) of the methods that are told phi, where the baseline is there."""
    methods = {variant.method: variant.baseline for variant in variants if variant.told}
    there = {variant.method for variant in variants}
    return [(method, base) for method, base in methods.items() if base in there]


def _one_prompt_gain(
    found: OnePrompt, outcome: str, variant: Variant, dispersions: Sequence[int], at: str
) -> Floats:
    """(seed,) mean gain over the baseline: more accuracy, less of anything else."""
    places = [index for index, name in enumerate(found.at) if at in name]
    values = found.outcomes[outcome][:, places][:, :, :, list(dispersions)]
    own, base = (values[found.variants.index(one)] for one in (variant, Variant(variant.baseline)))
    gain = own - base if outcome == "accuracy" else base - own
    # Settings where a wrong phi is the truth are missing.
    return np.nanmean(gain, axis=tuple(range(gain.ndim - 1)))


def _difference(
    found: ManyPrompts,
    measure: str,
    regime: str,
    at: str,
    group: str,
    first: Variant,
    second: Variant,
    conflict: int | None = None,
) -> Floats:
    """(seed,) mean of one of MEASURES of one variant less that of another."""
    places = [i for i, name in enumerate(found.at) if at in name]
    values = found.values[measure][:, REGIMES.index(regime)][:, places, GROUPS.index(group)]
    values = values if conflict is None else values[:, :, [conflict]]
    one, other = (values[found.variants.index(variant)] for variant in (first, second))
    return (one - other).mean(axis=tuple(range(one.ndim - 1)))


def _claim(text: str, measure: str, values: Floats) -> Claim:
    return Claim(text, measure, t_estimate(np.where(np.abs(values) < NOTHING, 0.0, values)))
