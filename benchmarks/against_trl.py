"""One training step against TRL's and against the plain way, on a CPU or a GPU.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/against_trl.py --lengths dpo --json dpo.json
    python benchmarks/against_trl.py --lengths hh --checkpointing full --memory

Every side is a process of its own, started in turn, round after round: on one core with one thread,
with the same random Llama, the same pairs (real lengths, random tokens) and the same global
batches. A step is forward and backward with the batch's layout; the optimizer is left out. Ratios
are of CPU time on a CPU, of wall time on a GPU. Round 0 is not timed: in it all sides' log-probs,
losses and gradients are compared, and no number is printed if they differ.

TRL turns activation checkpointing on by default; `--checkpointing` sets it for all sides alike. Off
a GPU, TRL 1.16's head computes logits at all positions in a loop over tiles, which makes it slower
there than all logits at once: full_logits_cached is the fairer baseline on a CPU.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from one_side import RETURNED, beyond_limits, differences, memory_of, parity_of, time_of
from rich.console import Console
from rich.table import Table
from sides import SHAPES, Setting, build_model, side_class

from mallowspo_cli.files import write_json
from mallowspo_cli.models.attention import NAME
from mallowspo_cli.models.flops import ForwardFlops
from mallowspo_cli.plan.hardware import read_hardware
from mallowspo_cli.recipe.choices import Precision

OURS = "mallowspo"
SIDES = ("trl_default", "trl_precompute", "trl_tuned", "full_logits_cached", OURS)
BATCHES = {"dpo": 4, "hh": 8}
"""Pairs of a global batch."""
MEMORY_VOCAB = 32_768


def main() -> None:
    """Compare, measure and print."""
    options = parse()
    if options.side:
        side_process(options)
        return
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("TRL is missing: pip install -c constraints.txt -e '.[bench]'")
    setting, machine = setting_of(options), measure.machine()
    with tempfile.TemporaryDirectory() as scratch:
        parity = {"time": compare(setting, Path(scratch))}
        rounds = [timed_round(setting, Path(scratch)) for _ in range(options.rounds)]
        memory = None
        if options.memory:
            large = replace(setting, vocab=max(MEMORY_VOCAB, setting.vocab), batches=1)
            parity["memory"] = compare(large, Path(scratch))
            memory = {name: process(name, "memory", large, Path(scratch)) for name in SIDES}
    found = report(setting, rounds, parity, memory, machine)
    if options.json:
        write_json(options.json, found)
    show(found)


def parse() -> argparse.Namespace:
    """The command line; --side and below are this script's own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", choices=measure.LENGTHS, default="dpo")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--pairs", type=int, help="of a global batch; default: dpo 4, hh 8")
    parser.add_argument("--batches", type=int, default=4, help="different batches of a round")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--too-long", choices=("drop", "cut"), default="cut")
    parser.add_argument("--vocab", type=int, help="default: the model's")
    parser.add_argument("--model", choices=SHAPES, default="cpu_small")
    parser.add_argument("--checkpointing", choices=("none", "full"), default="none")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="default: cpu fp32, cuda bf16"
    )
    parser.add_argument("--device-batch", type=int, help="pairs of a padded pass; default: all")
    parser.add_argument("--tuned-batch", type=int, default=1, help="the same on average: trl_tuned")
    parser.add_argument("--pack-tokens", type=int, default=4096, help="train.pack_tokens")
    parser.add_argument("--memory", action="store_true", help="peak memory too")
    parser.add_argument("--json", type=Path)
    for name in ("--side", "--setting", "--purpose", "--result"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args()


def setting_of(options: argparse.Namespace) -> Setting:
    """What the command line asks for. Raises SystemExit if there are no such batches."""
    pairs = options.pairs or BATCHES[options.lengths]
    setting = Setting(
        lengths=options.lengths,
        max_length=options.max_length,
        too_long=options.too_long,
        pairs=pairs,
        batches=options.batches,
        device_batch=options.device_batch or pairs,
        tuned_batch=options.tuned_batch,
        pack_tokens=options.pack_tokens,
        model=options.model,
        vocab=options.vocab or SHAPES[options.model][0],
        checkpointing=options.checkpointing,
        device=options.device,
        precision=options.precision or ("bf16" if options.device == "cuda" else "fp32"),
    )
    for name in ("device_batch", "tuned_batch"):
        if pairs % getattr(setting, name):
            raise SystemExit(f"{pairs} pairs are not a multiple of {name}.")
    if (fitting := len(setting.fitting())) < pairs * setting.batches:
        raise SystemExit(f"only {fitting} pairs fit into {setting.max_length} tokens.")
    return setting


def process(name: str, purpose: str, setting: Setting, scratch: Path) -> Any:
    """What a side's process finds."""
    result = scratch / f"{name}.json"
    command = [sys.executable, __file__, "--side", name, "--purpose", purpose]
    command += ["--setting", json.dumps(asdict(setting)), "--result", str(result)]
    environment = measure.one_core() if setting.device == "cpu" else {}
    if purpose == "memory":
        environment |= RETURNED
    return measure.run_side(command, result, environment)


def side_process(options: argparse.Namespace) -> None:
    """Be one side of one round."""
    setting, result = Setting(**json.loads(options.setting)), Path(options.result)
    if setting.device == "cpu":
        measure.pin()
        torch.set_num_threads(1)
    side = side_class(options.side)(setting)
    if options.purpose == "parity":
        write_json(result, parity_of(side, result.with_suffix(".npz")))
    elif options.purpose == "time":
        write_json(result, time_of(side))
    else:
        write_json(result, memory_of(side))


def compare(setting: Setting, scratch: Path) -> dict[str, dict[str, float]]:
    """Relative differences of every side from ours, in float32.

    Raises SystemExit(1), with a line for each, if they are too large.
    """
    exact, found = replace(setting, precision="fp32"), {}
    arrays = {name: process(name, "parity", exact, scratch)["arrays"] for name in SIDES}
    ours = arrays_of(arrays[OURS])
    for name in SIDES[:-1]:
        found[name] = differences(ours, arrays_of(arrays[name]))
    if lines := beyond_limits(found):
        print("\n".join(lines), file=sys.stderr)
        raise SystemExit(1)
    return found


def arrays_of(file: str) -> dict[str, np.ndarray]:
    """What a side wrote."""
    with np.load(file) as found:
        return dict(found)


def timed_round(setting: Setting, scratch: Path) -> dict[str, dict[str, float]]:
    """Every side once."""
    return {name: process(name, "time", setting, scratch) for name in SIDES}


def report(
    setting: Setting,
    rounds: list[dict[str, dict[str, float]]],
    parity: dict[str, Any],
    memory: dict[str, dict[str, float]] | None,
    machine: dict[str, Any],
) -> dict[str, Any]:
    """What the JSON file holds."""
    ratios, ranges = measure.ratios_of(rounds, OURS)
    medians = measure.medians_of(rounds)
    fitting, drawn = setting.fitting(), setting.drawn()
    found = {
        "lengths": setting.lengths,
        "checkpointing": setting.checkpointing,
        "vocab": setting.vocab,
        "pairs_per_batch": setting.pairs,
        "step": "forward and backward of a global batch, its layout included, no optimizer step",
        "ratio_of": "CPU time" if setting.device == "cpu" else "wall time",
        "setting": asdict(setting),
        "pairs_that_fit": len(fitting),
        "padded_over_shared_tokens": {
            "measured": measure.padded_over_shared(drawn, setting.pairs),
            "all": measure.padded_over_shared(
                measure.draw_lengths(fitting, len(fitting)), setting.pairs
            ),
        },
        "ratios": ratios,
        "ratio_ranges": ranges,
        "medians": medians,
        **useful_work(setting, medians),
        "rounds": rounds,
        "parity": parity,
        "versions": measure.versions(),
        "machine": machine | {"load_average_after": os.getloadavg()},
    }
    if memory:
        peaks = {name: row["peak_mib"] for name, row in memory.items()}
        found["peak_memory"] = {"vocab": max(MEMORY_VOCAB, setting.vocab), "peak_mib": peaks}
        found["peak_memory_ratio"] = {
            name: peak / peaks[OURS] for name, peak in peaks.items() if name != OURS
        }
    return found


def useful_work(setting: Setting, medians: dict[str, dict[str, float]]) -> dict[str, Any]:
    """FLOP/s of every side that no way to do the step can do without (three forward passes of
    prompts read once), and on a GPU of plan's table their share of its peak (MFU).
    """
    model = build_model(replace(setting, device="meta"), NAME)
    each = 3 * float(ForwardFlops.of(model).of_pairs(setting.drawn()).mean())
    rates = {name: each * row["pairs_per_s"] for name, row in medians.items()}
    found: dict[str, Any] = {"useful_flops_per_s": rates}
    if setting.device == "cuda":
        precision = Precision(setting.precision)
        peak = read_hardware(None, None, precision).peak(precision)
        found["mfu"] = {name: rate / peak for name, rate in rates.items()}
    return found


def show(found: dict[str, Any]) -> None:
    """A table, and what has to be known to read it."""
    console = Console(highlight=False, width=max(100, Console().width))
    setting, machine = found["setting"], found["machine"]
    table = Table(title=f"{found['step']}; ratios of {found['ratio_of']}")
    memory = found.get("peak_memory")
    columns = ["side", "CPU s", "wall s", "pairs/s", "useful tok/s", "ours faster by"]
    for name in [*columns, *(["peak MiB"] if memory else [])]:
        table.add_column(name, justify="left" if name == "side" else "right", no_wrap=True)
    for name in SIDES:
        row = found["medians"][name]
        cells = [name, f"{row['cpu_s']:.2f}", f"{row['wall_s']:.2f}", f"{row['pairs_per_s']:.2f}"]
        cells.append(f"{row['useful_tokens_per_s']:.0f}")
        cells.append("" if name == OURS else ratio(found, name))
        if memory:
            cells.append(f"{memory['peak_mib'][name]:.0f}")
        table.add_row(*cells)
    console.print(table)
    if memory:
        console.print(f"peak MiB: above weights and gradients, one batch, V={memory['vocab']}")
    tokens = found["padded_over_shared_tokens"]
    console.print(
        f"{found['lengths']}, {setting['batches']} batches of {setting['pairs']} pairs, max_length "
        f"{setting['max_length']} ({setting['too_long']}), V={setting['vocab']}, "
        f"checkpointing={setting['checkpointing']}, {setting['device']} {setting['precision']}; "
        f"padded/shared tokens {tokens['measured']:.2f} (all that fit: {tokens['all']:.2f})\n"
        f"{len(found['rounds'])} rounds; {machine['cpu']}, {machine['threads']} thread on core "
        f"{machine['pinned_to_core']}, load {machine['load_average'][0]:.2f} before, "
        f"{machine['load_average_after'][0]:.2f} after\n"
        + ", ".join(f"{name} {v}" for name, v in found["versions"].items())
        + "\nTRL turns activation checkpointing on by default; here it is the same for all sides."
        + "\nOff a GPU, TRL's head computes all positions in a loop over tiles, which inflates its"
        " cost: read full_logits_cached too."
    )


def ratio(found: dict[str, Any], name: str) -> str:
    """Median and range."""
    low, high = (found["ratio_ranges"][name][key] for key in ("min", "max"))
    return f"{found['ratios'][name]:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
