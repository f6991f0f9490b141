"""The report on the diversity of sampled answers."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from mallowspo_cli.evaluation.diversity import FIRST_WORDS
from mallowspo_cli.evaluation.preference import TERCILES
from mallowspo_cli.files import whole_file, write_json, write_text
from mallowspo_cli.report.estimates import interval, markdown_table, number, with_interval

LABELS = {
    "tokens": "length in tokens",
    "words": "length in words",
    "cut": "share cut at the longest length",
    "repeated": "4-grams that came before in the answer",
    "ends_in_loop": "share that ends in a loop",
    **{f"distinct_{n}": f"distinct-{n} in an answer" for n in (1, 2, 3)},
    **{f"distinct_{n}_start": f"- first {FIRST_WORDS} words" for n in (1, 2, 3)},
    **{f"between_{n}": f"distinct-{n} over a prompt's answers" for n in (1, 2, 3)},
    **{f"between_{n}_start": f"- first {FIRST_WORDS} words" for n in (1, 2, 3)},
    "self_bleu": "self-BLEU (1: all alike)",
    "tfidf_diversity": "TF-IDF cosine diversity (0: all alike)",
}
ORDER = (
    *("tokens", "words", "cut", "repeated", "ends_in_loop"),
    *(f"distinct_{n}{end}" for n in (1, 2, 3) for end in ("", "_start")),
    *(f"between_{n}{end}" for n in (1, 2, 3) for end in ("", "_start")),
    *("self_bleu", "tfidf_diversity"),
)
"""Of the tables' rows."""
SHOWN = (
    *("distinct_2", "distinct_2_start", "between_2", "between_2_start"),
    *("self_bleu", "tfidf_diversity", "repeated"),
)
"""In the picture: shares from 0 to 1."""
RESULTS, REPORT, PICTURE = "diversity.json", "generations_report.md", "diversity.png"
COLORS = {
    "all prompts": "#333333",
    TERCILES[0]: "#4c72b0",
    TERCILES[1]: "#8172b3",
    TERCILES[2]: "#c44e52",
}

MEANING = f"""\
A word is a run of letters and digits or a single other mark, in lower case. `distinct-n`: different
n-grams as a share of all; it falls with length, so it is also given over the first {FIRST_WORDS}
words, of answers that have as many (over a prompt's answers: of prompts all of whose answers have).
`loop`: the last 12 words or more are one passage at least three times. `self-BLEU`: BLEU-4 of each
answer with the others to its prompt as references, orders above 1 smoothed by adding one. `TF-IDF
cosine diversity`: 1 minus the mean cosine of two answers to a prompt, words weighed by their rarity
among all answers here. Means are over prompts, those alone of which the value is defined.
"""


def write_diversity(place: Path, results: dict[str, Any]) -> None:
    """Numbers, report and picture into an evaluation's directory."""
    write_json(place / RESULTS, results)
    draw_diversity(results, place / PICTURE)
    write_text(place / REPORT, as_markdown(results))


def as_markdown(results: dict[str, Any]) -> str:
    """The report: tables, what the numbers mean, limits."""
    metrics = results["metrics"]
    digits = {"tokens": 1, "words": 1}
    rows = [
        [
            LABELS[name],
            number(metrics[name]["value"], digits.get(name, 3)),
            interval(metrics[name], digits.get(name, 3)),
            f"{metrics[name]['prompts']:,}",
        ]
        for name in ORDER
    ]
    lines = [
        f"# Diversity of answers: {results['model']}",
        "",
        *(f"{line}\n" for line in findings(results)),
        f"{results['prompts']:,} prompts, {results['samples']} "
        f"{'answer' if results['samples'] == 1 else 'answers'} to each, from "
        f"`{results['generations']}`. Intervals: 95%, bootstrap over prompts, of each number by "
        "itself.",
        "",
        *markdown_table(["", "mean", "95% interval", "prompts"], rows),
        "",
        MEANING,
        f"![Diversity, by dispersion of the prompt where it is known]({PICTURE})",
        "",
        "## By dispersion of the prompt",
        "",
        *_by_dispersion(results),
        "",
    ]
    return "\n".join(lines)


def findings(results: dict[str, Any]) -> list[str]:
    """What the numbers say or cannot say, a sentence or two each."""
    lines = []
    if results["left_out"]:
        lines.append(
            f"Left out: {results['left_out']} prompts with fewer than {results['samples']} answers."
        )
    if results["samples"] == 1:
        lines.append(
            "One answer to each prompt: nothing is known of the diversity between answers. "
            "generate.samples=4 samples more; so does this command with instructions=FILE or "
            "dataset=NAME."
        )
    gap = results["high_minus_low"].get("tfidf_diversity", {"low": None})
    if gap["low"] is not None and gap["low"] == gap["low"]:
        differs = (
            "differ more from each other"
            if gap["low"] > 0
            else "differ less from each other"
            if gap["high"] < 0
            else "are not seen to differ from each other more or less"
        )
        lines.append(
            f"Answers to prompts of high dispersion {differs} than those to prompts of low "
            f"dispersion: TF-IDF diversity {gap['value']:+.3f} {interval(gap)}. Whether that is "
            "the method's doing, the same table of the reference or of another run on these "
            "prompts shows."
        )
    return lines


def _by_dispersion(results: dict[str, Any]) -> list[str]:
    thirds, gaps = results["by_dispersion"], results["high_minus_low"]
    if not thirds:
        return [
            "Not known: no dispersion.json with the entropies of (enough of) these prompts lies "
            "beside the generations. `mallowspo eval alpacaeval`, `eval winrate` and this command "
            "with dataset= write it where there is a reference: a run's own, or reference=MODEL."
        ]
    head = ["", *(f"{name.split('_')[0]} ({results['terciles'][name]})" for name in thirds)]
    rows = []
    for name in ORDER:
        digits = 1 if name in ("tokens", "words") else 3
        gap = gaps[name]
        rows.append(
            [
                LABELS[name],
                *(number(thirds[third][name]["value"], digits) for third in thirds),
                with_interval(gap, digits),
            ]
        )
    return [
        f"Thirds of the prompts by w = -ln of the normalised token entropy under "
        f"{results['reference']}: high dispersion is high entropy, low w. Prompts in brackets.",
        "",
        *markdown_table([*head, "high - low [95%]"], rows),
    ]


def print_diversity(results: dict[str, Any], place: Path) -> None:
    """The main numbers on the terminal, and where the rest lies."""
    out = Console(highlight=False, markup=False)
    for name in ORDER:
        entry = results["metrics"][name]
        if entry["prompts"] and not name.endswith("_start"):
            out.print(f"{LABELS[name]}: {with_interval(entry)}", soft_wrap=True)
    for line in findings(results):
        out.print(line, soft_wrap=True)
    out.print(f"report: {place / REPORT}", soft_wrap=True)


def draw_diversity(results: dict[str, Any], path: Path) -> None:
    """Means with intervals, a row for each metric, of all prompts and of each third."""
    groups = {"all prompts": results["metrics"], **results["by_dispersion"]}
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (group, metrics) in enumerate(groups.items()):
        color = COLORS[group]
        for row, name in enumerate(SHOWN):
            entry = metrics[name]
            height = row + 0.16 * (place - (len(groups) - 1) / 2)
            if interval(entry) != "-":
                axes.hlines(height, entry["low"], entry["high"], color=color)
            if number(entry["value"]) != "-":
                axes.plot(entry["value"], height, "o", color=color, markersize=4)
        axes.plot([], [], "o", color=color, label=group.replace("_", " "))
    axes.set_yticks(range(len(SHOWN)), [LABELS[name] for name in SHOWN])
    axes.set_ylim(len(SHOWN) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    with whole_file(path) as temporary:
        # No software name or date inside: the same numbers give the same file.
        figure.savefig(temporary, format="png", metadata={"Software": None})
