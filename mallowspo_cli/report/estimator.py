"""The report of the estimator experiment: claims, tables, what they mean."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mallowspo_cli.evaluation.claims import Claim
from mallowspo_cli.report.claims import claims_table
from mallowspo_cli.report.estimates import interval, markdown_table, number, with_interval
from mallowspo_cli.report.estimator_pictures import EXACT_PICTURE, MODEL_PICTURE

MODEL_ROWS = {
    "correlation": ("correlation with the truth", 4),
    "spearman": ("rank correlation", 4),
    "correlation_with_exact": ("correlation with the exact conditionals' estimate", 4),
    "phi_star": ("best scale phi*", 3),
    "phi_star_vocab": ("best scale phi*, H as a share of ln(vocabulary)", 3),
    "mean_model_error": ("the model's estimate minus the exact one, mean", 3),
    "model_error": ("- root mean square", 3),
    "largest_model_error": ("- largest", 3),
    "excess_nats_per_token": ("divergence from the true model, nats per token", 4),
}

QUESTION = """\
MallowsPO estimates theta = -log phi of a prompt by phi* (-ln H), H the mean token entropy as a
share of its largest. Here the responses are rankings from Mallows models (Kendall's distance) with
a known theta, an item a token, the best first. The last item is certain and is no token.
"""

CLAIMS_READING = """\
With exact conditionals nothing is drawn: the value itself is certain, and its interval (a bootstrap
over the values swept) tells whether another choice of values could have turned it. The
transformer's interval is Student's t over training seeds.
"""

EXACT_MEANING = """\
`r`: Pearson's correlation of -ln H with theta, on the listed values ({listed})
and on {even} evenly spaced ones. `phi*`: best scale through the origin on the listed values.
`rises`: whether -ln H rises from each of the even values to the next. `at 0`, `at 0.3`: the scaled
estimate phi* (-ln H) where the truth is 0 (no consensus at all) and 0.3. `slope`: its mean slope
from theta 0.05 to 0.3; the truth's is 1, less is flat. `flat below`: theta up to which it rises
less than half as fast as the truth. With the last item as a token, -ln H would be larger by
ln(n / (n - 1)) and r the same.
"""

EXACT_READING = """\
The estimate is not 0 at theta = 0: where fewer than n items are left, even a uniform choice has
less than ln n. Divided by ln n, H never reaches 1, so w of a prompt without any consensus is not 0.
How flat the estimate is near 0 depends on n, and so does phi*: it is a constant to be fitted, or
taken away by the unit mean of w, and not comparable between lengths.
"""

LIMITS = """\
All responses here are of one length, and H is a mean over tokens that all take part in the ranking.
In text most tokens say nothing of the preference. That entropy over rankings tells phi does not
make a language model's token entropy a measure of human disagreement: people were asked in
`mallowspo experiment human-dispersion`, and no relation was seen
(docs/results/human_dispersion.md).
"""


def as_markdown(
    results: Mapping[str, Any], claims: Sequence[Claim], exact: Sequence[Mapping[str, Any]]
) -> str:
    """The report. `exact` are the rows of the exact sweeps."""
    settings, model = results["settings"], results["transformer"]
    first = results["exact"][0]["items"]
    values = {
        name: [row["theta"] for row in exact if (row["items"], row["sweep"]) == (first, name)]
        for name in ("listed", "even")
    }
    listed = ", ".join(f"{value:g}" for value in values["listed"])
    lines = [
        "# Does the entropy estimate give back a known dispersion?",
        "",
        QUESTION,
        *claims_table(claims, 4),
        "",
        CLAIMS_READING,
        "## Exact conditionals",
        "",
        *_exact_table(results["exact"]),
        "",
        EXACT_MEANING.format(listed=listed, even=len(values["even"])),
        EXACT_READING,
        f"![Estimate against truth, exact conditionals]({EXACT_PICTURE})",
        "",
        "## A trained transformer",
        "",
        _model_setup(settings, model["vocab_size"]),
        "",
        *_model_table(model),
        "",
        _model_reading(model),
        "",
        f"![Estimate against truth, transformer]({MODEL_PICTURE})",
        "",
        *_prompt_table(results, exact=model["exact"]["by_prompt"]),
        "",
        "## Limits",
        "",
        LIMITS,
    ]
    return "\n".join(lines)


def _exact_table(sweeps: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["n", "r", "95%", "r, even", "95%", "phi*", "rises", "at 0", "at 0.3", "slope"]
    rows = [
        [
            str(sweep["items"]),
            number(sweep["correlation"]["value"], 4),
            interval(sweep["correlation"], 4),
            number(sweep["correlation_even"]["value"], 4),
            interval(sweep["correlation_even"], 4),
            number(sweep["phi_star"]),
            "yes" if sweep["monotone"] else "no",
            number(sweep["scaled_at_zero"]),
            number(sweep["scaled_at_low_theta"]),
            number(sweep["slope_below_low_theta"], 2),
            number(sweep["flat_below"]),
        ]
        for sweep in sweeps
    ]
    return markdown_table([*head, "flat below"], rows)


def _model_setup(settings: Mapping[str, Any], vocab_size: int) -> str:
    last = settings["seed"] + settings["seeds"] - 1
    return (
        f"{settings['prompts']} prompts of one token, theta evenly spaced from 0.05 to 4, each "
        f"with a central ranking of its own of {settings['model_items']} items; vocabulary "
        f"{vocab_size}. A 2-layer Llama of width 64, cross-entropy on fresh samples, AdamW, "
        f"{settings['steps']:,} steps of {settings['rankings_per_step']} rankings a prompt. Then "
        f"{settings['pairs_per_prompt']} pairs of other samples a prompt are scored as training "
        "does: packs, `PairScorer`, token entropies, w. H is a share of ln(items), as above; as a "
        "share of ln(vocabulary), which training takes, every -ln H is larger by one number. Seeds "
        f"{settings['seed']} to {last}: central rankings, weights and samples."
    )


def _model_table(model: Mapping[str, Any]) -> list[str]:
    exact = model["exact"]
    known = {"correlation": exact["correlation"]["value"], "phi_star": exact["phi_star"]}
    head = ["", *(f"seed {run['seed']}" for run in model["seeds"])]
    rows = []
    for name, (label, digits) in MODEL_ROWS.items():
        mean = model["over_seeds"][name]
        rows.append(
            [
                label,
                *(with_interval(run[name], digits) for run in model["seeds"]),
                with_interval(mean, digits),
                number(known.get(name), digits),
            ]
        )
    return markdown_table([*head, "mean over seeds [95%]", "exact conditionals"], rows)


def _model_reading(model: Mapping[str, Any]) -> str:
    error, line = model["over_seeds"]["model_error"]["value"], model["exact"]["error_of_line"]
    clamped = sum(run["clamped_pairs"] for run in model["seeds"])
    places = ", ".join(f"{run['theta_of_largest_error']:.2f}" for run in model["seeds"])
    return (
        "Intervals of a seed are bootstraps over its prompts; those over seeds are Student's t, "
        "which does not know that 1 is the end. The model's error in -ln H is "
        f"{number(error)} (root mean square); the exact estimate departs from its own best line "
        f"through the origin by {number(line)}. The largest difference is at theta {places}. "
        f"Pairs whose H was clamped to below 1: {clamped}."
    )


def _prompt_table(results: Mapping[str, Any], exact: Sequence[Mapping[str, Any]]) -> list[str]:
    means = results["transformer"]["over_seeds_by_prompt"]
    rows = [
        [
            number(row["theta"], 2),
            number(row["estimate"]),
            number(mean["value"]),
            interval(mean),
        ]
        for row, mean in zip(exact, means, strict=True)
    ]
    return markdown_table(["theta", "-ln H, exact", "-ln H, model", "95% over seeds"], rows)


def print_results(results: Mapping[str, Any], claims: Sequence[Claim], place: Path) -> None:
    """Both parts in short, and the claims."""
    table = Table(title=Text("estimate against true -log phi"), box=None, pad_edge=False)
    for name in ("", "r", "r, even", "phi*", "slope 0.05-0.3"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for sweep in results["exact"]:
        table.add_row(
            f"exact, n = {sweep['items']}",
            number(sweep["correlation"]["value"], 4),
            number(sweep["correlation_even"]["value"], 4),
            number(sweep["phi_star"]),
            number(sweep["slope_below_low_theta"], 2),
        )
    means = results["transformer"]["over_seeds"]
    label = f"transformer, n = {results['settings']['model_items']}"
    r, scale = number(means["correlation"]["value"], 4), number(means["phi_star"]["value"])
    table.add_row(label, "", r, scale, "")
    out = Console(highlight=False, markup=False)
    out.print(table)
    for claim in claims:
        out.print(f"{claim.verdict}: {claim.text}", soft_wrap=True)
    out.print(f"report: {place / 'report.md'}", soft_wrap=True)
