"""Difficulties find their instructions by text, or say that they did not."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.win_rates import difficulty
from mallowspo_cli.evaluation.win_rates.difficulty import (
    OFFICIAL_ORDER,
    Difficulty,
    difficulty_of,
    digest,
)

SET = [f"Tell me fact {number}." for number in range(6)]
VALUES = [0.0, 0.5, -1.25, 2.0, 0.75, 1.5]


def table(
    path: Path, *, values: list[float] = VALUES, head: str = ",instruction_difficulty"
) -> Path:
    rows = [f"{number},{value}" for number, value in enumerate(values)]
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def gamed(path: Path, values: list[float] = VALUES) -> Path:
    rows = [
        f"{style},{number},0.25,{delta},{value},False"
        for style, delta in (("verbose", -1.0), ("concise", 1.0))
        for number, value in enumerate(values)
    ]
    head = "model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `SET` the official one."""
    order = tmp_path / "order.txt"
    order.write_text("\n".join(map(digest, SET)) + "\n")
    monkeypatch.setattr(difficulty, "OFFICIAL_ORDER", order)


def test_the_package_has_the_order_of_805_different_instructions() -> None:
    digests = OFFICIAL_ORDER.read_text().split()
    assert len(digests) == len(set(digests)) == 805
    assert {len(digest_) for digest_ in digests} == {12}


def test_a_digest_is_that_of_the_text_as_it_is() -> None:
    assert digest("a ") != digest("a")
    # python -c "import hashlib; print(hashlib.blake2b('é'.encode()).hexdigest()[:12])"
    assert digest("é") == "ac36d28fdffe"
    assert len(digest("\ud83d")) == 12


@pytest.mark.usefixtures("official")
def test_shuffled_and_partial_sets_of_the_official_one_are_joined_by_instruction(
    tmp_path: Path,
) -> None:
    rows = [4, 0, 3]
    for files in (
        (table(tmp_path / "d.csv"), gamed(tmp_path / "g.csv")),
        (table(tmp_path / "d.csv"), None),
        (None, gamed(tmp_path / "g.csv")),
    ):
        found = difficulty_of([SET[row] for row in rows], *files)
        assert found.values.tolist() == [VALUES[row] for row in rows]
        assert found.position.tolist() == rows
        assert not found.by_position
        assert "official" in found.joined_by


@pytest.mark.usefixtures("official")
def test_a_shuffled_instructions_file_does_not_change_the_official_numbers(tmp_path: Path) -> None:
    found = difficulty_of(SET, table(tmp_path / "d.csv"), None, order=SET[::-1])
    assert found.values.tolist() == VALUES


def test_an_instructions_file_gives_the_numbers(tmp_path: Path) -> None:
    found = difficulty_of([SET[5], SET[2]], table(tmp_path / "d.csv"), None, order=SET)
    assert found.values.tolist() == [VALUES[5], VALUES[2]]
    assert "instructions file" in found.joined_by


def test_a_column_of_instructions_comes_before_all_else(tmp_path: Path) -> None:
    path = tmp_path / "d.csv.gz"
    lines = ["instruction,instruction_difficulty", '"a, ""b""",1.5', "c,2.5"]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    found = difficulty_of(["c", 'a, "b"'], path, gamed(tmp_path / "g.csv"), order=['a, "b"', "c"])
    assert found.values.tolist() == [2.5, 1.5]
    with pytest.raises(EvalError, match=r"1 of 2 instructions are not in the column.*'x'"):
        difficulty_of(["c", "x"], path, None)


def test_of_unknown_instructions_as_many_as_rows_are_joined_by_position_loudly(
    tmp_path: Path,
) -> None:
    found = difficulty_of(SET, table(tmp_path / "d.csv"), None)
    assert found.values.tolist() == VALUES
    assert found.by_position
    assert "BY POSITION" in found.joined_by
    assert "instructions=FILE" in found.joined_by


def test_unknown_instructions_of_another_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"5 of 5 instructions .*'Tell me fact 1.'.*instructions="):
        difficulty_of(SET[1:], table(tmp_path / "d.csv"), None)


@pytest.mark.usefixtures("official")
def test_no_position_is_assumed_where_known_instructions_are_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"1 of 6 instructions .*'new'"):
        difficulty_of([*SET[1:], "new"], table(tmp_path / "d.csv"), None)


@pytest.mark.usefixtures("official")
def test_a_file_of_another_length_than_the_official_set_is_not_taken_for_it(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="has 4 difficulties; expected one for each"):
        difficulty_of(SET[:3], table(tmp_path / "d.csv", values=VALUES[:4]), None)


def test_an_instructions_file_of_another_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"has 5 instructions, and .* 6 difficulties"):
        difficulty_of(SET[:2], table(tmp_path / "d.csv"), None, order=SET[:5])
    with pytest.raises(EvalError, match="1 of 1 instructions are not in the instructions file"):
        difficulty_of(["new"], table(tmp_path / "d.csv"), None, order=SET)


def test_files_that_disagree_are_refused(tmp_path: Path) -> None:
    other = gamed(tmp_path / "g.csv", values=[*VALUES[:5], 1.51])
    with pytest.raises(EvalError, match=r"difficulty of instruction 5 is 1\.5 in .* and 1\.51"):
        difficulty_of(SET, table(tmp_path / "d.csv"), other, order=SET)
    close = gamed(tmp_path / "g.csv", values=[value + 1e-8 for value in VALUES])
    assert difficulty_of(SET, table(tmp_path / "d.csv"), close, order=SET).values.tolist() == VALUES


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is empty"),
        (",difficulty\n0,1\n", r"no column 'instruction_difficulty'\. It has: '', 'difficulty'"),
        (",instruction_difficulty\n", "no rows"),
        (",instruction_difficulty\n0,\n", "row 0: 'instruction_difficulty' is ''"),
        (",instruction_difficulty\n0,inf\n", "row 0: 'instruction_difficulty' is 'inf'"),
        (",instruction_difficulty\n0.5,1\n", "row 0: '' is '0.5'; expected 0, 1, 2"),
        (",instruction_difficulty\n0,1\n0,2\n", "row 1: the instruction is there twice"),
        (",instruction_difficulty\n0,1,2\n", "row 0: 3 fields; expected 2"),
        ("number,instruction_difficulty\n0,1\n", "no column 'index' or 'instruction'"),
    ],
)
def test_a_broken_file_is_named_with_its_row(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "d.csv"
    path.write_text(content)
    with pytest.raises(EvalError, match=told):
        difficulty_of(["a"], path, None)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"\x1f\x8bnothing",
        pytest.param(gzip.compress(b"x" * 99)[:20], id="gzip cut short"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(content)
    with pytest.raises(EvalError, match="cannot read"):
        difficulty_of(["a"], path, None)


def test_the_result_is_arrays_of_its_size(tmp_path: Path) -> None:
    found = difficulty_of(SET, table(tmp_path / "d.csv"), None, order=SET)
    assert isinstance(found, Difficulty)
    assert found.values.dtype == np.float64
    assert found.values.shape == found.position.shape == (6,)
