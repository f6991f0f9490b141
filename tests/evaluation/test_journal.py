"""Lines of a journal survive a kill, and lines made otherwise are never mixed."""

import json
from pathlib import Path

import pytest

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.journal import Journal

SETTINGS = {"model": "m", "temperature": 0.7, "seed": 0}


def test_lines_are_there_at_the_next_opening(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.jsonl"
    with Journal(file, SETTINGS) as journal:
        journal.append({"index": 0, "text": "zwei\u2028Zeilen\nund \ud800 halb"})
        journal.append({"index": 1})
    with Journal(file, SETTINGS) as again:
        assert again.lines == [
            {"index": 0, "text": "zwei\u2028Zeilen\nund \ud800 halb"},
            {"index": 1},
        ]
        again.append({"index": 2})
    assert len(file.read_bytes().splitlines()) == 4


@pytest.mark.parametrize("keep", range(1, 40))
def test_half_a_line_is_taken_away_wherever_it_was_cut(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "a.jsonl"
    with Journal(file, SETTINGS) as journal:
        journal.append({"index": 0})
        whole = file.stat().st_size
        journal.append({"index": 1, "text": "more than forty bytes of a line"})
    with file.open("r+b") as handle:
        handle.truncate(whole + keep)
    with Journal(file, SETTINGS) as again:
        assert again.lines == [{"index": 0}]
        again.append({"index": 1})
    with Journal(file, SETTINGS) as third:
        assert third.lines == [{"index": 0}, {"index": 1}]


def test_a_kill_inside_the_header_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"model": "m", "te')
    with Journal(file, SETTINGS) as journal:
        assert journal.lines == []
    assert json.loads(file.read_text()) == SETTINGS


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with Journal(file, SETTINGS) as journal:
        journal.append({"index": 0})
    before = file.read_bytes()
    with pytest.raises(EvalError, match=r"temperature was 0\.7, is 1\.0.*output_dir="):
        Journal(file, {**SETTINGS, "temperature": 1.0})
    with pytest.raises(EvalError, match="top_p was None, is 1"):
        Journal(file, {**SETTINGS, "top_p": 1})
    assert file.read_bytes() == before


def test_tuples_in_settings_equal_the_lists_that_json_makes_of_them(tmp_path: Path) -> None:
    Journal(tmp_path / "a.jsonl", {"sizes": (1, 2)}).__exit__(None, None, None)
    with Journal(tmp_path / "a.jsonl", {"sizes": (1, 2)}) as again:
        assert again.lines == []


def test_a_second_process_is_refused_while_one_writes(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "a.jsonl", SETTINGS),
        pytest.raises(EvalError, match="another process is writing"),
    ):
        Journal(tmp_path / "a.jsonl", SETTINGS)


@pytest.mark.parametrize("line", ["{broken}", "[1]", '"text"'])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(SETTINGS) + f"\n{line}\n" + '{"index": 1}\n')
    with pytest.raises(EvalError, match="is damaged"):
        Journal(file, SETTINGS)
