"""Ranks, and who talks: only the main process logs."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("mallowspo")
console = Console(stderr=True, highlight=False)


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


@contextmanager
def progress(task: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr with rate and time left; yields a function that advances it.

    Where stderr is no terminal it writes a line about every 20 seconds instead.
    """
    if not is_main():
        yield lambda _count: None
        return
    if not console.is_terminal:
        yield _Lines(task, total, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed}}/{{task.total}} {unit}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        handle = bar.add_task(task, total=total)
        yield lambda count: bar.advance(handle, count)


class _Lines:
    """Progress where there is no terminal."""

    def __init__(self, task: str, total: int, unit: str):
        self.task, self.total, self.unit, self.done = task, total, unit, 0
        self.start = self.last = time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last < 20 and self.done < self.total:
            return
        self.last, rate = now, self.done / max(now - self.start, 1e-9)
        left = (self.total - self.done) / rate
        log.info(
            "%s: %d/%d %s, %.1f/s, %.0f s left",
            *(self.task, self.done, self.total, self.unit, rate, left),
        )
