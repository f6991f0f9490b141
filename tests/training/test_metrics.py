"""metrics.jsonl after kills and resumes."""

import math
from pathlib import Path

import pytest

from mallowspo_cli.training.metrics import MetricsFile, read_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with steps 1 to 5 and an evaluation at step 4."""
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    for step in range(1, 6):
        metrics.append({"step": step, "loss": step / 8})
        if step == 4:
            metrics.append({"step": 4, "eval/loss": 0.5, "eval/displacement": None})
    return path


def test_lines_come_back_in_order_as_they_were_written(path: Path) -> None:
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5]
    assert lines[4] == {"step": 4, "eval/loss": 0.5, "eval/displacement": None}
    assert path.read_text().count("\n") == 6


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_cut_back_drops_later_lines_and_keeps_the_step_itself(path: Path) -> None:
    before = path.read_text().splitlines()
    MetricsFile(path).cut_back(4)
    assert path.read_text().splitlines() == before[:5]


def test_cut_back_to_the_beginning_leaves_nothing(path: Path) -> None:
    MetricsFile(path).cut_back(0)
    assert path.read_text() == ""


def test_cut_back_of_a_new_run_leaves_an_empty_file(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").cut_back(0)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("torn", ['{"step": 6, "lo', "{", '{"step": 6, "loss": 0.5'])
def test_a_torn_last_line_is_not_read_and_cut_away(path: Path, torn: str) -> None:
    whole = path.read_text()
    path.write_text(whole + torn)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 4, 5]
    metrics = MetricsFile(path)
    metrics.cut_back(9)
    assert path.read_text() == whole
    metrics.append({"step": 6})
    assert read_metrics(path)[-1] == {"step": 6}


def test_values_survive_being_cut_back(path: Path) -> None:
    values = {"step": 5, "tiny": 1e-300, "third": 1 / 3, "bad": math.inf, "text": "ä\u2028"}
    metrics = MetricsFile(path)
    metrics.append(values)
    metrics.cut_back(5)
    assert read_metrics(path)[-1] == values
