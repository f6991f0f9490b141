"""The main process goes first and the others find what it left; progress says how fast it goes."""

import logging
import os
import subprocess
import sys
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
    first = distributed._launch_name()
    assert distributed._launch_name() == first
    # The same ids of a launcher, another parent.
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert distributed._launch_name() != first
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    several = distributed._launch_name()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert distributed._launch_name() != several


def test_progress_without_a_terminal_says_rates_and_ends_with_the_total(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(distributed.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(logging.getLogger("mallowspo"), "propagate", True)
    with caplog.at_level(logging.INFO, "mallowspo"), progress("t", 40, "pairs", "tokens") as step:
        for _ in range(4):
            now[0] += 10
            step(10, 500)
    assert [record.getMessage() for record in caplog.records] == [
        "t: 20/40 pairs, 1.0 pairs/s, 50 tokens/s, 20 s left",
        "t: 40/40 pairs, 1.0 pairs/s, 50 tokens/s, 0 s left",
    ]
