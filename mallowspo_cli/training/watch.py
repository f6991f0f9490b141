"""What watches over a run: signals that ask it to stop, time that runs out, processes that hang."""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mallowspo_cli.errors import MallowsPOError

STOPPED = 75
"""Exit code of a run that was asked to stop and can go on: try again later (EX_TEMPFAIL)."""
STOPPED_FILE = "stopped.json"
"""In the run directory while it is stopped: launchers have exit codes of their own."""
STDERR = 2
HUNG = 70
"""Exit code of a process that made no progress."""


class StoppedError(MallowsPOError):
    """The run was asked to stop, and has saved itself."""

    exit_code = STOPPED


class Stop:
    """Why the run should end after this step: a signal, or the end of the job's time."""

    def __init__(self, end: float | None = None):
        self.end = end
        """Seconds since 1970 after which the run should stop; None: never."""
        self.signal: int | None = None

    @property
    def reason(self) -> str | None:
        """What asks for the stop, or None."""
        if self.signal is not None:
            return signal.Signals(self.signal).name
        if self.end is not None and time.time() >= self.end:
            return "the end of the job's time"
        return None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGUSR1 as wishes to stop while the block runs."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number


class Watch:
    """Ends this process, with the stacks of its threads, where it makes no progress.

    A process that waits for another one waits for ever: the stacks of all of them say who stands
    where.
    """

    def __init__(self, seconds: float, rank: int):
        self.seconds, self.rank = seconds, rank
        self._last = time.monotonic()
        self._over = threading.Event()

    def alive(self) -> None:
        """Progress was made."""
        self._last = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs; 0 seconds watch nothing."""
        if self.seconds == 0:
            yield
            return
        self.alive()
        thread = threading.Thread(target=self._look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _look(self) -> None:
        while not self._over.wait(min(1.0, self.seconds / 4)):
            if self.overdue(time.monotonic()):
                self._end()

    def overdue(self, now: float) -> bool:
        """Whether the last progress lies too far back."""
        return now - self._last > self.seconds

    def _end(self) -> None:
        # Not through streams that another thread may hold.
        os.write(
            STDERR,
            f"mallowspo (process {self.rank}): no progress for {self.seconds:.0f} s "
            "(train.hang_seconds). Where its threads stand:\n".encode(),
        )
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        # Others of the launch print theirs, too, before the launcher ends them.
        time.sleep(min(5.0, self.seconds))
        os._exit(HUNG)
