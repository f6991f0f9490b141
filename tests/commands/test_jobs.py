"""Jobs in processes of their own finish, fail, stop and go on; most are of a fake trainer."""

import inspect
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mallowspo_cli import distributed
from mallowspo_cli.commands import train
from mallowspo_cli.commands.jobs import FOLLOWS, Job, job_state, train_job
from mallowspo_cli.errors import CheckpointError, RecipeError
from mallowspo_cli.recipe.load import load_recipe
from mallowspo_cli.training.watch import StoppedError

HEAD = """
import os, signal, sys, time
from pathlib import Path
run = Path("runs/job")
run.mkdir(parents=True, exist_ok=True)
"""
SAVES = """
def save(*_):
    time.sleep(0.2)
    (run / "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
"""

Fake = Callable[[str], tuple[str, ...]]


@pytest.fixture(autouse=True)
def signals_as_at_a_terminal() -> Iterator[None]:
    """Where the tests run in the background, under nohup say, some are ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A function that makes a launcher of Python lines, in place of a trainer."""
    monkeypatch.chdir(tmp_path)

    def make(lines: str) -> tuple[str, ...]:
        file = tmp_path / "trainer.py"
        file.write_text(HEAD + lines)
        return (sys.executable, str(file))

    return make


@pytest.fixture
def job() -> Job:
    return Job("job", ("recipe=quickstart", "name=job"), Path("runs/job"))


LOG = Path("logs/job.log")


def test_a_job_trains_in_a_process_of_its_own_and_is_not_run_again(
    tiny_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = Job("job", (*tiny_words, "train.max_steps=1"), Path("runs/tiny"))
    assert job_state(job, LOG) == ("waiting", "")
    assert train_job(job, LOG) is None
    assert job_state(job, LOG) == ("finished", "")
    assert "training: steps 1 to 1" in LOG.read_text()
    assert train_job(job, LOG, launcher=("/no/such/program",)) is None
    other = Job("job", (*job.words, "seed=3"), job.directory)
    with pytest.raises(CheckpointError, match="seed was 0, is 3"):
        train_job(other, LOG)


def test_the_words_are_those_of_the_job_and_are_checked_first(fake: Fake, job: Job) -> None:
    launcher = fake("print(sys.argv[1:])")
    assert train_job(job, LOG, launcher) is None
    words = ["-m", "mallowspo_cli", "train", "recipe=quickstart", "name=job", "--resume"]
    assert str(words) in LOG.read_text()
    broken = Job("job", (*job.words, "seed=x"), job.directory)
    with pytest.raises(RecipeError, match="seed=x"):
        train_job(broken, Path("logs/other.log"), launcher)
    assert not Path("logs/other.log").exists()


FIRST = "mallowspo (process 1): the loss of step 2 is not finite."
AGAIN = "mallowspo (process 2): the loss of step 2 is not finite, says another."
LOST = "mallowspo: another process of this launch ended, and its own message says why (closed)."


@pytest.mark.parametrize("printed", [[FIRST, LOST], [LOST, FIRST], [FIRST, AGAIN, LOST]])
def test_a_failure_is_what_the_process_said_that_failed_first(
    fake: Fake, job: Job, printed: list[str]
) -> None:
    LOG.parent.mkdir()
    LOG.write_text("mallowspo: an older reason\n")
    lines = "\n".join(printed)
    launcher = fake(f"""
print({lines!r}, flush=True)
sys.exit("torch.distributed.elastic: a long story")
""")
    why = "the loss of step 2 is not finite."
    assert train_job(job, LOG, launcher) == why
    lines = LOG.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("mallowspo: an older reason", f"failed: {why}")
    assert job_state(job, LOG) == ("failed", why)


def test_processes_that_follow_say_so_in_words_that_jobs_know() -> None:
    assert all(FOLLOWS in inspect.getsource(module) for module in (train, distributed))


def test_where_only_those_that_follow_speak_theirs_is_the_reason(fake: Fake, job: Job) -> None:
    launcher = fake(f"print({LOST!r}); sys.exit(1)")
    assert train_job(job, LOG, launcher) == LOST.removeprefix("mallowspo: ")


def test_a_failure_without_such_a_line_is_the_last_one_or_the_signal(fake: Fake, job: Job) -> None:
    assert (
        train_job(job, LOG, fake("raise KeyError('x')")) == "ended with exit code 1: KeyError: 'x'"
    )
    # The run directory of a fake is no run.
    Path("runs/job").rmdir()
    assert train_job(job, LOG, fake("os.kill(os.getpid(), 9)")) == "ended by SIGKILL"


def test_a_job_that_is_tried_again_has_not_failed_until_it_does(fake: Fake, job: Job) -> None:
    assert train_job(job, LOG, fake("sys.exit(3)")) == "ended with exit code 3"
    assert job_state(job, LOG)[0] == "failed"
    with LOG.open("a") as file:
        file.write("going on\n")
    assert job_state(job, LOG) == ("begun", "")
    (job.directory / "stopped.json").write_text("{}")
    assert job_state(job, LOG) == ("stopped", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_wish_to_stop_is_handed_on_and_the_run_saves_itself(
    fake: Fake, job: Job, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    launcher = fake(f"{SAVES}\nos.kill(os.getppid(), {number.value})\ntime.sleep(60)")
    with pytest.raises(StoppedError, match=rf"stopped \({number.name}\) in job") as caught:
        train_job(job, LOG, launcher)
    assert caught.value.exit_code == 75
    assert (job.directory / "saved").exists()
    assert signal.getsignal(number) is before
    assert "failed" not in LOG.read_text()


def test_under_nohup_the_end_of_the_terminal_is_no_wish_to_stop(fake: Fake, job: Job) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train_job(job, LOG, fake("os.kill(os.getppid(), signal.SIGHUP)")) is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_waits_until_the_run_has_saved_itself(fake: Fake, job: Job) -> None:
    launcher = fake(f"{SAVES}\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)")
    with pytest.raises(KeyboardInterrupt):
        train_job(job, LOG, launcher)
    assert (job.directory / "saved").exists()


def test_a_second_ctrl_c_ends_a_run_that_does_not_stop(fake: Fake, job: Job) -> None:
    launcher = fake("""
(run / "id").write_text(str(os.getpid()))
signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getppid(), signal.SIGINT))
os.kill(os.getppid(), signal.SIGINT)
while True:
    time.sleep(0.05)
""")
    with pytest.raises(KeyboardInterrupt):
        train_job(job, LOG, launcher)
    with pytest.raises(ProcessLookupError):
        os.kill(int((job.directory / "id").read_text()), 0)


@pytest.mark.parametrize("session", ["", "os.setsid()"])
def test_a_second_ctrl_c_ends_what_a_launcher_started_in_whatever_session(
    fake: Fake, job: Job, session: str
) -> None:
    launcher = fake(f"""
sweep, alive = os.getppid(), os.open("alive", os.O_WRONLY)
signal.signal(signal.SIGTERM, lambda *_: os.kill(sweep, signal.SIGINT))
if os.fork() == 0:
    {session}
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.kill(sweep, signal.SIGINT)
time.sleep(30)
""")
    os.mkfifo("alive")
    alive = os.open("alive", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_job(job, LOG, launcher)
        # Its end is seen where nobody is left who could write.
        assert select.select([alive], [], [], 10)[0]
    finally:
        os.close(alive)


def test_a_run_that_was_asked_to_stop_by_others_stops_what_waits_for_it(
    fake: Fake, job: Job
) -> None:
    with pytest.raises(StoppedError, match="stopped in job"):
        train_job(job, LOG, fake("sys.exit(75)"))


def test_a_launcher_makes_one_of_every_exit_code_so_the_runs_file_tells(
    fake: Fake, job: Job
) -> None:
    with pytest.raises(StoppedError):
        train_job(job, LOG, fake("(run / 'stopped.json').write_text('{}'); sys.exit(1)"))
    # That of an earlier stop does not: here the directory is some run's own.
    (job.directory / "recipe.yaml").write_text(load_recipe("quickstart", ["name=job"]).to_yaml())
    assert train_job(job, LOG, fake("sys.exit(1)")) == "ended with exit code 1"
    # Nor does its end: a run that goes on takes the file away.
    lines = "(run / 'stopped.json').unlink(); sys.exit(1)"
    assert train_job(job, LOG, fake(lines)) == "ended with exit code 1"
