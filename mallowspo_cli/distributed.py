"""Ranks, and who talks: only the main process logs."""

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mallowspo_cli.errors import MallowsPOError

T = TypeVar("T")
log = logging.getLogger("mallowspo")
console = Console(stderr=True, highlight=False)
BEAT_SECONDS = 5.0
"""How often a process that others wait for gives a sign of life."""
SILENCE_SECONDS = 300.0
"""How long others wait for the next sign."""


def rank() -> int:
    """Rank of this process in the launch, 0 when it runs alone."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def world_size() -> int:
    """Number of processes in the launch, 1 when this one runs alone."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")))


def is_main() -> bool:
    """Whether this process is the one that talks and writes."""
    return rank() == 0


def set_up_logging() -> None:
    """Readable progress lines on stderr from the main process; errors only from the others."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_level=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="%H:%M:%S"))
    else:
        # Whole lines, whatever their length: paths in a log file have to be found again.
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if is_main() else logging.ERROR)


Advance = Callable[..., None]
"""advance(count, amount=0): `count` units are done, which came to `amount` of the measure."""


@contextmanager
def progress(task: str, total: int, unit: str, measure: str | None = None) -> Iterator[Advance]:
    """A progress bar on stderr with rates and time left; yields a function that advances it.

    Where stderr is no terminal it writes a line about every 20 seconds instead. `measure` names
    what else has a rate, such as tokens.
    """
    if not is_main():
        yield lambda _count, _amount=0: None
        return
    if not console.is_terminal:
        yield _Lines(task, total, unit, measure)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed}}/{{task.total}} {unit}"),
        TextColumn("{task.fields[rates]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        rates = _Rates(unit, measure)
        handle = bar.add_task(task, total=total, rates="")

        def advance(count: int, amount: int = 0) -> None:
            rates.add(count, amount)
            bar.update(handle, advance=count, rates=str(rates))

        yield advance


class _Rates:
    """How fast it goes, since the beginning."""

    def __init__(self, unit: str, measure: str | None):
        self.unit, self.measure = unit, measure
        self.done = self.amount = 0
        self.start = time.monotonic()

    def add(self, count: int, amount: int) -> None:
        self.done += count
        self.amount += amount

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.start, 1e-9)

    def __str__(self) -> str:
        text = f"{self.done / self.seconds:,.1f} {self.unit}/s"
        if self.measure and self.amount:
            text += f", {self.amount / self.seconds:,.0f} {self.measure}/s"
        return text


class _Lines:
    """Progress where there is no terminal."""

    def __init__(self, task: str, total: int, unit: str, measure: str | None):
        self.task, self.total, self.unit = task, total, unit
        self.rates = _Rates(unit, measure)
        self.last = self.rates.start

    def __call__(self, count: int, amount: int = 0) -> None:
        if count == 0:
            return
        self.rates.add(count, amount)
        now, done = time.monotonic(), self.rates.done
        if now - self.last < 20 and done < self.total:
            return
        self.last = now
        left = (self.total - done) * self.rates.seconds / max(done, 1)
        log.info(
            "%s: %d/%d %s, %s, %.0f s left",
            *(self.task, done, self.total, self.unit, self.rates, left),
        )


@contextmanager
def heartbeat(file: Path) -> Iterator[None]:
    """Touch `file` every few seconds, from a thread, while the block runs."""
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(file, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _beat(file: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        # The file may have been taken away; its owner finds out by itself.
        with contextlib.suppress(OSError):
            os.utime(file)


def main_first(work: Callable[[], T], directory: Path) -> T:
    """Run `work` in the main process, then in the others, which find what it left.

    Needs no process group, so no collective can time out meanwhile: the others watch a file in
    `directory`, which all processes of the launch must see.

    Raises:
        MallowsPOError: the main process failed, or gives no sign of life.
    """
    if world_size() == 1:
        return work()
    name, unique = _launch_name()
    file = directory / f"{name}.json"
    if not is_main():
        _wait_for(file, unique)
        return work()
    directory.mkdir(parents=True, exist_ok=True)
    _put(file, "working")
    # To the end of the process: a file that is not touched may be an earlier launch's.
    threading.Thread(target=_beat, args=(file, threading.Event()), daemon=True).start()
    try:
        done = work()
    except BaseException:
        _put(file, "failed")
        raise
    _put(file, "done")
    return done


def _wait_for(file: Path, unique: bool) -> None:
    """Wait until the main process is done.

    Unless the file's name is this launch's alone, it may be an earlier one's: what it says is
    believed when it changes while we look. "done" is also believed after a while, since the main
    process may have ended; at worst we then do its work ourselves.
    """
    first = seen = _look(file)
    start = last = time.monotonic()
    while True:
        now = _look(file)
        if now != seen:
            seen, last = now, time.monotonic()
        believed = unique or now != first
        if now[0] == "done" and (believed or time.monotonic() - start > 3 * BEAT_SECONDS):
            return
        if believed and now[0] == "failed":
            raise MallowsPOError("the main process failed; its own message says why.")
        if time.monotonic() - last > SILENCE_SECONDS:
            raise MallowsPOError(
                f"rank {rank()}: no sign of the main process for {SILENCE_SECONDS:.0f} s in "
                f"{file.parent}. Every machine of a launch must see one cache (MALLOWSPO_CACHE)."
            )
        time.sleep(0.2)


def _look(file: Path) -> tuple[str, int]:
    """What a launch's file says, and its last sign of life."""
    try:
        return file.read_text(), file.stat().st_mtime_ns
    except FileNotFoundError:
        return "", 0


def _put(file: Path, state: str) -> None:
    temporary = file.with_suffix(f".{rank()}.tmp")
    temporary.write_text(state)
    temporary.replace(file)


def _launch_name() -> tuple[str, bool]:
    """A name that every process of a launch has, and whether no other launch can have it."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID")
    parts = [os.environ.get(name, "") for name in (*names, "TORCHELASTIC_RESTART_COUNT")]
    alone = os.environ.get("LOCAL_WORLD_SIZE") == str(world_size())
    if alone:
        # One machine: all have one parent. Ids above may be a launcher's fixed defaults.
        parts.append(f"{os.getppid()} {_start_time(os.getppid())}")
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest(), alone


def _start_time(process: int) -> str:
    """When a process began, in ticks: with its number a name that is never used twice."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
