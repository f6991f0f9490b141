"""Win rates over sampling temperatures: a table and a curve."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from mallowspo_cli.files import whole_file, write_json, write_text
from mallowspo_cli.report.pictures import TRAIN, save_picture

PICTURE = "temperatures.png"


def write_temperatures(directory: Path, summaries: Mapping[float, dict[str, Any]]) -> None:
    """Write temperatures.json, temperatures.md and a picture of a sweep."""
    ordered = dict(sorted(summaries.items()))
    write_json(directory / "temperatures.json", {f"{t:g}": s for t, s in ordered.items()})
    with whole_file(directory / PICTURE) as temporary:
        picture = temporary.with_suffix(".png")
        save_picture(lambda axes: _curve(axes, ordered), picture)
        picture.replace(temporary)
    first = next(iter(ordered.values()))
    lines = [
        f"# {first['evaluation']}: {first['generator']} against {first['baseline']}",
        "",
        "| temperature | win rate | 95 % interval | judged | average length |",
        "| ---: | ---: | --- | ---: | ---: |",
    ]
    lines += [
        f"| {t:g} | {s['win_rate']:.2f} | [{s['win_rate_low']:.2f}, {s['win_rate_high']:.2f}] "
        f"| {s['n_total']} | {s['avg_length']:.0f} |"
        for t, s in ordered.items()
    ]
    write_text(
        directory / "temperatures.md", "\n".join([*lines, "", f"![win rates]({PICTURE})", ""])
    )


def _curve(axes: Axes, summaries: Mapping[float, dict[str, Any]]) -> None:
    rates = [s["win_rate"] for s in summaries.values()]
    low = [s["win_rate"] - s["win_rate_low"] for s in summaries.values()]
    high = [s["win_rate_high"] - s["win_rate"] for s in summaries.values()]
    axes.errorbar([*summaries], rates, yerr=[low, high], color=TRAIN, marker="o", capsize=4)
    axes.axhline(50, color="grey", linestyle=":", linewidth=1)
    axes.set_ylim(0, 100)
    axes.set_xlabel("sampling temperature")
    axes.set_ylabel("win rate, %")
