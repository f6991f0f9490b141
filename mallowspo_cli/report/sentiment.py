"""The report of controlled sentiment: reward and divergence, and what they rest on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from mallowspo_cli.files import whole_file, write_json, write_text
from mallowspo_cli.report.estimates import interval, markdown_table, number, with_interval

NUMBERS = {
    "reward": "mean probability of positive",
    "log_odds": "mean log-odds of positive",
    "kl": "KL of the policy to the reference, nats a continuation",
    "reference_reward": "the reference's probability of positive",
    "reward_gain": "policy minus reference",
}
RESULTS, SAMPLES, REPORT, PICTURE = (
    *("sentiment.json", "samples.jsonl"),
    *("report.md", "rewards.png"),
)
BINS = 20


def write_sentiment(place: Path, results: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Numbers, samples, report and picture into a directory."""
    write_json(place / RESULTS, results)
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_text(place / SAMPLES, "".join(lines))
    draw_rewards(results, rows, place / PICTURE)
    write_text(place / REPORT, as_markdown(results))


def as_markdown(results: dict[str, Any]) -> str:
    """The report: numbers, how they were made, limits."""
    sampling, prompts = results["sampling"], results["prompts"]
    lines = [
        f"# Controlled sentiment: {results['model']}",
        "",
        *markdown_table(
            ["", "mean", "95% interval"],
            [
                [label, number(entry["value"]), interval(entry)]
                for name, label in NUMBERS.items()
                if (entry := results[name]) is not None
            ],
        ),
        "",
        f"{prompts['count']} beginnings: {prompts['from']}{_given(results)}. "
        f"{sampling['samples']} continuations of each, of at most {sampling['max_tokens']} tokens, "
        f"temperature {sampling['temperature']:g}, seed {sampling['seed']}; "
        f"mean {results['tokens_mean']:.1f} tokens, {100 * results['ended']:.0f}% came to an end. "
        f"Reference: {results['reference'] or 'none'}. Intervals: bootstrap over beginnings.",
        "",
        *_no_kl(results),
        f"![Rewards of single continuations]({PICTURE})",
        "",
        "## The classifier",
        "",
        _classifier(results),
        "",
        "## Limits",
        "",
        "The classifier reads beginning and continuation together, so part of the reward is the "
        "beginning's; it is the same for all models that are compared on the same beginnings. "
        "Rewards of two classifiers are not comparable. The KL is that of continuations up to "
        "their longest length, a mean of single log-ratios: unbiased, but a few samples carry "
        "much of it, so that its interval is wide with few beginnings.",
        "",
    ]
    return "\n".join(lines)


def _given(results: dict[str, Any]) -> str:
    return "" if results["continued"] else ", given as a user's turn of the model's chat template"


def _no_kl(results: dict[str, Any]) -> list[str]:
    return [f"No KL: {results['kl_left_out']}.", ""] if results["kl_left_out"] else []


def _classifier(results: dict[str, Any]) -> str:
    about = results["classifier"]
    text = f"`{about['name']}`: {about['kind']}"
    if "accuracy" not in about:
        return f"{text}, label {about['positive_label']}. Its accuracy was not measured here."
    whole, short = (
        f"{100 * about[name]:.1f}% [{100 * about[f'{name}_low']:.1f}, "
        f"{100 * about[f'{name}_high']:.1f}]"
        for name in ("accuracy", "accuracy_short")
    )
    return (
        f"{text}, fitted on {about['fitted_on']:,} reviews ({about['reviews']}). On "
        f"{about['held_out']:,} held-out reviews it is right on {whole}; on their first "
        f"{about['short_words']} words alone on {short}. What it read here has "
        f"{results['words_mean']:.0f} words on average: short texts are harder, and a mean reward "
        "is pulled towards one half."
    )


def print_sentiment(results: dict[str, Any], place: Path) -> None:
    """The numbers on the terminal, and where the rest lies."""
    out = Console(highlight=False, markup=False)
    for name, label in NUMBERS.items():
        if (entry := results[name]) is not None:
            out.print(f"{label}: {with_interval(entry)}", soft_wrap=True)
    for line in _no_kl(results)[:1]:
        out.print(line, soft_wrap=True)
    out.print(f"classifier {_classifier(results)}", soft_wrap=True)
    out.print(f"report: {place / REPORT}", soft_wrap=True)


def draw_rewards(results: dict[str, Any], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A histogram of the rewards of single continuations, of each model that was sampled."""
    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for side, color in (("reference", "#bbbbbb"), ("policy", "#4c72b0")):
        rewards = [row["reward"] for row in rows if row["model"] == side]
        if rewards:
            axes.hist(rewards, bins=BINS, range=(0, 1), color=color, alpha=0.7, label=side)
    reward, kl = results["reward"], results["kl"]
    divergence = "no KL" if kl is None else f"KL in nats {with_interval(kl)}"
    axes.set_title(f"mean {with_interval(reward)}, {divergence}", fontsize=9)
    axes.set_xlabel("probability of positive")
    axes.set_ylabel("continuations")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    with whole_file(path) as temporary:
        # No software name or date inside: the same numbers give the same file.
        figure.savefig(temporary, format="png", metadata={"Software": None})
