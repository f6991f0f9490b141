"""AlpacaEval's files are read whole, plain or gzipped, or refused by row and field."""

import gzip
import json
import math
from pathlib import Path

import pytest

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.outputs import Annotation, read_annotations, read_outputs, read_rows

ROW = {
    "instruction": "Say hello.",
    "output_1": "Hello.",
    "generator_1": "base",
    "output_2": "Hi!",
    "generator_2": "model",
    "annotator": "judge",
    "preference": 1.25,
}


def written(path: Path, rows: object) -> Path:
    path.write_text(json.dumps(rows))
    return path


def test_a_list_lines_and_gzip_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "instruction": "Another\u2028line."}]
    plain = written(tmp_path / "a.json", rows)
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    packed = tmp_path / "a.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_rows(plain) == read_rows(lines) == read_rows(packed) == rows


def test_annotations_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        Annotation("a", "x", "base", "y", "model", "judge", 1.5, "koala", {"text": "m"}, 0.01, 2.0),
        Annotation("b", "x", "base", "y", "model", "judge", math.nan),
    ]
    file = written(tmp_path / "a.json", [row.as_dict() for row in rows])
    first, second = read_annotations(file)
    assert first == rows[0]
    assert math.isnan(second.preference)
    assert json.loads(file.read_text())[1]["preference"] is None


def test_a_preference_of_0_is_an_old_draw(tmp_path: Path) -> None:
    (row,) = read_annotations(written(tmp_path / "a.json", [{**ROW, "preference": 0}]))
    assert row.preference == 1.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"preference": 2.5}, r"row 0: preference is 2\.5; expected 1 to 2"),
        ({"preference": "m"}, "preference is a str; expected a number"),
        ({"preference": True}, "preference is a bool"),
        ({"output_2": None}, "'output_2' is missing; expected a text"),
        ({"instruction": 7}, "'instruction' is a int"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, change: dict, said: str) -> None:
    with pytest.raises(EvalError, match=said):
        read_annotations(written(tmp_path / "a.json", [{**ROW, **change}]))


def test_an_instruction_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="is there 2 times"):
        read_annotations(written(tmp_path / "a.json", [ROW, ROW]))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b"[1]",
        b"\xff\xfe",
        pytest.param(gzip.compress(b"[{}]")[:-4], id="gzip cut short"),
        pytest.param(b"[" * 100_000, id="deep"),
    ],
)
def test_what_is_no_list_of_objects_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(EvalError, match=r"a\.json"):
        read_rows(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"cannot read .*none\.json"):
        read_rows(tmp_path / "none.json")


def test_outputs_without_a_generator_are_named_by_their_directory(tmp_path: Path) -> None:
    (tmp_path / "gpt").mkdir()
    file = written(tmp_path / "gpt" / "o.json", [{"instruction": "a", "output": ""}])
    (row,) = read_outputs(file)
    assert (row.generator, row.output, row.dataset) == ("gpt", "", "")
