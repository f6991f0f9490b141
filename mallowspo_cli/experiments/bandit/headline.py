"""The answer in five lines: what was found of Mallows-theta, told the true phi, against DPO."""

from mallowspo_cli.evaluation.claims import Claim
from mallowspo_cli.experiments.bandit.claims import AT_KL, claim, compared
from mallowspo_cli.experiments.bandit.many_prompts import ManyPrompts
from mallowspo_cli.experiments.bandit.many_prompts_claims import difference
from mallowspo_cli.experiments.bandit.methods import SHUFFLED, TRUE, Variant
from mallowspo_cli.experiments.bandit.one_prompt import BUDGETS, OnePrompt, budget_name, equal_beta
from mallowspo_cli.experiments.bandit.one_prompt_claims import extremes, one_prompt_gain

THETA, DPO = "mallows_theta", "dpo"


def headline(one: OnePrompt, many: ManyPrompts | None) -> dict[str, list[Claim]]:
    """Sentence to its numbers, each claim's text the case; empty without both methods."""
    if (THETA, DPO) not in compared(one.variants):
        return {}
    lines = {
        "One prompt, equal KL: less regret (there it is DPO at another beta)": [_same_ray(one)],
        "One prompt, equal beta: less peaked": _peaks(one),
    }
    if many is None:
        return lines
    for told, regime, sentence in (
        (TRUE, "converged", "Many prompts, converged, equal KL: more reward"),
        (SHUFFLED, "converged", "The same, told the phi of other prompts"),
        (TRUE, "first_step", "Many prompts, first gradient step, equal KL: more reward"),
    ):
        pair = (Variant(THETA, told), Variant(DPO))
        lines[sentence] = [
            claim(
                distance,
                f"reward at {AT_KL}, method minus DPO",
                difference(many, "reward", regime, AT_KL, "all", distance, pair),
            )
            for distance in many.distances
        ]
    return lines


def _same_ray(one: OnePrompt) -> Claim:
    every = range(len(one.grid.dispersions))
    values = one_prompt_gain(one, "regret", Variant(THETA, TRUE), every, [AT_KL], True)
    text = "averaged over phi, where the loss has a minimum"
    return claim(text, f"regret at {AT_KL}, DPO minus method", values)


def _peaks(one: OnePrompt) -> list[Claim]:
    """At the extremes of phi, or at the only one, under each budget."""
    cases = extremes(one) or [(0, f"phi {one.grid.dispersions[0]:g}")]
    return [
        claim(
            f"{words}, budget {budget_name(budget)}",
            "max-arm probability, DPO minus method",
            one_prompt_gain(
                one, "max_arm", Variant(THETA, TRUE), [place], equal_beta(one.grid, budget)
            ),
        )
        for place, words in cases
        for budget in BUDGETS
    ]
