"""The report of the bandits: five lines, the set-up, what is so by definition, tables, claims."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from mallowspo_cli.evaluation.claims import Claim
from mallowspo_cli.report.bandit_claims import claims_tables, main_lines
from mallowspo_cli.report.bandit_means import many_prompts_tables, one_prompt_tables

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
CAPTIONS: Final = {
    "collapse": "Max-arm probability with one prompt at equal beta.",
    "trade_off": "Regret and KL at each beta, means over distances, sizes and seeds: such means "
    "lie on no one path, so their lines may cross.",
    "gain_converged": "Many prompts, converged: gain in reward at equal KL.",
    "gain_first_step": "Many prompts, first gradient step: the same.",
    "prompts_frontier": "Many prompts, converged: reward against KL.",
}


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
            "## Set-up",
            "",
            *_set_up(results),
            "",
            "## By definition",
            "",
            BY_DEFINITION,
            "## Pictures",
            "",
            *_pictures(pictures),
            "## One prompt",
            "",
            *one_prompt_tables(results),
            *many,
            "## Limits",
            "",
            LIMITS,
            "## All claims",
            "",
            *claims_tables(claims, results["labels"]),
        ]
    )


def print_results(main: Mapping[str, Sequence[Claim]], place: Path) -> None:
    """The main sentences and where the report is, on the terminal."""
    out = Console(highlight=False, markup=False)
    out.print("\n".join(main_lines(main)), soft_wrap=True)
    out.print(f"report: {place / 'report.md'}", soft_wrap=True)


def _pictures(paths: Sequence[Path]) -> list[str]:
    lines = []
    for path in paths:
        lines += [CAPTIONS[path.stem], f"![{path.stem.replace('_', ' ')}]({path.name})", ""]
    return lines


def _set_up(results: Mapping[str, Any]) -> list[str]:
    """As a list: the raters, the training, the measures, and the prompts where there are some."""
    many = [_prompts(results)] if results["prompts_grid"] else []
    return [f"- {text}" for text in (_raters(results), _training(results), MEASURES, *many)]


def _raters(results: Mapping[str, Any]) -> str:
    grid = results["grid"]
    agreement = "; ".join(
        f"{name} raters prefer the best arm to another in {100 * low:.0f} to {100 * high:.0f}%"
        for name, (low, high) in results["agreement"].items()
    )
    return (
        f"**Raters**: exact Mallows rankings of {grid['arms']} arms, "
        f"{' and '.join(grid['distances'])}, phi {_listed(grid['dispersions'])}; each pair is of "
        "two arms drawn alike, preferred by a rater of its own. One phi is not one agreement: of "
        f"phi {max(grid['dispersions']):g}, {agreement}. Pairs {_listed(grid['pairs'])}; "
        f"{grid['seeds']} seeds from {grid['seed']}, the same samples for all methods. Intervals: "
        "95% Student t over seeds, each seed averaged over the other settings first."
    )


def _training(results: Mapping[str, Any]) -> str:
    budgets = list(results["budgets"])
    return (
        "**Training**: tabular softmax, uniform reference, float64; the losses are the project's "
        "own classes. `Converged`: Newton to the minimum of the mean loss plus |logits|^2 / "
        f"(2 * budget), of budget {budgets[-1]}. Where the loss falls for ever, as when all pairs "
        "go one way, that is about as far as so many plain gradient steps of rate 1 lead, the same "
        "for all methods; there the policy at equal beta is the budget's choice, so with one "
        f"prompt it is measured under {' and '.join(budgets)}, and claims at equal KL are over the "
        "samples whose loss has a minimum. With the exact Kendall link, which jumps at 0, it is "
        f"where gradients come to rest. Beta {_listed(results['grid']['betas'])}; at equal beta "
        f"Mallows-phi gets {results['phi_betas']:g} times the number, as its link is a third as "
        "steep at 0. That changes no path over beta."
    )


MEASURES: Final = (
    "**Regret**: 1 less the expected place in the central ranking, 1 the best arm, 0 the worst. "
    "Pair accuracy: share of arm pairs that the policy's logits have in the central order, ties "
    "half. A method's path of KL is its solution times a scale; arms that are tied stay tied, and "
    "a policy that ties keep from the KL asked for is left out there."
)


def _prompts(results: Mapping[str, Any]) -> str:
    phis, prompts = results["grid"]["dispersions"], results["prompts_grid"]
    return (
        f"**Many prompts**: {prompts['prompts']}, half with phi {min(phis):g} (agreed), half with "
        f"{max(phis):g} (disputed), and 64 new ones; logits linear in {prompts['features']} "
        f"Gaussian features of an arm, {_listed(prompts['prompt_pairs'])} pairs of each prompt; "
        f"the central ranking by a linear score plus {_listed(prompts['conflicts'])} times noise "
        "of like variance. KL and reward are means over prompts; at equal KL each group of prompts "
        "has that KL of its own, by a scale of its own. Chosen beta: for each method the one that "
        f"does best on the other seeds by reward less {_listed(results['penalties'])} times KL; "
        f"{results['chosen_at_an_end']} of the choices are at an end of the betas tried, which are "
        "the reference and a collapsed policy."
    )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
