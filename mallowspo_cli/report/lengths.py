"""The picture of a data set's lengths, drawn from the findings of `mallowspo data check` alone."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mallowspo_cli.files import whole_file

CHOSEN, REJECTED, LIMIT = "#4c72b0", "#c44e52", "grey"
PANELS = {
    "prompt": (("prompt",), "max_prompt_length"),
    "responses": (("chosen", "rejected"), None),
    "prompt and longer response": (("row",), "max_length"),
}
"""Title to the lengths shown, and the limit that holds for them."""


def draw_lengths(findings: dict[str, Any], path: Path) -> None:
    """Write a PNG: a row of histograms for each split that has pairs, with the length limits."""
    splits = {name: s["lengths"] for name, s in findings["splits"].items() if s["lengths"]}
    rows = max(len(splits), 1)
    figure = Figure(figsize=(12, 3.2 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, len(PANELS), squeeze=False)
    for axes_row, (split, lengths) in zip(grid, splits.items(), strict=False):
        for axes, (title, (parts, limit)) in zip(axes_row, PANELS.items(), strict=True):
            value = findings["limits"][limit] if limit else None
            _panel(axes, {part: lengths[part] for part in parts}, value)
            axes.set_title(f"{split}: {title}", fontsize=10)
    with whole_file(path) as temporary:
        # No software name or date inside: the same numbers give the same file.
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _panel(axes: Axes, parts: dict[str, Any], limit: int | None) -> None:
    colors = {"rejected": REJECTED}
    longest = max(part["max"] for part in parts.values())
    for name, part in parts.items():
        counts, edges = np.asarray(part["histogram"]["counts"]), part["histogram"]["edges"]
        color = colors.get(name, CHOSEN)
        axes.stairs(counts, edges, fill=True, color=color, alpha=0.5, label=name)
        axes.axvline(part["mean"], color=color, linewidth=1)
    label = "tokens (line: mean)"
    if limit is not None:
        label = f"tokens (line: mean; limit: {limit:,})"
        # A far limit would press the lengths together.
        if limit <= 1.5 * longest:
            axes.axvline(limit, color=LIMIT, linestyle=":")
    axes.set_xlabel(label)
    axes.set_ylabel("pairs")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(parts) > 1:
        axes.legend(frameon=False)
