"""The main process goes first and the others find what it left; progress says how fast it goes."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mallowspo_cli import distributed
from mallowspo_cli.distributed import main_first, progress
from mallowspo_cli.errors import MallowsPOError

SCRIPT = """
import sys, time
from pathlib import Path
from mallowspo_cli.distributed import main_first, rank
place = Path(sys.argv[1])

def work():
    if rank() == 0:
        time.sleep(0.5)
        if sys.argv[2] == "fail":
            raise SystemExit(3)
        (place / "made").touch()
    assert (place / "made").exists()
    return rank()

print(main_first(work, place / "launches"))
"""


def launch(place: Path, what: str, ranks: int = 3) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each rank; the main one is started last."""
    processes = []
    for rank in reversed(range(ranks)):
        marks = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        command = [sys.executable, "-c", SCRIPT, str(place), what]
        environment = {**os.environ, **marks, "MASTER_PORT": "1"}
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
        )
    done = [process.communicate(timeout=60) for process in processes]
    return [(p.returncode, *texts) for p, texts in zip(processes, done, strict=True)]


def test_the_others_wait_for_the_main_process(tmp_path: Path) -> None:
    outcomes = launch(tmp_path, "work")
    assert [code for code, _, _ in outcomes] == [0, 0, 0], outcomes
    assert [out.strip() for _, out, _ in outcomes] == ["2", "1", "0"]


def test_where_the_main_process_fails_the_others_stop_too(tmp_path: Path) -> None:
    *others, main = launch(tmp_path, "fail")
    assert main[0] == 3
    for code, _, err in others:
        assert code != 0
        assert "the main process failed" in err


def waiting(monkeypatch: pytest.MonkeyPatch, local_size: str) -> None:
    """This process is rank 1 of 2, on one machine or on two."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_size)
    monkeypatch.setattr(distributed, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(distributed, "SILENCE_SECONDS", 1.5)


def mark(place: Path, state: str) -> Path:
    name, _ = distributed._launch_name()
    (place / f"{name}.json").write_text(state)
    return place / f"{name}.json"


def test_what_an_earlier_launch_of_the_same_name_left_is_not_believed_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waiting(monkeypatch, "1")
    file = mark(tmp_path, "failed")
    timer = threading.Timer(0.5, lambda: file.write_text("done"))
    timer.start()
    assert main_first(lambda: 5, tmp_path) == 5
    timer.join()
    mark(tmp_path, "failed")
    with pytest.raises(MallowsPOError, match="no sign of the main process"):
        main_first(lambda: 5, tmp_path)


def test_a_mark_that_stays_is_believed_after_a_while_since_its_process_may_have_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waiting(monkeypatch, "1")
    mark(tmp_path, "done")
    start = time.monotonic()
    assert main_first(lambda: 5, tmp_path) == 5
    assert time.monotonic() - start > 0.5


def test_on_one_machine_a_mark_is_believed_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waiting(monkeypatch, "2")
    mark(tmp_path, "failed")
    with pytest.raises(MallowsPOError, match="the main process failed"):
        main_first(lambda: 5, tmp_path)


def test_alone_nothing_is_written(tmp_path: Path) -> None:
    assert main_first(lambda: 5, tmp_path / "launches") == 5
    assert not (tmp_path / "launches").exists()


def test_silence_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "SILENCE_SECONDS", 0.3)
    with pytest.raises(MallowsPOError, match=r"no sign of the main process.*MALLOWSPO_CACHE"):
        main_first(lambda: 5, tmp_path)


def test_the_launches_of_one_machine_have_names_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    first, alone = distributed._launch_name()
    assert alone
    assert distributed._launch_name() == (first, True)
    # The same ids of a launcher, another parent (which may be process 1 in a container).
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert distributed._launch_name()[0] != first
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    several, alone = distributed._launch_name()
    assert not alone
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert distributed._launch_name()[0] != several


def test_progress_without_a_terminal_says_rates_and_ends_with_the_total(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, lines = [0.0], []
    monkeypatch.setattr(distributed.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(distributed.log, "info", lambda text, *values: lines.append(text % values))
    with progress("t", 40, "pairs", "tokens") as step:
        for _ in range(4):
            now[0] += 10
            step(10, 500)
    assert lines == [
        "t: 20/40 pairs, 1.0 pairs/s, 50 tokens/s, 20 s left",
        "t: 40/40 pairs, 1.0 pairs/s, 50 tokens/s, 0 s left",
    ]
