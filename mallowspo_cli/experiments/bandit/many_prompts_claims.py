"""Claims of the bandit of many prompts, one for each distance of the raters.

The distances are not pooled: their answers differ, as one phi is not the same agreement.
"""

from collections.abc import Iterator
from itertools import product
from typing import Final

from mallowspo_cli.evaluation.claims import Claim
from mallowspo_cli.experiments.bandit.claims import AT_KL, claim, compared
from mallowspo_cli.experiments.bandit.many_prompts import (
    GROUPS,
    PENALTIES,
    REGIMES,
    ManyPrompts,
    tuned,
)
from mallowspo_cli.experiments.bandit.methods import LABELS, SHUFFLED, TRUE, UNIT_MEAN, Variant
from mallowspo_cli.experiments.bandit.outcomes import mean_by_seed
from mallowspo_cli.experiments.mallows_model import Floats

GROUP_NAMES: Final = dict(
    zip(GROUPS, ("", " on agreed prompts", " on disputed prompts", " on new prompts"), strict=True)
)
FIRST_STEPS: Final = ("mallows_theta", "mallows_phi_exact")
"""The others' first step is one of these but for a factor, or nearly so."""


def many_prompts_claims(found: ManyPrompts) -> dict[str, list[Claim]]:
    """Claims by section, of each regime and of an equal or a chosen beta."""
    return {
        "Many prompts, converged": list(_at_equal_kl(found, "converged")),
        "Many prompts, first gradient step": list(_at_equal_kl(found, "first_step")),
        "Many prompts, converged: equal or chosen beta": list(_at_betas(found)),
    }


def difference(
    found: ManyPrompts,
    measure: str,
    regime: str,
    at: str,
    group: str,
    distance: str,
    of: tuple[Variant, Variant],
    conflict: int | None = None,
) -> Floats:
    """(seed,) mean of one of MEASURES of one variant less that of another.

    `at` is one of the places, or "beta=" for the mean over those.
    """
    places = [i for i, name in enumerate(found.at) if name == at or (at == "beta=" and at in name)]
    values = found.values[measure][:, REGIMES.index(regime)][:, places, GROUPS.index(group)]
    values = values[:, :, :, found.distances.index(distance)]
    values = values if conflict is None else values[:, :, conflict]
    one, other = (values[found.variants.index(variant)] for variant in of)
    return mean_by_seed(one - other)


def _at_equal_kl(found: ManyPrompts, regime: str) -> Iterator[Claim]:
    conflicts = [
        (index, f"features that miss part of the ranking (conflict {conflict:g})")
        if conflict
        else (index, "features that rank all arms rightly")
        for index, conflict in enumerate(found.grid.conflicts)
    ]
    for (method, base), distance in product(compared(found.variants), found.distances):
        if regime == "first_step" and method not in FIRST_STEPS:
            continue
        name, of = f"{LABELS[method]}, {distance}", LABELS[base]
        true, misled = ((Variant(method, told), Variant(base)) for told in (TRUE, SHUFFLED))
        measure = f"reward at {AT_KL}, method minus {of}"
        for group, where in GROUP_NAMES.items():
            own = measure if group == "all" else f"reward at {AT_KL} of these, method minus {of}"
            values = difference(found, "reward", regime, AT_KL, group, distance, true)
            yield claim(f"{name}: more reward{where}", own, values)
        for conflict, where in conflicts:
            values = difference(found, "reward", regime, AT_KL, "all", distance, true, conflict)
            yield claim(f"{name}: more reward, {where}", measure, values)
        values = difference(found, "accuracy", regime, AT_KL, "all", distance, true)
        text = f"{name}: more pairs of arms in order"
        yield claim(text, f"pair accuracy, method minus {of}", values)
        values = difference(found, "reward", regime, AT_KL, "all", distance, misled)
        measure = f"reward at {AT_KL}, method told shuffled phi minus {of}"
        yield claim(f"{name}: more reward even if phi is shuffled", measure, values)


def _at_betas(found: ManyPrompts) -> Iterator[Claim]:
    for (method, base), distance in product(compared(found.variants), found.distances):
        name, of = f"{LABELS[method]}, {distance}", LABELS[base]
        scaled, true = ((Variant(method, told), Variant(base)) for told in (UNIT_MEAN, TRUE))
        measure = f"max-arm probability, {of} minus method, same beta, w of mean 1"
        for group in ("low", "high"):
            values = -difference(found, "max_arm", "converged", "beta=", group, distance, scaled)
            yield claim(f"{name}: less collapse{GROUP_NAMES[group]}", measure, values)
        for penalty in PENALTIES:
            values, cost = (
                difference(found, outcome, "converged", tuned(penalty), "all", distance, true)
                for outcome in ("reward", "kl")
            )
            text = f"{name}: better trade-off at the chosen beta, KL at {penalty:g}"
            measure = f"reward - {penalty:g} KL, method minus {of}, beta chosen for each"
            yield claim(text, measure, values - penalty * cost)
