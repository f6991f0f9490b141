"""The report of a judged evaluation: summary table, report.md and a picture."""

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mallowspo_cli.files import whole_file, write_text
from mallowspo_cli.report.estimates import markdown_table
from mallowspo_cli.report.pictures import HELD_OUT, TRAIN, save_picture

PICTURE = "win_rates.png"
SHOWN = 20
"""Failed judgements that the report lists."""


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what an evaluation came to, as text."""
    rows = [("win rate", _with_interval(summary, "win_rate", "standard_error"))]
    rows.append(("discrete win rate", f"{summary['discrete_win_rate']:.2f} %"))
    for key, name in (
        ("length_controlled", "length-controlled win rate"),
        ("length_controlled_noreg", "length-controlled win rate, no gamed rows"),
        ("length_controlled_minimal", "length-controlled win rate, minimal"),
    ):
        if summary.get(f"{key}_winrate") is not None:
            rows.append((name, _with_interval(summary, f"{key}_winrate", "lc_standard_error")))
    counts = [summary[key] for key in ("n_wins", "n_draws", "n_wins_base")]
    rows.append(("wins, draws, losses", ", ".join(map(str, counts))))
    rows.append(("judged", f"{summary['n_total']} of {summary['instructions']}"))
    ours, theirs = summary["avg_length"], summary["baseline_avg_length"]
    rows.append(("average length", f"{ours:.0f} characters, baseline {theirs:.0f}"))
    judge = summary.get("judge") or {}
    order = judge.get("order_agreement")
    if order is not None:
        rows.append(("same verdict in both orders", f"{100 * order:.1f} %"))
    first = judge.get("first_shown_wins")
    if first is not None:
        rows.append(("verdicts for the answer shown first", f"{100 * first:.1f} %"))
    return rows


def print_summary(summary: dict[str, Any], directory: Path) -> None:
    """The table at the end, what it means, and where things lie."""
    table = Table(title=Text(f"{summary['generator']} against {summary['baseline']}"))
    table.add_column("")
    table.add_column("value", justify="right")
    for row in summary_rows(summary):
        table.add_row(*row)
    out = Console(highlight=False, markup=False)
    out.print(table)
    for note in summary["notes"]:
        out.print(note, soft_wrap=True)
    out.print(f"report: {directory / 'report.md'}", soft_wrap=True)


def write_win_rates(directory: Path, summary: dict[str, Any]) -> None:
    """Write report.md and its picture."""
    with whole_file(directory / PICTURE) as temporary:
        picture = temporary.with_suffix(".png")
        save_picture(lambda axes: _bars(axes, summary), picture)
        picture.replace(temporary)
    write_text(directory / "report.md", as_markdown(summary))


def as_markdown(summary: dict[str, Any]) -> str:
    """The report as Markdown."""
    judge = summary.get("judge") or {}
    lines = [
        f"# {summary['evaluation']}: {summary['generator']} against {summary['baseline']}",
        "",
        *(f"> {note}" for note in summary["notes"]),
        "",
        *markdown_table(["", "value"], summary_rows(summary)),
        "",
        f"![win rates]({PICTURE})",
        "",
        "In brackets: 95 % intervals, by bootstrap over the instructions; that of the "
        "length-controlled win rate refits the model in each resample. ± is AlpacaEval's standard "
        "error, which for the length-controlled win rate leaves out the uncertainty of the fit.",
        "",
        "## How it was made",
        "",
        *(f"- {name}: {value}" for name, value in _settings(summary)),
        "",
        "## Failed judgements",
        "",
    ]
    failures = judge.get("failures") or []
    lines += [
        f"- {_cell(failure['instruction'][:80])}: {_cell(failure['reason'])}"
        for failure in failures[:SHOWN]
    ]
    if len(failures) > SHOWN:
        lines.append(f"- and {len(failures) - SHOWN} more, in judge.json")
    return "\n".join(lines if failures else [*lines, "None known."]) + "\n"


def _settings(summary: dict[str, Any]) -> list[tuple[str, Any]]:
    """What the stages say of themselves, but for the failures and the rows of the table."""
    left_out = ("failures", "order_agreement", "first_shown_wins", "pairs", "failed_share")
    found = []
    for stage in ("generation", "judge", "length_control"):
        values = summary.get(stage) or {}
        found += [
            (f"{stage.replace('_', ' ')}, {key.replace('_', ' ')}", _cell(str(value)))
            for key, value in values.items()
            if value is not None and key not in left_out
        ]
    return found


def _cell(text: str) -> str:
    """A text from outside, in one line that Markdown does not read."""
    return " ".join(text.split()).replace("`", "'").replace("<", "&lt;").replace("|", "\\|")


def _with_interval(summary: dict[str, Any], key: str, error: str) -> str:
    low, high = summary[f"{key}_low"], summary[f"{key}_high"]
    spread = summary.get(error)
    told = "" if spread is None or math.isnan(spread) else f" ± {spread:.2f}"
    return f"{summary[key]:.2f}{told} % [{low:.2f}, {high:.2f}]"


def _bars(axes: Axes, summary: dict[str, Any]) -> None:
    names = {
        "win_rate": "win rate",
        "length_controlled_winrate": "length-controlled",
        "length_controlled_noreg_winrate": "length-controlled\n(no gamed rows)",
        "length_controlled_minimal_winrate": "length-controlled\n(minimal)",
    }
    present = [key for key in names if summary.get(key) is not None]
    heights = [summary[key] for key in present]
    low = [summary[key] - summary[f"{key}_low"] for key in present]
    high = [summary[f"{key}_high"] - summary[key] for key in present]
    axes.bar(
        [names[key] for key in present],
        heights,
        yerr=[[max(0.0, v) for v in low], [max(0.0, v) for v in high]],
        color=TRAIN,
        ecolor=HELD_OUT,
        capsize=4,
        width=0.5,
    )
    axes.axhline(50, color="grey", linestyle=":", linewidth=1)
    axes.set_ylim(0, 100)
    axes.set_ylabel(f"% against {summary['baseline']}")
