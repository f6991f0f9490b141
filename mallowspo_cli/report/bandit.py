"""The report of the bandits: five lines, what is so by definition, tables, limits, all claims."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mallowspo_cli.evaluation.claims import Claim
from mallowspo_cli.report.bandit_means import many_prompts_tables, one_prompt_tables
from mallowspo_cli.report.claims import claims_table
from mallowspo_cli.report.estimates import interval, number

BY_DEFINITION = """\
With one prompt the dispersion is one number, so Mallows-theta at (beta, w) is DPO at w beta, and
Mallows-IPO is IPO at w beta: what they gain at equal beta, DPO or IPO gains by another beta. Every
loss here reads beta times the log-ratio gap, so where the loss has a minimum its logits are a
direction over beta, and a method's path over beta is one ray. There, at equal beta, Mallows-theta
and Mallows-IPO are less peaked where w is above 1 and more where it is below; measured is by how
much. At equal KL only the direction is compared, and the order of the arms is the same at every KL:
Mallows-theta is DPO and Mallows-IPO is IPO, and no claim. Many prompts with shared parameters are
where w can do more than rescale beta; even there one w for all prompts is DPO. The first step of
Mallows-IPO is that of Mallows-theta but for a factor (DPO's and IPO's likewise), and the smooth
Kendall link's is nearly so: they are no claims.
"""
LIMITS = """\
Bandits of a few arms with a uniform reference and Gaussian features, not language models. The
reward is the place in the central ranking, equally spaced: it counts a mistake where raters
disagree as much as one where they agree, and the best policy under it alone is a collapsed one, so
less collapse is not a gain by itself. `converged` is an optimum, `first gradient step` is where
training begins; fine-tuning of an epoch or a few is in between. phi is told, where in training it
is estimated; `told shuffled` is told right by chance for half of the prompts. Means over settings
depend on which settings are there: see the tables setting by setting.
"""


def as_markdown(
    results: Mapping[str, Any],
    claims: Mapping[str, Sequence[Claim]],
    main: Mapping[str, Sequence[Claim]],
    pictures: Sequence[Path],
) -> str:
    """The whole report. `main`: sentence to numbers. `pictures` lie beside it."""
    many = ["## Many prompts", "", *many_prompts_tables(results)] if results["prompts"] else []
    return "\n".join(
        [
            "# Bandit: does MallowsPO collapse less, and trade off better?",
            "",
            *main_lines(main, "**"),
            "",
            "## By definition",
            "",
            BY_DEFINITION,
            *(f"![{picture.stem.replace('_', ' ')}]({picture.name})" for picture in pictures),
            "",
            "## Set-up",
            "",
            *_set_up(results),
            "",
            "## One prompt",
            "",
            *one_prompt_tables(results),
            *many,
            "## Limits",
            "",
            LIMITS,
            "## All claims",
            "",
            *_claims(claims),
        ]
    )


def main_lines(main: Mapping[str, Sequence[Claim]], bold: str = "") -> list[str]:
    """The sentences, each with its numbers and what was found; `bold`: what makes that bold."""
    if not main:
        return ["Mallows-theta and DPO are not both among the objectives: no summary."]
    lines = ["Mallows-theta, told the true phi, against DPO; above 0 speaks for it:", ""]
    for place, (sentence, found) in enumerate(main.items(), start=1):
        cases = "; ".join(
            f"{claim.text}: {_signed(claim)} {interval(vars(claim.estimate), 4)} "
            f"{bold}{claim.verdict}{bold}"
            for claim in found
        )
        lines.append(f"{place}. {sentence}. {_capital(found[0].measure)}. {_capital(cases)}.")
    return lines


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _signed(claim: Claim) -> str:
    """To four digits; what rounds to 0 has no minus."""
    value = claim.estimate.value
    return number(value) if value != value else f"{round(value, 4) + 0.0:+.4f}"


def _claims(claims: Mapping[str, Sequence[Claim]]) -> list[str]:
    total = sum(len(group) for group in claims.values())
    lines = [
        f"The same as claims.csv, {total} claims. Intervals are not corrected for their number: of "
        f"so many that are all void, {total / 20:.0f} would be expected to leave out 0.",
        "",
    ]
    for section, group in claims.items():
        lines += [f"### {section}", ""]
        if not group:
            lines += ["No method is here with its baseline.", ""]
            continue
        found = Counter(claim.verdict for claim in group)
        counts = (f"{found[name]} {name}" for name in ("held", "not seen", "opposite"))
        lines += [f"{', '.join(counts)}.", "", *claims_table(group, 4), ""]
    return lines


def _set_up(results: Mapping[str, Any]) -> list[str]:
    grid, prompts = results["grid"], results["prompts_grid"]
    budgets = list(results["budgets"])
    agreement = "; ".join(
        f"{name} raters prefer the best arm to another in {100 * low:.0f} to {100 * high:.0f}%"
        for name, (low, high) in results["agreement"].items()
    )
    lines = [
        f"{grid['arms']} arms, tabular softmax, uniform reference, float64. Raters: exact Mallows "
        f"rankings, {' and '.join(grid['distances'])}, phi {_listed(grid['dispersions'])}; each "
        "pair is of two arms drawn alike, preferred by a rater of its own. One phi is not one "
        f"agreement: of phi {max(grid['dispersions']):g}, {agreement}. Pairs "
        f"{_listed(grid['pairs'])}; beta {_listed(grid['betas'])}; {grid['seeds']} seeds from "
        f"{grid['seed']}, the same samples for all methods. Intervals: 95% Student t over seeds, "
        "each seed averaged over the other settings first.",
        "",
        "The losses are the project's own classes. `Converged`: Newton to the minimum of the mean "
        f"loss plus |logits|^2 / (2 * budget), of budget {budgets[-1]}. Where the loss falls for "
        "ever, as when all pairs go one way, that is about as far as so many plain gradient steps "
        "of rate 1 lead, the same for all methods; there the policy at equal beta is the budget's "
        f"choice, so with one prompt it is measured under {' and '.join(budgets)}, and claims at "
        "equal KL are over the samples whose loss has a minimum. With the exact Kendall link, "
        "which jumps at 0, it is where gradients come to rest.",
        "",
        f"Equal beta: Mallows-phi gets {results['phi_betas']:g} times the number, as its link is a "
        "third as steep at 0. That changes no path over beta.",
        "",
        "Regret: 1 less the expected place in the central ranking, 1 the best arm, 0 the worst. "
        "Pair accuracy: share of arm pairs that the policy's logits have in the central order, "
        "ties half. A method's path of KL is its solution times a scale; arms that are tied stay "
        "tied, and a policy that ties keep from the KL asked for is left out there.",
    ]
    if prompts:
        lines += [
            "",
            f"Many prompts: {prompts['prompts']}, half with phi {min(grid['dispersions']):g} "
            f"(agreed), half with {max(grid['dispersions']):g} (disputed), and 64 new ones; logits "
            f"linear in {prompts['features']} Gaussian features of an arm, "
            f"{_listed(prompts['prompt_pairs'])} pairs of each prompt; the central ranking by a "
            f"linear score plus {_listed(prompts['conflicts'])} times noise of like variance. KL "
            "and reward are means over prompts; at equal KL each group of prompts has that KL of "
            "its own, by a scale of its own. Chosen beta: for each method the one that does best "
            f"on the other seeds by reward less {_listed(results['penalties'])} times KL; "
            f"{results['chosen_at_an_end']} of the choices are at an end of the betas tried, which "
            "are the reference and a collapsed policy.",
        ]
    return lines


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def print_results(main: Mapping[str, Sequence[Claim]], place: Path) -> None:
    """The main sentences and where the report is, on the terminal."""
    out = Console(highlight=False, markup=False)
    out.print("\n".join(main_lines(main)), soft_wrap=True)
    out.print(f"report: {place / 'report.md'}", soft_wrap=True)
