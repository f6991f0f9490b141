"""Training runs in processes of their own, one after another: jobs of a sweep or an experiment."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from mallowspo_cli.distributed import log
from mallowspo_cli.files import make_directory
from mallowspo_cli.recipe.load import LoadedRecipe, load_recipe
from mallowspo_cli.training.run_directory import check_directory
from mallowspo_cli.training.watch import STOPPED, STOPPED_FILE, StoppedError

TRAIN = ("-m", "mallowspo_cli", "train")
WISHES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""What asks a sweep to stop; a job that trains saves itself at the first of them."""
OWN_LINE = re.compile(r"mallowspo(?: \(process \d+\))?: ")
"""Beginning of the line that says what went wrong, wherever a launcher's own lines stand."""
FOLLOWS = "its own message says why"
"""Such a line is of a process that ended since another one did."""
FAILED = "failed: "
"""Beginning of the last line in the log of a job that failed."""
State = Literal["finished", "failed", "stopped", "begun", "waiting"]


@dataclass(frozen=True)
class Job:
    """One run of `mallowspo train`."""

    name: str
    """Safe as a file name, and no other job's of its sweep."""
    words: tuple[str, ...]
    """All words of `mallowspo train`: `recipe=`, and what makes `output_dir` the directory."""
    directory: Path
    """The run directory."""
    loaded: LoadedRecipe | None = None
    """What the words compose to, where that is known."""

    @property
    def finished(self) -> bool:
        """Whether its last file is there; `check_job` tells whether it is this job's."""
        return (self.directory / "results.json").is_file()


def check_job(job: Job) -> None:
    """Compose the job's recipe, and make sure that its directory is free or its own.

    Raises:
        RecipeError: the words are no recipe.
        CheckpointError: the directory holds another run.
    """
    loaded = job.loaded
    if loaded is None:
        (name,) = [w.removeprefix("recipe=") for w in job.words if w.startswith("recipe=")]
        loaded = load_recipe(name, [w for w in job.words if not w.startswith("recipe=")])
    found = Path(loaded.recipe.output_dir)
    assert found == job.directory, f"{job.name} writes {found}, not {job.directory}"
    if job.directory.is_dir():
        check_directory(job.directory, loaded, resume=True)


def train_job(job: Job, log_file: Path, launcher: Sequence[str] = ()) -> str | None:
    """Train a job, or go on with it, unless it is finished; returns None, or why it failed.

    Args:
        log_file: what the run prints is added to it.
        launcher: what stands before `-m mallowspo_cli train`; default: this Python.

    Raises:
        RecipeError: the words are no recipe.
        CheckpointError: the directory holds another run.
        StoppedError: this process or the run was asked to stop; the same call goes on.
        KeyboardInterrupt: Ctrl-C. The run saved itself and ended; a second one ends it at once.
    """
    check_job(job)
    if job.finished:
        return None
    make_directory(log_file.parent, "logs")
    command = [*(launcher or (sys.executable,)), *TRAIN, *job.words, "--resume"]
    stopped_before = _changed(job.directory / STOPPED_FILE)
    with log_file.open("ab") as out:
        begin = out.seek(0, os.SEEK_END)
        code, asked = _run(command, out.fileno())
    # Launchers have exit codes of their own; what the run itself wrote tells.
    stopped = code != 0 and _changed(job.directory / STOPPED_FILE) not in (None, stopped_before)
    if asked is not None or code == STOPPED or stopped:
        why = f" ({asked})" if asked else ""
        raise StoppedError(f"stopped{why} in {job.name}. The same command goes on from there.")
    if code == 0:
        return None
    reason = _reason(log_file, begin, code)
    with log_file.open("a", encoding="utf-8") as out:
        out.write(f"{FAILED}{reason}\n")
    return reason


def job_state(job: Job, log_file: Path) -> tuple[State, str]:
    """How far a job is, by its files alone, and of a failed one why.

    A run that nobody wrote the end of, such as one that was killed with its machine, has begun.
    """
    if job.finished:
        return "finished", ""
    last = _lines(log_file, max(0, log_file.stat().st_size - 65536)) if log_file.is_file() else []
    if last and last[-1].startswith(FAILED):
        return "failed", last[-1].removeprefix(FAILED)
    if (job.directory / STOPPED_FILE).is_file():
        return "stopped", ""
    return ("begun" if job.directory.is_dir() else "waiting"), ""


def _run(command: Sequence[str], output: int) -> tuple[int, str | None]:
    """The exit code, and the name of the signal that asked this process to stop meanwhile.

    The child is in a session of its own: Ctrl-C at a terminal would end it before it is saved.
    """
    asked: list[str] = []
    started: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, _frame: FrameType | None) -> None:
        asked.append(signal.Signals(number).name)
        for process in started:
            process.terminate()

    with _listening(hand_on):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # torch's launcher kills what it started 30 s after a SIGTERM otherwise.
            env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240", **os.environ},
        )
        started.append(process)
        if asked:
            process.terminate()
        try:
            code = process.wait()
        except BaseException:
            log.info("stopping the run: it saves itself first (Ctrl-C again: it does not)")
            _end(process)
            raise
    return code, asked[0] if asked else None


@contextmanager
def _listening(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handler` at a wish to stop while the block runs.

    What is ignored stays so: under nohup the end of the terminal is no wish.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wishes = [number for number in WISHES if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in wishes}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.terminate()
        process.wait()
    except BaseException:
        _kill(process)
        raise


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a child at once, and with it what it started: a launcher's trainers would live on."""
    # torch's launcher gives each trainer a session of its own, which the group does not reach.
    family = _family(process.pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for number in family:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _family(number: int) -> list[int]:
    """Ids of the processes that a process started, and of those that they did, as Linux has it."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        # One that ended meanwhile has no file.
        with suppress(OSError):
            parent = int(file.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(file.parent.name))
    found = list(children.get(number, ()))
    for child in found:
        found += children.get(child, ())
    return found


def _changed(file: Path) -> int | None:
    """When a file was written last; None where there is none."""
    return file.stat().st_mtime_ns if file.is_file() else None


def _reason(log_file: Path, begin: int, code: int) -> str:
    """The line of the log that says why the run ended; the last one if none does.

    In a launch the process that failed says so first; the others follow.
    """
    lines = _lines(log_file, begin)
    own = [line for line in lines if OWN_LINE.match(line)]
    if own:
        first = next((line for line in own if FOLLOWS not in line), own[0])
        return OWN_LINE.sub("", first, count=1)
    last = f": {lines[-1]}" if lines else ""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}{last}"
    return f"ended with exit code {code}{last}"


def _lines(log_file: Path, begin: int) -> list[str]:
    """Lines of a log from a place on, without the empty ones."""
    with log_file.open("rb") as file:
        file.seek(begin)
        return [text for line in file if (text := line.decode(errors="replace").strip())]
