"""Runs of the command line by launchers, as a user starts them, on a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mallowspo_cli.commands import train
from tests.conftest import pair_rows

ROOT = Path(__file__).parents[2]
# As it is before accelerate writes to it.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
LAUNCHERS = {
    "one process": [sys.executable],
    "ddp": [*TORCHRUN, "--nproc-per-node=2"],
    "zero3": [*ACCELERATE, "--config_file", str(ROOT / "recipes/accelerate/cpu_zero3.yaml")],
    "zero2": [
        *(*ACCELERATE, "--use_deepspeed", "--zero_stage=2", "--num_processes=2"),
        *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"),
    ],
}
STEPS = 20


def words(place: Path, run: Path) -> list[str]:
    """A recipe of 20 steps whose loss falls, on pairs that lie in `place`."""
    data = place / "pairs.jsonl"
    if not data.is_file():
        data.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(32)))
    return [
        *("recipe=quickstart", "model=tiny_random", "dataset=local", f"dataset.path={data}"),
        *("dataset.eval_size=8", "train.precision=fp32", "train.global_batch_size=8"),
        # Small packs, so that every process has several of unequal numbers of pairs.
        *("train.pack_tokens=130", f"train.max_steps={STEPS}", "train.epochs=9"),
        *("train.learning_rate=1e-3", "eval.kl_prompts=0", "checkpoint.every=4"),
        *(f"reference.store={place / 'store'}", f"output_dir={run}"),
    ]


def start(
    kind: str, arguments: list[str], module: Sequence[str] = ("mallowspo_cli", "train")
) -> subprocess.Popen[str]:
    """`mallowspo train`, or another module, by a launcher."""
    return subprocess.Popen(
        [*LAUNCHERS[kind], "-m", *module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
    )


def wait(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str]:
    """Exit code and what it said; the whole launch is ended after `seconds`."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for number in (process.pid, *_below(process.pid)):
            os.kill(number, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"no end within {seconds} s: {output[-3000:]}") from None
    return process.returncode, output


def launch(kind: str, arguments: list[str]) -> str:
    """Run to the end, which has to be a good one; returns what it said (one process: nothing)."""
    if kind == "one process":
        resume = "--resume" in arguments
        words = [word for word in arguments[1:] if word != "--resume"]
        train.run(arguments[0].removeprefix("recipe="), words, resume=resume, dry_run=False)
        return ""
    code, output = wait(start(kind, arguments))
    assert code == 0, output[-4000:]
    return output


def process_of(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process that is `rank` in a launch."""
    for number in _below(launcher.pid):
        try:
            environment = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        except OSError:
            # It has just ended.
            continue
        if f"RANK={rank}".encode() in environment:
            return number
    raise AssertionError(f"no process is rank {rank}")


def _below(process: int) -> list[int]:
    """Its children, theirs, and so on; a launcher gives each a session of its own."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [number for child in map(int, children) for number in (child, *_below(child))]


def wait_for_step(run: Path, step: int, launcher: subprocess.Popen[str]) -> None:
    """Return when a run has logged `step`."""
    start = time.monotonic()
    while step > steps_of(run):
        if launcher.poll() is not None or time.monotonic() - start > 240:
            raise AssertionError(f"no step {step}: {wait(launcher, 1)[1][-3000:]}")
        time.sleep(0.05)


def steps_of(run: Path) -> int:
    """Steps that a run has logged."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return sum('"grad_norm"' in line for line in lines)


def curve(run: Path) -> dict[str, list[float]]:
    """What a run says of each step, and of each evaluation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "dispersion/weight_mean")
    steps = [line for line in lines if "grad_norm" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    return {
        **{key: [line[key] for line in steps] for key in keys},
        "eval/loss": [line["eval/loss"] for line in evaluations],
    }
