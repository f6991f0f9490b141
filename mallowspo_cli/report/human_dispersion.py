"""The report of the human-dispersion experiment: tables, a verdict, a picture."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mallowspo_cli.files import whole_file
from mallowspo_cli.report.estimates import markdown_table

LABELS = {
    "entropy": "token entropy",
    "entropy_given_length": "- given length",
    "entropy_second_wording": "- second wording",
    "shuffled": "- shuffled",
    "length": "length in tokens",
    "length_gap": "length gap",
    "margin": "log-prob margin",
    "text_entropy": "single texts",
    "text_entropy_given_length": "- given length",
    "entropy_with_length": "with length",
    "entropy_between_wordings": "both wordings",
}
"""Correlations by name, in the order of the tables."""


SAMPLE = {
    "rows": "rows in the file",
    "texts": "usable texts",
    "left_out": "left out",
    "pairs": "pairs drawn",
    "pairs_by_phi": "pairs by fifth of phi_human",
    "tokens_per_text": "tokens per text",
    "nats_per_token": "nats per token",
    "neg_log_entropy_mean": "mean of -ln H",
    "neg_log_entropy_deviation": "deviation of -ln H",
    "reliability_of_phi": "reliability of phi_human",
    "position_correlation": "same position, next row",
    "position_correlation_100_apart": "same position, 100 rows on",
}
"""What is told of each corpus."""


MEANING = """\
`token entropy`: normalised entropy of the pair (the estimate of phi; its -ln, the weight, has the
same ranks reversed). `given length`: partial rank correlation, mean length in tokens held fixed.
`second wording`: under the other prompt. `shuffled`: entropies of other pairs (mean and 95%
interval over permutations). `length gap`: share by which a pair's lengths differ. `log-prob
margin`: absolute difference of the two mean log-probs per token; an estimate of phi would be
negative here, as a wide margin means agreement. `single texts`: a text's own entropy per token
against the standard deviation of its ratings. `with length` and `both wordings` are not about
people: entropy against mean length, and under one wording against the other. `p`: how often
shuffled entropies correlate as much as the true ones, two-sided.
"""


def verdict(results: dict[str, Any]) -> str:
    """What the numbers say, in a sentence or two."""
    pooled = list(results["correlations"].values())[-1]
    entropy, given = pooled["entropy"], pooled["entropy_given_length"]
    if entropy["value"] is None or given["value"] is None:
        return "The correlation of token entropy with raters' disagreement is undefined here."
    finding = (
        "Token entropy rises with raters' disagreement"
        if entropy["low"] > 0
        else "Token entropy falls with raters' disagreement"
        if entropy["high"] < 0
        else "No relation of token entropy to raters' disagreement is seen"
    )
    return (
        f"{finding}: rank correlation {_with_interval(entropy)}, {_with_interval(given)} with "
        f"length held fixed. It explains {100 * entropy['value'] ** 2:.1f}% of the variance of "
        "ranks."
    )


def as_markdown(results: dict[str, Any], picture: str) -> str:
    """The report: finding, table, picture, sample, prompts and limits."""
    correlations, corpora = results["correlations"], results["corpora"]
    head = ["", *correlations]
    rows = [
        [label, *(_with_interval(values[name]) for values in correlations.values())]
        for name, label in LABELS.items()
    ]
    rows.append(["p", *map(_p_value, correlations.values())])
    lines = [
        "# Does token entropy measure human disagreement?",
        "",
        verdict(results),
        "",
        f"Model {results['model']} ({results['precision']}), seed {results['seed']}. Data: the "
        f"corpora of Hutto and Gilbert (ICWSM 2014) in {results['data']['package']}, sha256 "
        f"{results['data']['sha256'][:16]}...",
        "",
        "Rank correlation with phi_human, the Mallows phi of a pair's raters (0: all prefer the "
        "same text, 1: chance), with 95% bootstrap intervals over pairs "
        f"({results['resamples']} resamples). `pooled` uses ranks within each corpus.",
        "",
        *markdown_table(head, rows),
        "",
        MEANING,
        f"![Rank correlations by corpus]({picture})",
        "",
        "## Sample",
        "",
        *markdown_table(
            ["", *corpora],
            [
                [label, *(_plain(values[name]) for values in corpora.values())]
                for name, label in SAMPLE.items()
            ],
        ),
        "",
        "Texts of a pair differ by at most a tenth in characters, no text is in two pairs, and the "
        "five fifths of phi_human take turns, so the sample is not the corpus's own mix. Ratings "
        "are compared across raters, ties half. `same position`: mean correlation of two rows' "
        "ratings at the same place in their lists; the lists are by the same raters in the same "
        "order only where it is clearly above 0. `reliability`: of phi_human's ranks, by halves of "
        "the raters; no estimate can be expected to correlate by more than its square root.",
        "",
        "## Prompts",
        "",
        *(f"- {name}: {' / '.join(values['prompts'])}" for name, values in corpora.items()),
        "",
        "## Limits",
        "",
        "The texts answer no prompt: the prompts are ours, and the model did not write the texts. "
        "Raters judged sentiment, which is not quality. Two texts that all find neutral are a tie, "
        "which counts as disagreement (phi 1). One model, of one size.",
        "",
    ]
    return "\n".join(lines)


def _with_interval(entry: dict[str, float | None]) -> str:
    if entry["value"] is None or entry["low"] is None:
        return "-"
    return f"{entry['value']:+.3f} [{entry['low']:+.3f}, {entry['high']:+.3f}]"


def _p_value(values: dict[str, Any]) -> str:
    p = values["shuffled"]["p_value"]
    return "-" if p is None else f"{p:.2g}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{count}: {cause}" for cause, count in value.items()) or "none"
    if isinstance(value, list):
        return " / ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value is None else f"{value:,}"


def print_results(results: dict[str, Any], place: Path) -> None:
    correlations = results["correlations"]
    *single, last = correlations
    table = Table(
        title=Text("rank correlation with raters' disagreement"), box=None, pad_edge=False
    )
    table.add_column("", no_wrap=True)
    table.add_column(f"{last} [95%]", justify="right", no_wrap=True)
    for name in single:
        table.add_column(name, justify="right", no_wrap=True)
    for name, label in LABELS.items():
        values = [correlations[corpus][name]["value"] for corpus in single]
        texts = ["-" if value is None else f"{value:+.3f}" for value in values]
        table.add_row(label, _with_interval(correlations[last][name]), *texts)
    table.add_row("p", *(_p_value(correlations[name]) for name in (last, *single)))
    out = Console(highlight=False, markup=False)
    out.print(table)
    out.print(verdict(results))
    out.print(f"report: {place / 'report.md'}", soft_wrap=True)


def draw_correlations(results: dict[str, Any], path: Path) -> None:
    """Correlations with 95% intervals, a row for each corpus, beside the shuffled control."""
    correlations = results["correlations"]
    shown = {
        "entropy": ("token entropy", "#4c72b0", "o"),
        "entropy_given_length": ("token entropy, given length", "#55a868", "s"),
        "length": ("length in tokens", "#c44e52", "^"),
        "margin": ("log-prob margin", "#8172b3", "v"),
    }
    figure = Figure(figsize=(7, 1.6 + 0.7 * len(correlations)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, values in enumerate(correlations.values()):
        control = values["shuffled"]
        if control["low"] is not None:
            width = control["high"] - control["low"]
            axes.barh(row, width, left=control["low"], height=0.8, color="#dddddd", zorder=0)
        for place, (name, (_, color, marker)) in enumerate(shown.items()):
            entry, height = values[name], row + 0.18 * (place - 1.5)
            if entry["value"] is not None and entry["low"] is not None:
                axes.hlines(height, entry["low"], entry["high"], color=color)
                axes.plot(entry["value"], height, color=color, marker=marker, markersize=5)
    for label, color, marker in shown.values():
        axes.plot([], [], color=color, marker=marker, label=label)
    axes.barh([0], [0], color="#dddddd", label="shuffled entropy, 95%")
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(correlations)), list(correlations))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("rank correlation with phi_human (right: higher where raters disagree)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    with whole_file(path) as temporary:
        # No software name or date inside: the same numbers give the same file.
        figure.savefig(temporary, format="png", metadata={"Software": None})
