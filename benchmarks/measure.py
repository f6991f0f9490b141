"""What the comparisons share: pairs of real lengths, ratios, a subprocess a side, the machine."""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mallowspo_cli.data.table import TokenizedPair, pair_id

LENGTHS = {"dpo": "lengths_dpo_en_demo.json", "hh": "lengths_hh_harmless_test.json"}
PACKAGES = ("mallowspo", "torch", "transformers", "trl", "accelerate", "datasets", "numpy")
MIB = 2**20

Lengths = list[tuple[int, int, int]]
"""Tokens of prompt, chosen and rejected of each pair."""


def known_lengths(name: str) -> Lengths:
    """All pairs of a file of benchmarks/lengths/."""
    file = Path(__file__).parent / "lengths" / LENGTHS[name]
    return [tuple(row) for row in json.loads(file.read_text())["lengths"]]


def fit_lengths(lengths: Lengths, max_length: int, too_long: str) -> Lengths:
    """The pairs that fit into `max_length` tokens of prompt and response together.

    too_long: `drop` leaves a pair out if either response does not fit; `cut` cuts responses' ends
    and leaves out only pairs whose prompt leaves no room (what TRL does with `max_length`).
    """
    if too_long == "drop":
        return [row for row in lengths if row[0] + max(row[1:]) <= max_length]
    return [
        (prompt, min(chosen, max_length - prompt), min(rejected, max_length - prompt))
        for prompt, chosen, rejected in lengths
        if prompt < max_length
    ]


def draw_lengths(lengths: Lengths, count: int, seed: int = 0) -> Lengths:
    """`count` different pairs. Raises ValueError if there are fewer."""
    if count > len(lengths):
        raise ValueError(f"asked for {count} pairs, of which {len(lengths)} fit")
    order = np.random.default_rng(seed).permutation(len(lengths))
    return [lengths[i] for i in order[:count]]


def random_pairs(lengths: Lengths, vocab: int, seed: int = 0) -> list[TokenizedPair]:
    """Pairs of these lengths with random token ids below `vocab`."""
    draw = np.random.default_rng(seed)
    pairs = []
    for row in lengths:
        parts = [draw.integers(0, vocab, size, dtype=np.int32) for size in row]
        pairs.append(TokenizedPair(pair_id(*parts), *parts))
    return pairs


def padded_over_shared(lengths: Lengths, batch: int) -> float:
    """Tokens of padded batches, two rows a pair, over those with every prompt once."""
    batches = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
    padded = sum(2 * len(rows) * max(row[0] + max(row[1:]) for row in rows) for rows in batches)
    return padded / sum(map(sum, lengths))


def ratios_of(
    rounds: Sequence[Mapping[str, Mapping[str, float]]], ours: str, key: str = "pairs_per_s"
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Ours over theirs: the median of the rounds' ratios by side, and their ranges."""
    sides = [name for name in rounds[0] if name != ours]
    every = {name: [row[ours][key] / row[name][key] for row in rounds] for name in sides}
    medians = {name: statistics.median(found) for name, found in every.items()}
    return medians, {name: {"min": min(f), "max": max(f)} for name, f in every.items()}


def medians_of(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """The median of every figure by side."""
    return {
        name: {key: statistics.median(row[name][key] for row in rounds) for key in figures}
        for name, figures in rounds[0].items()
    }


def run_side(command: Sequence[str], result: Path, environment: Mapping[str, str]) -> Any:
    """Run a process of its own, which writes its figures to `result` as JSON, and read them.

    Raises SystemExit(1) with the end of its output if it fails.
    """
    result.unlink(missing_ok=True)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "check": False}
    done = subprocess.run(command, env={**os.environ, **environment}, **options)
    if done.returncode or not result.is_file():
        print(done.stdout[-4000:], file=sys.stderr)
        print(f"failed with {done.returncode}: {' '.join(command)}", file=sys.stderr)
        raise SystemExit(1)
    return json.loads(result.read_text())


def whole_process(command: Sequence[str], environment: Mapping[str, str]) -> dict[str, float]:
    """Seconds and peak memory of a process. Raises SystemExit(1) as `run_side` does."""
    with tempfile.TemporaryFile("w+") as output:
        options = {"env": {**os.environ, **environment}, "stdout": output, "stderr": output}
        start = time.perf_counter()
        child = subprocess.Popen(command, **options)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            print(output.read()[-4000:], file=sys.stderr)
            print(f"failed with {child.returncode}: {' '.join(command)}", file=sys.stderr)
            raise SystemExit(1)
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "peak_rss_mib": usage.ru_maxrss / 1024}


def one_core() -> dict[str, str]:
    """Environment of a process that computes with one thread and downloads nothing."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def pin() -> int:
    """Keep this process on one core; returns which."""
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def peak_rss(work: Callable[[], None], every: float = 0.002) -> float:
    """MiB by which this process grew while `work` ran, looked at every `every` seconds."""
    start = highest = _rss()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(every):
            highest = max(highest, _rss())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return (max(highest, _rss()) - start) / MIB


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "threads": 1,
        "pinned_to_core": max(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*words: str) -> str:
    """What git says of this checkout; nothing where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def versions() -> dict[str, str | None]:
    """Installed versions of what takes part; None where it is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


class Clock:
    """CPU and wall seconds of a block; on CUDA the wall waits for the device."""

    def __init__(self, wait: Callable[[], None] = lambda: None):
        self.wait, self.cpu_s, self.wall_s = wait, 0.0, 0.0

    def __enter__(self) -> "Clock":
        self.wait()
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self.cpu_s += time.process_time() - self._cpu
        self.wall_s += time.perf_counter() - self._wall
