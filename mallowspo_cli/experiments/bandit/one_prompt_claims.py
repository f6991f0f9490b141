"""Claims of the bandit of one prompt: at equal beta under two budgets, and at equal KL."""

from collections.abc import Iterator, Sequence

import numpy as np

from mallowspo_cli.evaluation.claims import Claim
from mallowspo_cli.experiments.bandit.claims import AT_KL, RESCALED, claim, compared
from mallowspo_cli.experiments.bandit.methods import LABELS, TRUE, UNIT_MEAN, Variant
from mallowspo_cli.experiments.bandit.one_prompt import (
    BUDGETS,
    OnePrompt,
    budget_name,
    equal_beta,
    wrong_told,
)
from mallowspo_cli.experiments.bandit.outcomes import COLLAPSED, mean_by_seed
from mallowspo_cli.experiments.mallows_model import Floats

Case = tuple[str, list[int], str]
"""What a method is told, the dispersions averaged over, and this in words."""


def one_prompt_claims(found: OnePrompt) -> dict[str, list[Claim]]:
    """Claims by section; a method without its baseline in the grid has none."""
    sections: dict[str, list[Claim]] = {}
    for budget in BUDGETS:
        name = budget_name(budget)
        sections[f"One prompt, equal beta, budget {name}"] = list(_at_equal_beta(found, budget))
    sections["One prompt, equal KL, where the loss has a minimum"] = list(_at_equal_kl(found))
    return sections


def extremes(found: OnePrompt) -> list[tuple[int, str]]:
    """(place, words) of the lowest and the highest dispersion; none where there is one alone."""
    phis = found.grid.dispersions
    if len(phis) < 2:
        return []
    low, high = int(np.argmin(phis)), int(np.argmax(phis))
    return [
        (low, f"raters agree (phi {phis[low]:g})"),
        (high, f"raters disagree (phi {phis[high]:g})"),
    ]


def one_prompt_gain(
    found: OnePrompt,
    outcome: str,
    variant: Variant,
    dispersions: Sequence[int],
    at: Sequence[str],
    with_minimum: bool = False,
) -> Floats:
    """(seed,) mean gain over the baseline: more accuracy, less of anything else.

    NaN are left out in pairs: where a wrong phi is the truth, and where either policy has not the
    KL asked for; `with_minimum` leaves out samples on which the loss falls for ever.
    """
    places = [found.at.index(name) for name in at]
    values = found.outcomes[outcome][:, places][:, :, :, list(dispersions)]
    own, base = (values[found.variants.index(one)] for one in (variant, Variant(variant.baseline)))
    gain = own - base if outcome == "accuracy" else base - own
    if with_minimum:
        gain = np.where(found.without_optimum[:, list(dispersions)] == 0, gain, np.nan)
    return mean_by_seed(gain)


def _at_equal_beta(found: OnePrompt, budget: float) -> Iterator[Claim]:
    at = equal_beta(found.grid, budget)
    true, wrong = _cases(found)
    every = list(range(len(found.grid.dispersions)))
    unit = (UNIT_MEAN, every, "averaged over phi, w scaled to mean 1")
    told = f"same beta, budget {budget_name(budget)}"
    kinds = (
        ("max_arm", "less collapse", "max-arm probability", [*true, unit, *wrong]),
        (
            *("wrong_collapse", "fewer collapses onto a wrong arm"),
            *(f"share of policies above {COLLAPSED:g} on a wrong arm", true),
        ),
        ("regret", "less regret", "regret", true),
    )
    for method, base in compared(found.variants):
        for outcome, text, measure, cases in kinds:
            for what, places, where in cases:
                values = one_prompt_gain(found, outcome, Variant(method, what), places, at)
                text_of = f"{LABELS[method]}: {text}: {where}"
                yield claim(text_of, f"{measure}, {LABELS[base]} minus method, {told}", values)


def _at_equal_kl(found: OnePrompt) -> Iterator[Claim]:
    true, wrong = _cases(found)
    every = list(range(len(found.grid.dispersions)))
    for method, base in compared(found.variants):
        if method in RESCALED:
            continue
        name, of = LABELS[method], LABELS[base]
        for what, places, where in [*true, *wrong]:
            variant = Variant(method, what)
            values = one_prompt_gain(found, "regret", variant, places, [AT_KL], True)
            measure = f"regret at {AT_KL}, {of} minus method"
            yield claim(f"{name}: less regret: {where}", measure, values)
        values = one_prompt_gain(found, "accuracy", Variant(method, TRUE), every, [AT_KL], True)
        measure = f"pair accuracy at any KL, method minus {of}"
        yield claim(f"{name}: more pairs of arms in order", measure, values)


def _cases(found: OnePrompt) -> tuple[list[Case], list[Case]]:
    """Told the truth, and told one wrong phi."""
    every = list(range(len(found.grid.dispersions)))
    true = [(TRUE, [place], words) for place, words in extremes(found)]
    wrong = [
        (told, every, f"told phi = {told} over the other phi") for told in wrong_told(found.grid)
    ]
    return [*true, (TRUE, every, "averaged over phi")], wrong
