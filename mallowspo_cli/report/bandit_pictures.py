"""The bandits' pictures: collapse by dispersion, regret against KL, groups of prompts."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mallowspo_cli.files import whole_file

STYLES: Final = {
    "dpo": ("#222222", "o"),
    "ipo": ("#8c8c8c", "s"),
    "mallows_theta": ("#4c72b0", "^"),
    "mallows_phi_exact": ("#c44e52", "v"),
    "mallows_phi_smooth": ("#dd8452", "D"),
    "mallows_ipo": ("#55a868", "P"),
}
GROUPS: Final = {
    "low": "agreed prompts",
    "high": "disputed prompts",
    "new": "new prompts",
}
REGIMES: Final = ("converged", "first_step")


def draw_bandit(results: Mapping[str, Any], place: Path) -> list[Path]:
    """The pictures that the results allow, written into a directory; their paths."""
    drawn = [_collapse(results, place / "collapse.png"), _trade(results, place / "trade_off.png")]
    if results["prompts"]:
        drawn += [_gains(results, regime, place / f"gain_{regime}.png") for regime in REGIMES]
        drawn.append(_frontier(results, place / "prompts_frontier.png"))
    return drawn


def _collapse(results: Mapping[str, Any], path: Path) -> Path:
    """Max-arm probability by phi, a row of panels for each budget, a panel for each beta."""
    phis, rows = results["grid"]["dispersions"], list(results["budgets"].values())
    figure, panels = _panels(len(rows), len(rows[0]))
    for places, row in zip(rows, panels, strict=True):
        for axes, at in zip(row, places, strict=True):
            for method in _methods(results):
                entries = [
                    e["max_arm"]
                    for e in _told_truth(results["by_dispersion"], method)
                    if e["at"] == at and e["phi"] != "all"
                ]
                _line(axes, method, phis, entries)
            axes.set_title(at.replace("=", " ").replace(" budget", ", budget"), fontsize=9)
            axes.set_ylim(0, 1.03)
        row[0].set_ylabel("max-arm probability")
    for axes in panels[-1]:
        axes.set_xlabel("phi of the raters (left: they agree)")
    return _save(results, _methods(results), figure, path)


def _trade(results: Mapping[str, Any], path: Path) -> Path:
    """Regret against KL at the extremes of phi, a point for each beta; the largest budget."""
    phis = results["grid"]["dispersions"]
    *_, along = results["budgets"].values()
    ends = sorted({min(phis), max(phis)})
    figure, panels = _panels(1, len(ends))
    for axes, phi in zip(panels[0], ends, strict=True):
        for method in _methods(results):
            entries = [
                e
                for e in _told_truth(results["by_dispersion"], method)
                if e["phi"] == phi and e["at"] in along
            ]
            _line(axes, method, [e["kl"]["value"] for e in entries], [e["regret"] for e in entries])
        axes.set_title(f"phi {phi:g}", fontsize=9)
        axes.set_xlabel("KL to the reference, nats")
        axes.set_ylim(0, 0.55)
    panels[0][0].set_ylabel("regret")
    return _save(results, _methods(results), figure, path)


def _gains(results: Mapping[str, Any], regime: str, path: Path) -> Path:
    """Reward over the baseline's against KL: told the truth, and dotted told shuffled phi."""
    distances = results["grid"]["distances"]
    methods = [method for method in _methods(results) if method.startswith("mallows")]
    figure, panels = _panels(len(distances), len(GROUPS))
    for row, distance in zip(panels, distances, strict=True):
        for axes, (group, title) in zip(row, GROUPS.items(), strict=True):
            for told, style in (("true", "-"), ("shuffled", ":")):
                for method in methods:
                    path_of = _on_path(results, method, told, (regime, distance), group)
                    entries = [e for e in path_of if "gain" in e]
                    targets = [float(e["at"].removeprefix("kl=")) for e in entries]
                    _line(axes, method, targets, [e["gain"] for e in entries], style)
            axes.axhline(0, color="grey", linewidth=1)
            axes.set_title(f"{title}, {distance}", fontsize=9)
        row[0].set_ylabel("reward over DPO's (IPO's);\ndotted: told shuffled phi")
    for axes in panels[-1]:
        axes.set_xlabel("their mean KL, nats")
    return _save(results, methods, figure, path)


def _frontier(results: Mapping[str, Any], path: Path) -> Path:
    """Reward against KL of agreed and of disputed prompts, converged, told the truth."""
    places = list(product(results["grid"]["distances"], ("low", "high")))
    figure, panels = _panels(1, len(places))
    for axes, (distance, group) in zip(panels[0], places, strict=True):
        for method in _methods(results):
            entries = _on_path(results, method, "true", ("converged", distance), group)
            values = [e["kl"]["value"] for e in entries]
            _line(axes, method, values, [e["reward"] for e in entries])
        axes.set_title(f"{GROUPS[group]}, {distance}", fontsize=9)
        axes.set_xlabel("their mean KL, nats")
    panels[0][0].set_ylabel("their reward")
    return _save(results, _methods(results), figure, path)


def _methods(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(e["method"] for e in results["by_dispersion"]))


def _told_truth(entries: Sequence[Mapping[str, Any]], method: str) -> list[Mapping[str, Any]]:
    return [e for e in entries if e["method"] == method and e["told"] in ("", "true")]


def _on_path(
    results: Mapping[str, Any], method: str, told: str, of: tuple[str, str], group: str
) -> list[Mapping[str, Any]]:
    """Entries at equal KL of a (regime, distance); a method that is told nothing has one kind."""
    return [
        e
        for e in results["prompts"]
        if (e["method"], e["regime"], e["distance"], e["group"]) == (method, *of, group)
        and e["told"] in ("", told)
        and e["at"].startswith("kl=")
    ]


def _line(
    axes: Axes,
    method: str,
    x: Sequence[float],
    entries: Sequence[Mapping[str, Any]],
    style: str = "-",
) -> None:
    """Means with their intervals; a single seed has none."""
    color, marker = STYLES[method]
    values = [e["value"] for e in entries]
    axes.plot(x, values, color=color, marker=marker, markersize=4, linestyle=style, linewidth=1.2)
    known = [(place, e) for place, e in zip(x, entries, strict=True) if e["low"] == e["low"]]
    axes.vlines(
        [place for place, _ in known],
        [e["low"] for _, e in known],
        [e["high"] for _, e in known],
        color=color,
        linewidth=1,
    )


def _panels(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(3 * columns, 2.5 * rows + 0.5), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey="row")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_size(8)
        axes.yaxis.label.set_size(8)
    return figure, [list(row) for row in panels]


def _save(results: Mapping[str, Any], methods: Sequence[str], figure: Figure, path: Path) -> Path:
    """With one legend for all panels, in rows that fit the picture."""
    axes = figure.axes[0]
    handles = []
    for method in methods:
        color, marker = STYLES[method]
        label = results["labels"][method]
        handles += axes.plot([], [], color=color, marker=marker, markersize=4, label=label)
    ncols = int(figure.get_figwidth() / 2)
    figure.legend(
        handles=handles, loc="outside upper center", ncols=ncols, frameon=False, fontsize=8
    )
    with whole_file(path) as temporary:
        # No software name or date inside: the same numbers give the same file.
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path
