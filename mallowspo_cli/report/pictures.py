"""How all pictures of the reports look and are written."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mallowspo_cli.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN, HELD_OUT = "#4c72b0", "#c44e52"


def save_picture(draw: "Callable[[Axes], None]", path: Path) -> Path:
    """Draw into one figure and write it as PNG; returns the path."""
    # A second that every process of a training would take, for what one of them does at the end.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    # No software name or date inside: the same numbers give the same file.
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path
