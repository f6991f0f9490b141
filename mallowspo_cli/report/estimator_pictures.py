"""The pictures of the estimator experiment: estimate against truth, exact and through a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mallowspo_cli.files import whole_file

EXACT_PICTURE, MODEL_PICTURE = "exact.png", "transformer.png"
COLORS = ("#8172b3", "#4c72b0", "#55a868", "#dd8452", "#c44e52", "#937860", "#64b5cd", "#8c8c8c")


def draw_exact(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Scaled estimate against truth, a line for each n: the whole sweep, and near 0."""
    axes, figure = _panels(2)
    numbers = list(dict.fromkeys(row["items"] for row in rows))
    for panel, end in zip(axes, (4.0, 0.6), strict=True):
        for index, num_items in enumerate(numbers):
            both = sorted(
                (row["theta"], row["scaled"]) for row in rows if row["items"] == num_items
            )
            theta, scaled = zip(*both, strict=True)
            color = COLORS[index % len(COLORS)]
            panel.plot(theta, scaled, color=color, label=f"n = {num_items}", linewidth=1.3)
        panel.axline((0, 0), slope=1, color="grey", linestyle="--", linewidth=1)
        panel.set_xlim(0, end)
        panel.set_ylim(0, 1.15 * end)
        panel.set_xlabel("true -log phi")
    axes[0].set_ylabel("phi* (-ln H)")
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def draw_model(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The transformer's estimates, mean and 95 % interval over seeds, on the exact curve."""
    model = results["transformer"]
    (axes,), figure = _panels(1)
    theta = [row["theta"] for row in model["exact"]["by_prompt"]]
    exact = [row["estimate"] for row in model["exact"]["by_prompt"]]
    axes.plot(theta, exact, color="grey", linewidth=1.3, label="exact conditionals", zorder=1)
    for row in rows:
        axes.plot(row["theta"], row["estimate"], ".", color="#4c72b0", alpha=0.35, markersize=4)
    for place, mean in zip(theta, model["over_seeds_by_prompt"], strict=True):
        # No interval of a single seed.
        if mean["low"] == mean["low"]:
            axes.vlines(place, mean["low"], mean["high"], color="#4c72b0")
        axes.plot(place, mean["value"], "o", color="#4c72b0", markersize=4)
    axes.plot([], [], "o-", color="#4c72b0", markersize=4, label="transformer, 95% over seeds")
    for row in rows:
        axes.plot(row["theta"], row["estimate_vocab"], "x", color="#dd8452", markersize=3)
    axes.plot([], [], "x", color="#dd8452", markersize=3, label="- as a share of ln(vocabulary)")
    axes.set_xlabel("true -log phi")
    axes.set_ylabel("-ln H")
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _panels(count: int) -> tuple[list[Axes], Figure]:
    figure = Figure(figsize=(6 if count == 1 else 8, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return axes, figure


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as temporary:
        # No software name or date inside: the same numbers give the same file.
        figure.savefig(temporary, format="png", metadata={"Software": None})
