"""Whole trainers as processes: `mallowspo train` against TRL's DPOTrainer, from start to exit.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/trainers.py --data PAIRS.jsonl --json trainers.json

SmolLM2-135M in float32, on one core with one thread where there is no GPU; the same tokens, order,
global batches, AdamW, learning rates and weights to start from, one epoch, no evaluation, the model
saved at the end. TRL runs with its defaults (a live reference) and tuned (precompute_ref_log_probs
and batch_rebalance), both without activation checkpointing unless `--checkpointing full` says so.
TRL gets the tokens as they are, and we find them prepared: tokenisation is in no figure. Ours runs
with an empty reference store, whose pass is then part of its time, and again with a full one. Each
round starts with ours, so that what is read from the disk for the first time is on our account. The
figures are printed only if all first losses are log 2 and all last ones agree.
"""

import argparse
import importlib.util
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
import torch
from rich.console import Console
from rich.table import Table

from mallowspo_cli.data.prepare import prepare_split
from mallowspo_cli.files import cache_directory, write_json
from mallowspo_cli.models.load import load_tokenizer, model_directory
from mallowspo_cli.recipe.load import load_base
from mallowspo_cli.training.metrics import read_metrics

SIDES = ("mallowspo", "mallowspo_full_store", "trl_default", "trl_tuned")
LEARNING_RATE = 1e-6
FIRST, LAST = 1e-4, 1e-3
"""How far the first step's loss may be from log 2, and the last one's from ours."""


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.side:
        from trl_side import train

        train(options, LEARNING_RATE)
        return
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("TRL is missing: pip install -c constraints.txt -e '.[bench]'")
    machine = measure.machine()
    if not torch.cuda.is_available():
        # The processes inherit it.
        measure.pin()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        os.environ["MALLOWSPO_CACHE"] = str(own_cache(place))
        directory = prepare_pairs(options, place)
        rounds = [one_round(options, place, directory, n) for n in range(options.rounds)]
    if lines := broken(rounds[0]):
        print("\n".join(lines), file=sys.stderr)
        raise SystemExit(1)
    found = report(options, rounds, machine)
    if options.json:
        write_json(options.json, found)
    show(found)


def parse() -> argparse.Namespace:
    """The command line; --side and below are this script's own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    shared = Path(__file__).parents[2] / "shared" / "data" / "dpo_en_demo.jsonl"
    parser.add_argument("--data", type=Path, default=shared)
    parser.add_argument("--model", default="smollm2_135m", help="a name in recipes/model/")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256, help="responses' ends are cut")
    parser.add_argument("--global-batch", type=int, default=4, help="pairs of an optimizer step")
    parser.add_argument("--device-batch", type=int, default=2, help="TRL's, with accumulation")
    parser.add_argument("--checkpointing", choices=("none", "full"), default="none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    for name in ("--side", "--directory", "--tokens", "--result"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pairs % options.global_batch or options.global_batch % options.device_batch:
        raise SystemExit("--pairs, --global-batch and --device-batch have to divide one another.")
    return options


def own_cache(scratch: Path) -> Path:
    """A cache that is empty but for the models, which stay where they are."""
    models = cache_directory() / "models"
    models.mkdir(parents=True, exist_ok=True)
    place = scratch / "cache"
    place.mkdir()
    (place / "models").symlink_to(models.resolve())
    return place


def prepare_pairs(options: argparse.Namespace, scratch: Path) -> Path:
    """Write the first pairs as rows for us and as tokens for TRL; returns the model's directory."""
    whole = words(options, options.data)
    recipe = load_base(whole).recipe
    directory = model_directory(recipe.model)
    tokenizer = load_tokenizer(directory)
    split = prepare_split(recipe.dataset, "train", tokenizer)
    assert split is not None
    if len(split.pairs) < options.pairs:
        raise SystemExit(f"{options.data} has {len(split.pairs)} pairs that fit.")
    lines = options.data.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = split.pairs.values("row")[: options.pairs].tolist()
    (scratch / "pairs.jsonl").write_text("".join(lines[i] for i in rows), encoding="utf-8")
    recipe = load_base(words(options, scratch / "pairs.jsonl")).recipe
    split = prepare_split(recipe.dataset, "train", tokenizer)
    assert split is not None
    tokens = [
        {name: getattr(pair, name).tolist() for name in ("prompt", "chosen", "rejected")}
        for pair in split.pairs
    ]
    assert len(tokens) == options.pairs
    (scratch / "tokens.json").write_text(json.dumps(tokens))
    return directory


def words(options: argparse.Namespace, data: Path) -> list[str]:
    """What the recipe says of model and data."""
    return [
        *(f"model={options.model}", "objective=dpo", "dataset=local", f"dataset.path={data}"),
        *("dataset.eval_size=0", "dataset.truncation=keep_start"),
        f"dataset.max_length={options.max_length}",
    ]


def one_round(
    options: argparse.Namespace, scratch: Path, directory: Path, number: int
) -> dict[str, dict[str, Any]]:
    """Every side once."""
    return {
        **{name: ours(options, scratch, name, number) for name in SIDES[:2]},
        **{name: theirs(options, scratch, directory, name) for name in SIDES[2:]},
    }


def ours(options: argparse.Namespace, scratch: Path, name: str, number: int) -> dict[str, Any]:
    """`mallowspo train`; the second run of a round finds the first one's reference store."""
    run, file = scratch / f"{name}-{number}", scratch / "recipe.yaml"
    recipe = [*words(options, scratch / "pairs.jsonl"), "train.precision=fp32"]
    recipe += [f"train.global_batch_size={options.global_batch}", "train.order=sequential"]
    recipe += [f"train.learning_rate={LEARNING_RATE}", "train.scheduler=linear"]
    recipe += ["train.warmup_ratio=0", f"train.activation_checkpointing={options.checkpointing}"]
    file.write_text(load_base(recipe).to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "mallowspo_cli", "train", f"recipe={file}"]
    command += [f"output_dir={run}", f"reference.store={scratch}/store-{number}"]
    figures = measure.whole_process(command, measure.one_core())
    steps = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    loop = sum(options.global_batch / line["pairs_per_second"] for line in steps)
    return rates(options, figures, loop, [line["loss"] for line in steps])


def theirs(
    options: argparse.Namespace, scratch: Path, directory: Path, name: str
) -> dict[str, Any]:
    """`DPOTrainer` in a process of its own."""
    result = scratch / "result.json"
    command = [sys.executable, __file__, "--side", name, "--directory", str(directory)]
    command += ["--tokens", str(scratch / "tokens.json"), "--result", str(result)]
    for key in ("max_length", "global_batch", "device_batch", "checkpointing", "pairs"):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    figures = measure.whole_process(command, measure.one_core())
    found = json.loads(result.read_text())
    return rates(options, figures, found["loop_s"], found["losses"])


def rates(
    options: argparse.Namespace, figures: dict[str, float], loop: float, losses: list[float]
) -> dict[str, Any]:
    """Figures of one run. The loop's seconds are wall time: neither trainer tells more."""
    return {
        **figures,
        "loop_s": loop,
        "pairs_per_cpu_s": options.pairs / figures["cpu_s"],
        "loop_pairs_per_s": options.pairs / loop,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def broken(row: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each loss that is not what it has to be."""
    lines = []
    for name, side in row.items():
        if not abs(side["first_loss"] - math.log(2)) <= FIRST:
            lines.append(f"{name}: the first loss is {side['first_loss']}, not log 2")
        if not abs(side["last_loss"] - row["mallowspo"]["last_loss"]) <= LAST:
            lines.append(f"{name}: the last loss is {side['last_loss']}, unlike ours")
    return lines


def report(
    options: argparse.Namespace, rounds: list[dict[str, dict[str, Any]]], machine: dict[str, Any]
) -> dict[str, Any]:
    """What the JSON file holds."""
    ratios, ranges = {}, {}
    for side in SIDES[:2]:
        for key in ("pairs_per_cpu_s", "loop_pairs_per_s"):
            theirs_too = [{k: row[k] for k in (side, *SIDES[2:])} for row in rounds]
            found = measure.ratios_of(theirs_too, side, key)
            ratios[f"{side}/{key}"], ranges[f"{side}/{key}"] = found
    names = ("pairs", "max_length", "global_batch", "device_batch", "checkpointing", "model")
    return {
        "setting": {name: getattr(options, name) for name in names},
        "ratios": ratios,
        "ratio_ranges": ranges,
        "medians": measure.medians_of(rounds),
        "rounds": rounds,
        "versions": measure.versions(),
        "machine": machine | {"load_average_after": os.getloadavg()},
    }


def show(found: dict[str, Any]) -> None:
    """A table."""
    table = Table(title=str(found["setting"]))
    for name in ("", "wall s", "CPU s", "loop s", "peak RSS MiB", "first loss", "last loss"):
        table.add_column(name, no_wrap=True)
    for name, row in found["medians"].items():
        seconds = [f"{row[key]:.1f}" for key in ("wall_s", "cpu_s", "loop_s")]
        losses = [f"{row[key]:.5f}" for key in ("first_loss", "last_loss")]
        table.add_row(name, *seconds, f"{row['peak_rss_mib']:.0f}", *losses)
    console = Console(highlight=False, width=max(100, Console().width))
    console.print(table)
    for name, ratios in found["ratios"].items():
        side, key = name.split("/")
        basis = "whole process, CPU" if key == "pairs_per_cpu_s" else "training loop, wall"
        text = ", ".join(f"{value:.2f} of {other}" for other, value in ratios.items())
        console.print(f"pairs/s of {side} ({basis}): {text}")
    console.print(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    console.print(str(found["machine"]))


if __name__ == "__main__":
    main()
