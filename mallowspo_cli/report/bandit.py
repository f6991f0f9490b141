"""The report of the bandits: what is so by definition, tables, claims, limits."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mallowspo_cli.evaluation.claims import Claim
from mallowspo_cli.report.bandit_means import many_prompts_tables, one_prompt_tables
from mallowspo_cli.report.claims import claims_table
from mallowspo_cli.report.estimates import interval, markdown_table, number

BY_DEFINITION = """\
With one prompt the dispersion is one number, so Mallows-theta at (beta, w) is DPO at w beta, and
Mallows-IPO is IPO at w beta: what they gain at equal beta, DPO or IPO gains by another beta. Every
loss here reads beta times the log-ratio gap, so the logits of the optimum are a direction over
beta, and a method's path over beta is one ray: at equal KL only the direction is compared, and the
order of the arms is the same at every KL. Many prompts with shared parameters are where w can do
more than rescale beta; even there one w for all prompts is DPO.
"""
LIMITS = """\
Bandits of a few arms with a uniform reference and Gaussian features, not language models. The
reward is the place in the central ranking, equally spaced: it counts a mistake where raters
disagree as much as one where they agree, and the best policy under it alone is a collapsed one, so
less collapse is not a gain by itself. `converged` is an optimum, `first gradient step` is where
training begins; fine-tuning of an epoch or a few is in between. phi is told, where in training it
is estimated; `told shuffled` is told right by chance for half of the prompts. Means over settings
depend on which settings are there: see the tables setting by setting. Intervals are not corrected
for the number of claims: of forty that are all void, two would be expected to leave out 0.
"""


def as_markdown(
    results: Mapping[str, Any], claims: Mapping[str, Sequence[Claim]], pictures: Sequence[Path]
) -> str:
    """The whole report. `pictures` lie beside it."""
    one_prompt = {name: group for name, group in claims.items() if name.startswith("One")}
    many_prompts = {name: group for name, group in claims.items() if name not in one_prompt}
    lines = [
        "# Bandit: does MallowsPO collapse less, and trade off better?",
        "",
        *verdicts(claims),
        "",
        *_reading(claims),
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
        *_claims(one_prompt),
    ]
    if results["prompts"]:
        lines += ["## Many prompts", "", *many_prompts_tables(results), *_claims(many_prompts)]
    return "\n".join([*lines, "## Limits", "", LIMITS])


def verdicts(claims: Mapping[str, Sequence[Claim]]) -> list[str]:
    """For each section, how its claims came out, as lines of a list."""
    lines = []
    for section, group in claims.items():
        found = Counter(claim.verdict for claim in group)
        counts = ", ".join(f"{found[name]} {name}" for name in ("held", "not seen", "opposite"))
        lines.append(f"- {section}: {counts}")
    return lines


def _reading(claims: Mapping[str, Sequence[Claim]]) -> list[str]:
    """A table for each section: what was found of a claim, method by method."""
    lines = []
    for section, group in claims.items():
        if not group:
            continue
        rows: dict[str, list[str]] = {}
        names = dict.fromkeys(claim.text.split(": ", 1)[0] for claim in group)
        for claim in group:
            text = claim.text.split(": ", 1)[1]
            rows.setdefault(text, [text]).append(f"{claim.verdict} {claim.estimate.value:+.4f}")
        lines += [f"{section}:", "", *markdown_table(["", *names], list(rows.values())), ""]
    return lines


def _claims(claims: Mapping[str, Sequence[Claim]]) -> list[str]:
    lines = []
    for section, group in claims.items():
        if not group:
            lines += [f"### Claims. {section}", "", "No method is here with its baseline.", ""]
            continue
        lines += [f"### Claims. {section}", "", *claims_table(group, 4), ""]
    return lines


def _set_up(results: Mapping[str, Any]) -> list[str]:
    grid, prompts = results["grid"], results["prompts_grid"]
    budget = f"{results['budget']:.0e}".replace("e+0", "e")
    lines = [
        f"{grid['arms']} arms, tabular softmax, uniform reference, float64. Raters: exact Mallows "
        f"rankings, {' and '.join(grid['distances'])}, phi {_listed(grid['dispersions'])}; each "
        "pair is of two arms drawn alike, preferred by a rater of its own. Pairs "
        f"{_listed(grid['pairs'])}; beta {_listed(grid['betas'])}; {grid['seeds']} seeds from "
        f"{grid['seed']}, the same samples for all methods. Intervals: 95% Student t over seeds, "
        "each seed averaged over the other settings first.",
        "",
        "The losses are the project's own classes. `Converged`: Newton to the minimum of the mean "
        f"loss plus |logits|^2 / (2 * {budget}). Where the loss falls for ever, as "
        "when all pairs go one way, that is about as far as so many plain gradient steps of rate "
        "1 lead, the same for all methods. With the exact Kendall link, which jumps at 0, it is "
        "where gradients come to rest.",
        "",
        "Regret: 1 less the expected place in the central ranking, 1 the best arm, 0 the worst. "
        "Pair accuracy: share of arm pairs that the policy's logits have in the central order, "
        "ties half. A method's path of KL is its solution times a scale; arms that are tied stay "
        "tied, so that a method that ties all of them stays at the reference at any KL asked for.",
    ]
    if prompts:
        lines += [
            "",
            f"Many prompts: {prompts['prompts']}, half with phi {min(grid['dispersions']):g} "
            f"(agreed), half with {max(grid['dispersions']):g} (disputed), and 64 new ones; logits "
            f"linear in {prompts['features']} Gaussian features of an arm, "
            f"{_listed(prompts['prompt_pairs'])} pairs of each prompt; the central ranking by a "
            f"linear score plus {_listed(prompts['conflicts'])} times noise of like variance. KL "
            "and reward are means over prompts. Chosen beta: for each method the one that does "
            f"best on the other seeds by reward - {results['penalty']:g} KL.",
        ]
    return lines


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def print_results(claims: Mapping[str, Sequence[Claim]], place: Path) -> None:
    """Each claim with its number and verdict, on the terminal."""
    out = Console(highlight=False, markup=False)
    for section, group in claims.items():
        out.print(section)
        for claim in group:
            value, ends = number(claim.estimate.value, 4), interval(vars(claim.estimate), 4)
            out.print(f"  {claim.verdict:8} {value:>7} {ends:17} {claim.text}", soft_wrap=True)
    out.print("\n".join(verdicts(claims)), soft_wrap=True)
    out.print(f"report: {place / 'report.md'}", soft_wrap=True)
