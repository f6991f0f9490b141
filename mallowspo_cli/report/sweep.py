"""The report of a sweep: its table, a picture a metric, what failed."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mallowspo_cli.evaluation.strata import Estimate
from mallowspo_cli.files import write_text
from mallowspo_cli.report.estimates import markdown_table, number, with_interval
from mallowspo_cli.report.pictures import TRAIN, save_picture
from mallowspo_cli.report.sweep_table import METRICS, SEED, Group, SweepRow, groups

WIDE = 20
"""A key whose largest value is so many times its smallest is drawn on a logarithmic axis."""


def write_sweep_report(
    directory: Path, name: str, fixed: Sequence[str], rows: Sequence[SweepRow]
) -> Path:
    """Write report.md and a picture a metric; returns the report's path."""
    pictures = draw_sweep(directory, rows)
    write_text(directory / "report.md", as_markdown(name, fixed, rows, pictures))
    return directory / "report.md"


def as_markdown(
    name: str, fixed: Sequence[str], rows: Sequence[SweepRow], pictures: Sequence[Path]
) -> str:
    """What was swept, the means, the pictures, and what is missing."""
    keys = list(rows[0].values)
    tried = [f"{key}: {', '.join(_distinct(row.values[key] for row in rows))}" for key in keys]
    found = groups(rows)
    metrics = _measured(found)
    finished = sum(row.results is not None for row in rows)
    lines = [
        f"# Sweep {name}",
        "",
        f"`{' '.join(fixed)}`" if fixed else "",
        "",
        *(f"- {line}" for line in tried),
        "",
        f"{finished} of {len(rows)} jobs are finished. Each job is a line of sweep.csv.",
        "",
    ]
    if found:
        head = [*_heads(found), "runs", *(METRICS[metric] for metric in metrics)]
        body = [
            [*_cells(group), *(_cell(group.estimate(metric)) for metric in metrics)]
            for group in found
        ]
        lines += [*markdown_table(head, body), "", *_notes(rows, metrics), ""]
    lines += [line for p in pictures for line in (f"![{METRICS[p.stem]}]({p.name})", "")]
    failed = [row for row in rows if row.status == "failed"]
    if failed:
        lines += ["## Failed", "", *(f"- {row.job}: {row.reason}" for row in failed), ""]
    missing = [row for row in rows if row.results is None and row.status != "failed"]
    if missing:
        lines += ["## Not finished", "", *(f"- {row.job}: {row.status}" for row in missing), ""]
    return "\n".join(lines)


def print_sweep(rows: Sequence[SweepRow], report: Path) -> None:
    """The table on stdout, and where the files lie."""
    found = groups(rows)
    out = Console(highlight=False, markup=False)
    if found:
        metrics = _measured(found)
        table = Table(title=Text(report.parent.name), box=None, pad_edge=False)
        for heading in _heads(found):
            table.add_column(heading, overflow="fold")
        for heading in ("runs", *metrics):
            table.add_column(heading, justify="right", no_wrap=True)
        for group in found:
            # The intervals of all would be too wide for a terminal.
            cells = [
                _cell(e) if metric == "accuracy" else number(e.value if e else None)
                for metric in metrics
                for e in [group.estimate(metric)]
            ]
            table.add_row(*_cells(group), *cells)
        out.print(table)
    out.print(f"table:  {report.parent / 'sweep.csv'}", soft_wrap=True)
    out.print(f"report: {report}", soft_wrap=True)


def draw_sweep(directory: Path, rows: Sequence[SweepRow]) -> list[Path]:
    """A PNG for each metric that a finished job has; returns their paths."""
    found = groups(rows)
    pictures = []
    for metric in _measured(found):
        path = directory / f"{metric}.png"
        pictures.append(save_picture(lambda axes, m=metric: draw_metric(axes, found, m), path))
    return pictures


def draw_metric(axes: Axes, found: Sequence[Group], metric: str) -> None:
    """Against the swept number, a line for each choice of the others; without one, points."""
    known = [(g, e) for g in found if (e := g.estimate(metric)) is not None]
    key = number_key(found)
    if key is None:
        for place, (_, estimate) in enumerate(known):
            _interval(axes, estimate, place, TRAIN, lying=True)
            axes.plot(estimate.value, place, color=TRAIN, marker="o")
        axes.set_yticks(range(len(known)), [_title(group.values) for group, _ in known])
        axes.invert_yaxis()
        axes.set_xlabel(METRICS[metric])
        return
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for group, estimate in known:
        others = {k: v for k, v in group.values.items() if k != key}
        lines.setdefault(_title(others), []).append((group.values[key], estimate))
    for place, (title, points) in enumerate(lines.items()):
        points.sort(key=lambda point: point[0])
        color = f"C{place}"
        label = title if len(lines) > 1 else None
        heights = [estimate.value for _, estimate in points]
        axes.plot([x for x, _ in points], heights, color=color, marker="o", label=label)
        for x, estimate in points:
            _interval(axes, estimate, x, color, lying=False)
    spots = [group.values[key] for group, _ in known]
    if min(spots) > 0 and max(spots) / min(spots) >= WIDE:
        axes.set_xscale("log")
    axes.set_xlabel(key)
    axes.set_ylabel(METRICS[metric])
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)


def number_key(found: Sequence[Group]) -> str | None:
    """The key with the most values among those that are numbers in every job; None without one."""
    counts = {
        key: len({group.values[key] for group in found})
        for key in (found[0].values if found else ())
        if all(_is_number(group.values[key]) for group in found)
    }
    best = max(counts, key=lambda key: counts[key], default=None)
    return best if best is not None and counts[best] > 1 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _interval(axes: Axes, estimate: Estimate, place: float, color: str, lying: bool) -> None:
    if not math.isnan(estimate.low):
        draw = axes.hlines if lying else axes.vlines
        draw(place, estimate.low, estimate.high, color=color)


def _measured(found: Sequence[Group]) -> list[str]:
    return [m for m in METRICS if any(g.estimate(m) is not None for g in found)]


def _heads(found: Sequence[Group]) -> list[str]:
    return list(found[0].values) or [""]


def _cells(group: Group) -> list[str]:
    """The values of a group, and how many jobs it has."""
    return [*(map(_text, group.values.values()) if group.values else ["all"]), str(len(group.rows))]


def _title(values: dict[str, Any]) -> str:
    """dpo, beta 0.1: what tells a group in a picture."""
    parts = [
        value if isinstance(value, str) else f"{key.rpartition('.')[2]} {_text(value)}"
        for key, value in values.items()
    ]
    return ", ".join(parts) or "all"


def _text(value: Any) -> str:
    return "null" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _distinct(values: Any) -> list[str]:
    return list(dict.fromkeys(_text(value) for value in values))


def _cell(estimate: Estimate | None) -> str:
    return "-" if estimate is None else with_interval(vars(estimate))


def _notes(rows: Sequence[SweepRow], metrics: Sequence[str]) -> list[str]:
    single = "over the held-out prompts (accuracy) or sampled responses (KL) of one run"
    notes = [
        "Intervals: 95 %, Student's t over seeds, all of which are measured on one held-out set: "
        "what other held-out prompts would change is not in them. Where one run is finished, they "
        f"are {single}: what another seed would change is not in those."
        if SEED in rows[0].values
        else f"Intervals: 95 %, {single}: what another seed would change is not in them."
    ]
    if "margin" in metrics or "loss" in metrics:
        notes.append(
            "Margins and losses are each objective's own, with its beta inside: between objectives "
            "or betas they say little."
        )
    return [" ".join(notes)]
