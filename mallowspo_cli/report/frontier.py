"""The report of the sentiment experiment: frontiers of reward against KL, and what they decide."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.console import Console

from mallowspo_cli.evaluation.claims import Claim
from mallowspo_cli.files import write_json, write_text
from mallowspo_cli.report.claims import claims_table
from mallowspo_cli.report.estimates import interval, markdown_table, number, with_interval
from mallowspo_cli.report.pictures import save_picture

REPORT, RESULTS, ROWS, PICTURE, AREAS = (
    *("report.md", "results.json", "rows.csv"),
    *("frontier.png", "areas.png"),
)
COLORS = {
    "dpo": "#4c72b0",
    "ipo": "#55a868",
    "simpo": "#8c8c8c",
    "mallows_theta": "#c44e52",
    "mallows_phi": "#8172b2",
    "mallows_ipo": "#ccb974",
    "theta_shuffled": "#da8bc3",
    "phi_constant": "#64b5cd",
    "theta_inverse": "#937860",
    "phi_smooth": "#2f4b7c",
}


def write_frontier(
    to: Path,
    results: Mapping[str, Any],
    points: Sequence[Mapping[str, Any]],
    claims: Sequence[Claim],
) -> None:
    """Numbers, a CSV of all points, two pictures and the report into a directory."""
    write_json(to / RESULTS, dict(results))
    write_text(to / ROWS, _csv(points))
    save_picture(lambda axes: draw_frontier(axes, results), to / PICTURE)
    save_picture(lambda axes: draw_areas(axes, results), to / AREAS)
    write_text(to / REPORT, as_markdown(results, claims))


def as_markdown(results: Mapping[str, Any], claims: Sequence[Claim]) -> str:
    """The report: set-up, claims, frontiers, points, limits."""
    sizes = results["sizes"]
    return "\n".join(
        [
            "# Controlled sentiment: reward against KL",
            "",
            *_set_up(results),
            "",
            "## Claims",
            "",
            *(
                claims_table(claims)
                if claims
                else ["None: no two methods that they compare are there."]
            ),
            "",
            "An area is the mean gain in reward over KL from 0 to the KL that both methods of a "
            "difference reached with every seed. The points of a frontier are chosen by one half "
            "of the beginnings and valued by the other, both ways round. Intervals and tests: "
            "Student's t over seeds, which have beginnings, pairs and an order of their own that "
            "methods share. Verdicts are by single intervals; p (Holm) below is corrected for all "
            "differences of the table.",
            "",
            "## Frontiers",
            "",
            f"![Reward against KL]({PICTURE})",
            "",
            "Lines: the path of a method's runs at one beta, means over seeds, from the reference "
            "on. Areas are those of each seed's own frontier over all betas.",
            "",
            f"Areas over KL from 0 to {results['kl_until']:.2f} nats, which every method reached "
            "with every seed.",
            "",
            *_areas_table(results),
            "",
            f"![Areas]({AREAS})",
            "",
            "## Differences",
            "",
            *_differences_table(results),
            "",
            "## Points",
            "",
            f"Means over seeds, each measured on {sizes['eval_prompts']} beginnings.",
            "",
            *_points_table(results),
            "",
            "## Limits",
            "",
            "The reward is a classifier's probability and stands for nobody's judgement; it "
            "reads beginning and continuation together. KL is a mean of single log-ratios and can "
            "come out below 0 near the reference. "
            f"{results['seeds']} seeds show large differences only.",
            "",
            *_failures(results),
        ]
    )


def _set_up(results: Mapping[str, Any]) -> list[str]:
    sizes, runs, about = results["sizes"], results["runs"], results["classifier"]
    pairs = list(results["pairs"].values())
    accuracy = ""
    if "accuracy_short" in about:
        accuracy = (
            f", right on {100 * about['accuracy']:.1f}% of {about['held_out']:,} held-out reviews "
            f"and {100 * about['accuracy_short']:.1f}% of their first {about['short_words']} words"
        )
    references = ", ".join(f"{value:.3f}" for value in results["references"].values())
    methods = [f"- `{name}`: {what}" for name, what in results["methods"].items()]
    return [
        f"Policy and reference: `{results['model']}` (recipe `{results['recipe']}`"
        f"{', ' + ' '.join(results['words']) if results['words'] else ''}). Beginnings: "
        f"{results['beginnings']}; {sizes['prompts']} for each seed to train on, "
        f"{sizes['eval_prompts']} others to measure on. The reference goes on from each of the "
        f"former {sizes['samples']} times (at most {sizes['max_tokens']} tokens, temperature 1); "
        f"all pairs of continuations whose rewards differ are trained on ({min(pairs)} to "
        f"{max(pairs)} a seed; epochs: {results['epochs']}). Reward: probability of positive by "
        f"`{about['name']}` ({about['kind']}{accuracy}). Measured {results['measured']} times a "
        f"run. The reference's own reward, seed by seed: {references}.",
        "",
        f"{runs['done']} of {runs['wanted']} runs are done: "
        f"{len(results['methods'])} methods x {len(results['factors'])} betas (the method's own "
        f"times {', '.join(f'{f:g}' for f in results['factors'])}) x {results['seeds']} seeds, "
        f"{results['cpu_seconds'] / 60:.0f} CPU-minutes.",
        "",
        *methods,
    ]


def _areas_table(results: Mapping[str, Any]) -> list[str]:
    rows = [
        [name, number(entry["value"], 4), interval(entry, 4), str(entry["count"])]
        for name, entry in results["areas"].items()
    ]
    return markdown_table(["method", "area", "95% interval", "seeds"], rows)


def _differences_table(results: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            f"{entry['method']} - {entry['against']}",
            number(entry["value"], 4),
            interval(entry, 4),
            number(entry["p"]),
            number(entry.get("p_holm")),
            number(entry["detectable"], 4),
        ]
        for entry in results["differences"]
    ]
    head = ["areas", "difference", "95% interval", "p", "p (Holm)", "detectable"]
    return [
        *markdown_table(head, rows),
        "",
        "`detectable`: the smallest true difference that would be found with 80 % power.",
    ]


def _points_table(results: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            entry["method"],
            f"{entry['beta']:g}",
            str(entry["step"]),
            *(text for name in ("reward", "kl") for text in _both(entry[name])),
            str(entry["kl"]["count"]),
        ]
        for entry in results["points"]
    ]
    heads = ["method", "beta", "step", "reward", "95% interval", "KL", "95% interval", "seeds"]
    return markdown_table(heads, rows)


def _both(entry: Mapping[str, Any]) -> tuple[str, str]:
    return number(entry["value"]), interval(entry)


def _failures(results: Mapping[str, Any]) -> list[str]:
    """Which runs failed, and what areas and differences therefore leave out."""
    lines = [f"- {name}: {text}" for name, text in results["failed"].items()]
    found = ["## Failed runs", "", *lines, ""] if lines else []
    if results["left_out"]:
        names = ", ".join(results["left_out"])
        found += [f"Without all of their runs, and so in no area or difference: {names}.", ""]
    return found


def print_frontier(results: Mapping[str, Any], claims: Sequence[Claim], to: Path) -> None:
    """Areas and verdicts on the terminal, and where the rest lies."""
    out = Console(highlight=False, markup=False)
    runs = results["runs"]
    out.print(f"{runs['done']} of {runs['wanted']} runs", soft_wrap=True)
    for name, entry in results["areas"].items():
        out.print(f"{name}: area {with_interval(entry, 4)}", soft_wrap=True)
    for claim in claims:
        shown = with_interval(vars(claim.estimate), 4)
        out.print(f"{claim.text}: {claim.verdict} ({shown})", soft_wrap=True)
    out.print(f"report: {to / REPORT}", soft_wrap=True)


def draw_frontier(axes: Axes, results: Mapping[str, Any]) -> None:
    """Gain in reward against KL, means over seeds: each method's path at each beta."""
    axes.axhline(0, color="#999999", linewidth=0.8)
    for method in results["methods"]:
        points = [entry for entry in results["points"] if entry["method"] == method]
        control = results["methods"][method].startswith("control")
        for place, beta in enumerate(dict.fromkeys(point["beta"] for point in points)):
            path = [point for point in points if point["beta"] == beta]
            axes.plot(
                *([0, *(point[name]["value"] for point in path)] for name in ("kl", "gain")),
                marker="o",
                markersize=3.5,
                linewidth=1.2,
                linestyle="--" if control else "-",
                color=COLORS.get(method),
                label=method if place == 0 else None,
            )
    axes.set_xlabel("KL to the reference, nats a continuation")
    axes.set_ylabel("gain in probability of positive")
    axes.legend(frameon=False, fontsize=7, ncols=2)


def draw_areas(axes: Axes, results: Mapping[str, Any]) -> None:
    """The area under each method's frontier with its interval over seeds."""
    names = list(results["areas"])
    for place, name in enumerate(names):
        entry, color = results["areas"][name], COLORS.get(name)
        if entry["value"] is None:
            # No policy has left the reference.
            continue
        if entry["low"] is not None:
            axes.plot([entry["low"], entry["high"]], [place, place], color=color, linewidth=1.5)
        axes.plot(entry["value"], place, "o", color=color)
        seeds = [value for value in entry["seeds"].values() if value is not None]
        axes.plot(seeds, [place] * len(seeds), "|", color=color, alpha=0.6)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"mean gain over KL from 0 to {results['kl_until']:.2f} nats")


def _csv(points: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(points[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(points)
    return text.getvalue()
