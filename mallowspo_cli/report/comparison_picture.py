"""The picture of `mallowspo eval compare`: differences with intervals, and values by seed."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mallowspo_cli.files import whole_file
from mallowspo_cli.report.comparison_rows import Values, all_pairs, compared, title

DIFFERENCE, TERCILE = "#333333", "#999999"
SIDES = ("#4c72b0", "#c44e52", "#55a868", "#8172b3", "#937860", "#da8bc3")
ROW, THIRD = 1.0, 0.45
"""Heights in the picture; an inch is two of them."""


def draw_comparison(results: Values, path: Path) -> None:
    """A row for each comparison: the difference on the left, what it is of on the right."""
    rows, height = [], 0.0
    for metric, pair in all_pairs(results):
        rows.append((height, f"{title(metric, results['metrics'])}\n{compared(pair)}", pair))
        height += ROW + THIRD * len(pair["by_dispersion"])
    figure = Figure(figsize=(11, 1.3 + height / 2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _differences(left, rows)
    _values(right, rows, [side["label"] for side in results["sides"]])
    left.set_ylim(height - ROW / 2, -ROW / 2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    with whole_file(path) as temporary:
        # No software name or date inside: the same numbers give the same file.
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _differences(axes: Axes, rows: list[tuple[float, str, Values]]) -> None:
    ticks: dict[float, str] = {}
    for place, name, pair in rows:
        ticks[place] = name
        _interval(axes, place, pair["difference"], DIFFERENCE, 6)
        for number, (third, found) in enumerate(pair["by_dispersion"].items(), start=1):
            ticks[place + THIRD * number] = third.replace("_", " ")
            _interval(axes, place + THIRD * number, found, TERCILE, 3)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.set_xlabel("difference in points, 95% interval")


def _interval(axes: Axes, height: float, found: Values, color: str, size: int) -> None:
    if found["low"] is not None:
        axes.hlines(height, found["low"], found["high"], color=color, linewidth=size / 3)
    axes.plot(found["value"], height, color=color, marker="o", markersize=size)


def _values(axes: Axes, rows: list[tuple[float, str, Values]], labels: list[str]) -> None:
    colors = {label: SIDES[index % len(SIDES)] for index, label in enumerate(labels)}
    for place, _, pair in rows:
        for height, side in zip((place - 0.12, place + 0.12), pair["sides"], strict=True):
            color, mean = colors[side["label"]], side["value"]
            if len(side["seeds"]) > 1:
                low, high = mean - side["deviation"], mean + side["deviation"]
                axes.hlines(height, low, high, color=color, linewidth=1)
                values = list(side["seeds"].values())
                axes.scatter(values, [height] * len(values), color=color, s=14, alpha=0.5)
            axes.plot(mean, height, color=color, marker="|", markersize=9, markeredgewidth=2)
    for label, color in colors.items():
        axes.plot([], [], color=color, marker="|", linestyle="", markeredgewidth=2, label=label)
    axes.set_xlabel("percent (dots: seeds, line: their deviation)")
