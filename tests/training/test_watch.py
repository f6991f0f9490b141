"""A run that hangs says where; one that is asked to stop is told so; time runs out in time."""

import os
import signal
import subprocess
import sys
import threading
import time

from mallowspo_cli.training.watch import HUNG, STOPPED, Stop, StoppedError, Watch

HANGS = """
import time
from mallowspo_cli.training.watch import Watch

def waits_for_ever():
    time.sleep(60)

with Watch(0.3, 5).watching():
    waits_for_ever()
"""


def test_a_process_that_hangs_prints_its_stacks_and_ends() -> None:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=False
    )
    assert time.monotonic() - start < 50
    assert done.returncode == HUNG
    assert "process 5): no progress for 0 s (train.hang_seconds)" in done.stderr
    assert "in waits_for_ever" in done.stderr


def test_progress_keeps_the_watch_quiet() -> None:
    watch = Watch(100, 0)
    start = time.monotonic()
    assert not watch.overdue(start + 90)
    assert watch.overdue(start + 110)
    watch.alive()
    assert not watch.overdue(start + 90)


def test_no_seconds_watch_nothing() -> None:
    before = threading.active_count()
    with Watch(0, 0).watching():
        assert threading.active_count() == before
    with Watch(100, 0).watching():
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_signals_are_wishes_to_stop_while_it_listens() -> None:
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)}
    for number in before:
        stop = Stop()
        with stop.listening():
            assert stop.reason is None
            os.kill(os.getpid(), number)
            assert stop.reason == signal.Signals(number).name
        assert signal.getsignal(number) == before[number]


def test_the_end_of_the_jobs_time_is_one() -> None:
    assert Stop(time.time() + 60).reason is None
    assert Stop(time.time() - 1).reason == "the end of the job's time"


def test_a_stopped_run_has_an_exit_code_of_its_own() -> None:
    assert StoppedError("stopped").exit_code == STOPPED == 75
