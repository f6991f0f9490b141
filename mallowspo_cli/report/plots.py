"""A run's pictures, drawn from its files alone."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mallowspo_cli.evaluation.statistics import TERCILES
from mallowspo_cli.report.pictures import HELD_OUT, TRAIN, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = list[dict[str, Any]]


def draw_run(directory: Path, lines: Lines, dispersion: dict[str, Any] | None) -> list[Path]:
    """Write the PNG files of a run that its metrics and dispersion give; returns their paths."""
    train = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval/loss" in line]
    pictures: dict[str, Callable[[Axes], None]] = {
        "loss": lambda axes: _curve(axes, train, held_out, "loss", "loss"),
        "margin": lambda axes: _curve(axes, train, held_out, "rewards/margins", "reward margin"),
        "accuracy": lambda axes: _accuracy(axes, train, held_out),
    }
    if dispersion is not None:
        pictures["dispersion"] = lambda axes: _weights(axes, dispersion)
    last = held_out[-1] if held_out else {}
    if any(f"eval/{tercile}/accuracy" in last for tercile in TERCILES):
        pictures["accuracy_by_dispersion"] = lambda axes: _by_tercile(axes, last)
    directory.mkdir(parents=True, exist_ok=True)
    return [save_picture(draw, directory / f"{name}.png") for name, draw in pictures.items()]


def _curve(axes: "Axes", train: Lines, held_out: Lines, key: str, label: str) -> None:
    if train:
        steps = [line["step"] for line in train]
        values = [line[key] for line in train]
        axes.plot(steps, values, color=TRAIN, alpha=0.35, linewidth=1)
        axes.plot(steps, running_mean(values), color=TRAIN, label="training (running mean)")
    if held_out:
        steps = [line["step"] for line in held_out]
        values = [line[f"eval/{key}"] for line in held_out]
        axes.plot(steps, values, color=HELD_OUT, marker="o", linestyle=":", label="held out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.legend(frameon=False)


def _accuracy(axes: "Axes", train: Lines, held_out: Lines) -> None:
    _curve(axes, train, held_out, "rewards/accuracies", "implicit-reward accuracy")
    for line in held_out:
        low, high = line["eval/rewards/accuracies_low"], line["eval/rewards/accuracies_high"]
        axes.vlines(line["step"], low, high, color=HELD_OUT)
    axes.axhline(0.5, color="grey", linestyle=":", linewidth=1)
    axes.set_ylim(0, 1)


def _weights(axes: "Axes", dispersion: dict[str, Any]) -> None:
    edges, counts = dispersion["histogram"]["edges"], dispersion["histogram"]["counts"]
    axes.stairs(counts, edges, fill=True, color=TRAIN, alpha=0.7)
    axes.axvline(dispersion["weight_mean"], color=HELD_OUT, label="mean")
    axes.axvline(1.0, color="grey", linestyle=":", label="w = 1 (DPO's weight)")
    axes.set_xlabel("w(x) = -2 log phi(x); low dispersion to the right")
    axes.set_ylabel("training pairs")
    axes.legend(frameon=False)


def _by_tercile(axes: "Axes", line: dict[str, Any]) -> None:
    present = [t for t in TERCILES if f"eval/{t}/accuracy" in line]
    heights = [line[f"eval/{t}/accuracy"] for t in present]
    names = [
        f"{t.partition('_')[0]}\nw = {line[f'eval/{t}/weight_mean']:.2f}, "
        f"{line[f'eval/{t}/pairs']} pairs"
        for t in present
    ]
    bars = axes.bar(names, heights, color=TRAIN, width=0.6)
    axes.bar_label(bars, fmt="%.2f")
    axes.axhline(0.5, color="grey", linestyle=":", linewidth=1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("dispersion tercile")
    axes.set_ylabel("held-out accuracy")


def running_mean(values: list[float], decay: float = 0.9) -> list[float]:
    """Exponential mean of the values so far, each corrected for its short beginning."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        means.append(total / weight)
    return means
