"""The report of the out-of-distribution experiment: claims, tables, a picture, rows."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.console import Console

from mallowspo_cli.evaluation.claims import Claim
from mallowspo_cli.report.claims import claims_table
from mallowspo_cli.report.ood_tables import (
    data_table,
    differences_table,
    gaps_table,
    objectives_table,
    outcomes_table,
    runs_table,
    share,
    signed,
    terciles_table,
)
from mallowspo_cli.report.pictures import save_picture

Values = dict[str, Any]

COLORS = ("#4c72b0", "#c44e52", "#55a868", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974")
COLUMNS = (
    *("entry", "seed", "data_set", "in_distribution", "pairs", "accuracy", "margin_nats"),
    *("reward_margin", "displacement"),
)
"""Of rows.csv: one row a run and data set."""

MEANING = """\
`accuracy`: share of pairs whose chosen response has the higher implicit reward, ties half. The
reward is without the dispersion weight. `margin`: mean of the chosen response's reward minus the
rejected one's, over beta, so that entries with different betas compare: in nats of what Objectives
says. Intervals are 95 %, what Data says resampled {resamples} times; there is none where no value
differs from another.
{seeds}\
Differences are paired: of two runs of one seed, pair by pair. `p` is two-sided, `Holm` corrects it
for all claims of this report. Verdicts go by single intervals, so of 40 claims about nothing, two
would seem to be something. `out of distribution` is the mean over the targets.
"""
SEVERAL = """\
Of several seeds, seeds and pairs are both sources of error (a t interval, wide where seeds are
few), so intervals speak of other training runs too. Simulated (benchmarks/interval_coverage.py),
those of differences cover 94 to 99 % with three seeds and 95 to 98 % with five.
"""
ONE = """\
Intervals of a single seed speak of these models on other pairs, not of another training run.
"""
BETAS = """\
w is scaled to a mean of 1 over the training pairs unless `dispersion.scale` says otherwise, so that
one beta pulls as hard for DPO and Mallows-theta. The Kendall link of Mallows-phi has a third of
their slope at 0 (theta/6 against theta/2), so three times the beta starts as fast.
"""


def as_markdown(results: Values, claims: Sequence[Claim], picture: str) -> str:
    """The report: what was found, by how much, of what."""
    setup, failed = results["setup"], results["failed"]
    lines = [
        f"# Out of distribution: trained on {setup['inside']}, evaluated on "
        f"{', '.join(setup['targets'])}",
        "",
        verdict(results, claims),
        "",
        *(claims_table(claims) if claims else ["No claim could be tested."]),
        "",
        f"![Accuracy by data set and objective, 95% intervals]({picture})",
        "",
        *_section("Outcomes", outcomes_table(results)),
        MEANING.format(resamples=results["resamples"], seeds=_about_seeds(results)),
        *_section("Differences", differences_table(results)),
        *_section("In minus out of distribution", gaps_table(results)),
        *_section("By dispersion", terciles_table(results)),
        *_section("Set-up", _setup(setup)),
        *_section("Objectives", [*objectives_table(results), "", BETAS.rstrip()]),
        *_section("Data", data_table(results)),
        *_section("Runs", runs_table(results)),
    ]
    if failed:
        lines += _section("Failed", [f"- {run['run']}: {run['reason']}" for run in failed])
    return "\n".join([*lines, *_section("Limits", [_limits(setup)])])


def verdict(results: Values, claims: Sequence[Claim]) -> str:
    """What the claims come to, and whether the runs learned at all, in two sentences.

    An entry whose reward holds no whole reference does not begin at chance, and is left out.
    """
    inside = results["setup"]["inside"]
    compared = {run["entry"] for run in results["runs"] if run["begins_at_chance"]}
    learned = [
        row
        for row in results["outcomes"]
        if row["data_set"] == inside and row["measure"] == "accuracy" and row["entry"] in compared
    ]
    above = [row["entry"] for row in learned if row["low"] is not None and row["low"] > 0.5]
    counts = [
        f"{sum(claim.verdict == name for claim in claims)} {name}"
        for name in ("held", "not seen", "opposite")
    ]
    told = f"Claims: {', '.join(counts)}." if claims else "Nothing could be compared."
    if not learned:
        return told
    names = f" ({', '.join(above)})" if above else ""
    return (
        f"{told} In distribution {len(above)} of {len(learned)} entries with a reward against the "
        f"reference rank held-out pairs better than chance{names}."
    )


def as_csv(results: Values) -> str:
    """A row for each run and data set."""
    setup, buffer = results["setup"], io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    values = {(row["entry"], row["data_set"], row["measure"]): row for row in results["outcomes"]}
    for run in results["runs"]:
        entry, seed = run["entry"], str(run["seed"])
        for data in (setup["inside"], *setup["targets"]):
            accuracy, margin = (values[entry, data, name] for name in ("accuracy", "margin"))
            writer.writerow(
                {
                    "entry": entry,
                    "seed": seed,
                    "data_set": data,
                    "in_distribution": str(data == setup["inside"]).lower(),
                    "pairs": accuracy["pairs"],
                    "accuracy": accuracy["seeds"][seed],
                    "margin_nats": margin["seeds"][seed],
                    "reward_margin": run["reward_margin"][data],
                    "displacement": run["displacement"][data],
                }
            )
    return buffer.getvalue()


def draw_accuracy(results: Values, path: Path) -> None:
    """Accuracy with its interval for each entry on each data set; small dots are seeds."""
    rows = [row for row in results["outcomes"] if row["measure"] == "accuracy"]
    places = list(dict.fromkeys(row["data_set"] for row in rows))
    entries = list(dict.fromkeys(row["entry"] for row in rows))
    inside = results["setup"]["inside"]

    def draw(axes: Axes) -> None:
        for row in rows:
            number = entries.index(row["entry"])
            x = places.index(row["data_set"]) + 0.7 * ((number + 0.5) / len(entries) - 0.5)
            color = COLORS[number % len(COLORS)]
            if row["low"] is not None:
                axes.vlines(x, row["low"], row["high"], color=color)
            label = row["entry"] if row["data_set"] == places[0] else None
            axes.plot(x, row["value"], "o", color=color, markersize=5, label=label)
            seeds = list(row["seeds"].values())
            axes.plot([x + 0.04] * len(seeds), seeds, ".", color=color, markersize=3, alpha=0.6)
        axes.axhline(0.5, color="grey", linewidth=1)
        named = [f"{place}\n(trained on)" if place == inside else place for place in places]
        axes.set_xticks(range(len(places)), named, fontsize=7)
        axes.set_ylabel("preference accuracy, 95% interval")
        axes.legend(
            frameon=False, fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0)
        )

    save_picture(draw, path)


def print_results(results: Values, claims: Sequence[Claim], place: Path) -> None:
    """Accuracies and verdicts at the end, and where the report lies."""
    out = Console(highlight=False, markup=False)
    for row in results["outcomes"]:
        if row["measure"] == "accuracy":
            out.print(f"{row['data_set']}: {row['entry']} {share(row)}", soft_wrap=True)
    for claim in claims:
        out.print(f"{claim.verdict}: {claim.text} ({signed(claim.row())})", soft_wrap=True)
    out.print(verdict(results, claims), soft_wrap=True)
    out.print(f"report: {place / 'report.md'}", soft_wrap=True)


def _about_seeds(results: Values) -> str:
    """What the report's intervals speak of: runs that failed leave some of them fewer seeds."""
    counts = [len(row["seeds"]) for row in results["outcomes"]]
    counts += [row["seeds"] for row in results["differences"]]
    return (SEVERAL if max(counts) > 1 else "") + (ONE if min(counts) == 1 else "")


def _setup(setup: Values) -> list[str]:
    lines = [
        f"- recipe {setup['recipe']}, model {setup['model']}",
        f"- trained on {setup['train_pairs']:,} pairs of {setup['inside']}; evaluated on its "
        f"held-out pairs and on {', '.join(setup['targets'])}",
        f"- seeds {', '.join(map(str, setup['seeds']))}",
    ]
    if setup["meaning"] is not None:
        lines.append(f"- {setup['meaning']} (Ratings: Hutto and Gilbert, ICWSM 2014.)")
        lines += [f"- prompt of {name}: {text}" for name, text in setup["prompts"].items()]
    return [*lines, "", "```", setup["command"], "```"]


def _limits(setup: Values) -> str:
    told = (
        "Accuracy says how a model ranks given texts, not how well it writes: the paper's claim is "
        "of judged win rates of sampled answers. One model, of one size."
    )
    if setup["meaning"] is not None:
        told += (
            " The rated texts answer no prompt and were not written by the model, raters judged "
            "sentiment alone, and the corpora differ in domain and style but not in what is "
            "preferred. All pairs of a corpus share a prompt, so w varies with their texts only."
        )
    return told


def _section(name: str, lines: Sequence[str]) -> list[str]:
    return [f"## {name}", "", *lines, ""]
