"""Draw how many times faster this toolkit's step is, from the JSON files of against_trl.py.

python benchmarks/plot.py docs/results/performance/*.json --to docs/images/performance.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mallowspo_cli.files import whole_file

SIDES = {
    "trl_default": "TRL, live reference",
    "trl_precompute": "TRL, cached reference",
    "trl_tuned": "TRL, cached, rebalanced",
    "full_logits_cached": "all logits, cached",
}


def main() -> None:
    """Read and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    results = [json.loads(file.read_text()) for file in options.files]
    draw([found for found in results if "ratio_ranges" in found], options.to)


def draw(results: list[dict[str, Any]], target: Path) -> None:
    """A group of bars for each file, a bar for each side, with the range of the rounds."""
    figure, axes = plt.subplots(figsize=(8, 3.6), constrained_layout=True)
    width = 0.8 / len(SIDES)
    for place, (side, label) in enumerate(SIDES.items()):
        heights = [found["ratios"][side] for found in results]
        spans = [found["ratio_ranges"][side] for found in results]
        errors = [
            [h - s["min"] for h, s in zip(heights, spans, strict=True)],
            [s["max"] - h for h, s in zip(heights, spans, strict=True)],
        ]
        at = [group + (place - (len(SIDES) - 1) / 2) * width for group in range(len(results))]
        bars = axes.bar(at, heights, width, yerr=errors, capsize=2, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(results)), [title(found) for found in results])
    axes.set_ylabel("ours over theirs, pairs per CPU second")
    axes.set_ylim(0, 1.35 * max(f["ratio_ranges"][s]["max"] for f in results for s in SIDES))
    axes.legend(frameon=False, fontsize=8, ncols=2)
    with whole_file(target) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def title(found: dict[str, Any]) -> str:
    """Which lengths, and what is computed again."""
    setting = found["setting"]
    again = "all kept" if setting["checkpointing"] == "none" else "checkpointing"
    return f"{found['lengths']} @{setting['max_length']}\n{again}"


if __name__ == "__main__":
    main()
