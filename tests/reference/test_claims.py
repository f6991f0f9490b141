"""One process at a time works on a thing; what a dead or silent one left is taken over."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mallowspo_cli.reference import claims
from mallowspo_cli.reference.claims import Claims


def foreign(directory: Path, host: str = "elsewhere", process: int = 1) -> Path:
    """A claim that another process holds."""
    file = directory / "block"
    file.write_text(json.dumps({"host": host, "process": process}))
    return file


def test_a_claim_is_held_by_one_and_free_afterwards(tmp_path: Path) -> None:
    first, second = Claims(tmp_path), Claims(tmp_path)
    with first.held("block") as ours:
        assert ours
        with second.held("block") as theirs:
            assert not theirs
        with second.held("other") as theirs:
            assert theirs
    with second.held("block") as theirs:
        assert theirs
    assert list(tmp_path.iterdir()) == []


def test_an_error_frees_the_claim(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Claims(tmp_path).held("block"):
        raise KeyboardInterrupt
    with Claims(tmp_path).held("block") as ours:
        assert ours


def test_the_claim_of_a_dead_process_here_is_taken_over_at_once(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    foreign(tmp_path, socket.gethostname(), dead.pid)
    with Claims(tmp_path).held("block") as ours:
        assert ours


def test_the_claim_of_a_living_process_here_is_respected(tmp_path: Path) -> None:
    foreign(tmp_path, socket.gethostname(), os.getppid())
    with Claims(tmp_path).held("block") as ours:
        assert not ours


@pytest.mark.parametrize("text", ['{"host": "elsewhere", "process": 1}', "", "{", "[]"])
def test_a_silent_claim_is_taken_over_only_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    now = [100.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    file, mine = foreign(tmp_path), Claims(tmp_path)
    file.write_text(text)
    for moment, expected in ((100.0, False), (100.0 + claims.STALE_SECONDS, False)):
        now[0] = moment
        with mine.held("block") as ours:
            assert ours is expected
    now[0] += 1
    with mine.held("block") as ours:
        assert ours


def test_a_claim_that_gives_signs_of_life_is_never_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: now[0])
    file, mine = foreign(tmp_path), Claims(tmp_path)
    for beat in range(5):
        os.utime(file, ns=(beat, beat))
        with mine.held("block") as ours:
            assert not ours
        now[0] += claims.STALE_SECONDS - 1
