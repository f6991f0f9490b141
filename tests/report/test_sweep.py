"""A sweep's table, means and pictures show what its runs measured."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mallowspo_cli.report.sweep import as_markdown, draw_metric, draw_sweep, number_key
from mallowspo_cli.report.sweep_table import SweepRow, groups, write_csv


def results(accuracy: float, kl: float | None = None) -> dict[str, Any]:
    after = {
        "eval/rewards/accuracies": accuracy,
        "eval/rewards/accuracies_low": accuracy - 0.1,
        "eval/rewards/accuracies_high": accuracy + 0.1,
        "eval/rewards/margins": 10 * accuracy,
        "eval/loss": 1 - accuracy,
        "eval/displacement": math.nan,
    }
    kl_entry = None if kl is None else {"mean": kl, "low": kl - 1, "high": kl + 1}
    return {"after": after, "kl": kl_entry, "training_seconds": 12.5, "pairs_per_second": 2.0}


def row(accuracy: float | None, **values: Any) -> SweepRow:
    name = "-".join(f"{key}{value}" for key, value in values.items())
    if accuracy is None:
        return SweepRow(name, values, "failed", "the loss of step 2 is not finite")
    return SweepRow(name, values, "finished", results=results(accuracy))


GRID = [
    row(0.5, objective="dpo", beta=0.1, seed=0),
    row(0.7, objective="dpo", beta=0.1, seed=1),
    row(0.8, objective="dpo", beta=10.0, seed=0),
    row(None, objective="dpo", beta=10.0, seed=1),
    row(0.9, objective="ipo", beta=10.0, seed=0),
    row(0.3, objective="ipo", beta=0.1, seed=0),
]


@pytest.fixture
def axes() -> Axes:
    return Figure().subplots()


def points(line: Line2D) -> list[list[float]]:
    """What is drawn: [x, y] each."""
    return np.asarray(line.get_xydata()).tolist()


def segments(axes: Axes) -> list[list[list[float]]]:
    """The intervals drawn: [[x, y], [x, y]] each."""
    return [
        np.asarray(path.vertices).tolist()
        for lines in axes.collections
        for path in lines.get_paths()
    ]


def test_the_csv_has_a_line_a_job_with_its_keys_numbers_and_reason(tmp_path: Path) -> None:
    last = SweepRow("x", {"objective": "a,b", "beta": None, "seed": 0}, "waiting")
    write_csv(tmp_path / "sweep.csv", [GRID[0], GRID[3], last])
    with (tmp_path / "sweep.csv").open(newline="") as file:
        first, failed, waiting = csv.DictReader(file)
    assert first["status"] == "finished"
    assert float(first["accuracy"]) == 0.5
    assert float(first["accuracy_low"]) == 0.4
    assert (first["seconds"], first["pairs_per_second"]) == ("12.5", "2")
    # Not measured, and no number.
    assert (first["kl"], first["displacement"], first["reason"]) == ("", "", "")
    assert failed["reason"] == "the loss of step 2 is not finite"
    assert failed["accuracy"] == ""
    assert (waiting["objective"], waiting["beta"], waiting["status"]) == ("a,b", "null", "waiting")


def test_seeds_are_averaged_with_a_t_interval_and_one_run_keeps_its_own() -> None:
    found = groups(GRID)
    assert [(g.values["objective"], g.values["beta"], len(g.rows)) for g in found] == [
        *(("dpo", 0.1, 2), ("dpo", 10.0, 1), ("ipo", 10.0, 1), ("ipo", 0.1, 1)),
    ]
    both, one, *_ = (group.estimate("accuracy") for group in found)
    assert both is not None
    assert one is not None
    assert both.value == pytest.approx(0.6)
    # t(0.975, 1 degree) = 12.706, standard error 0.1.
    assert both.high - both.value == pytest.approx(1.2706, abs=1e-4)
    assert (one.value, one.low, one.high) == (0.8, pytest.approx(0.7), pytest.approx(0.9))
    margin = found[1].estimate("margin")
    assert margin is not None
    assert math.isnan(margin.low)
    assert found[0].estimate("kl") is None


def test_a_metric_is_drawn_against_the_swept_number_a_line_for_each_other_key(axes: Axes) -> None:
    found = groups(GRID)
    assert number_key(found) == "beta"
    draw_metric(axes, found, "accuracy")
    assert {str(line.get_label()): points(line) for line in axes.lines} == {
        "dpo": [[0.1, pytest.approx(0.6)], [10.0, 0.8]],
        "ipo": [[0.1, 0.3], [10.0, 0.9]],
    }
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("beta", "held-out accuracy")
    assert [[10.0, pytest.approx(0.7)], [10.0, pytest.approx(0.9)]] in segments(axes)
    assert len(segments(axes)) == 4


def test_without_a_swept_number_each_choice_is_a_point_on_a_line_of_its_own(axes: Axes) -> None:
    found = groups([row(0.5, objective="dpo", seed=0), row(0.6, objective="ipo", seed=0)])
    assert number_key(found) is None
    draw_metric(axes, found, "accuracy")
    assert [points(line) for line in axes.lines] == [[[0.5, 0]], [[0.6, 1]]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dpo", "ipo"]
    assert segments(axes)[0] == [[pytest.approx(0.4), 0], [pytest.approx(0.6), 0]]


def test_of_several_numbers_the_one_with_the_most_values_is_the_axis(axes: Axes) -> None:
    rows = [
        row(0.1 * i + j, **{"objective.beta": i, "train.epochs": j})
        for i in (1, 2, 3)
        for j in (1, 2)
    ]
    found = groups(rows)
    assert number_key(found) == "objective.beta"
    draw_metric(axes, found, "margin")
    assert [str(line.get_label()) for line in axes.lines] == ["epochs 1", "epochs 2"]
    assert axes.get_xscale() == "linear"


def test_words_and_switches_are_no_numbers() -> None:
    assert number_key(groups([row(0.5, at_start=True), row(0.5, at_start=False)])) is None
    assert number_key(groups([row(0.5, clamp=None), row(0.5, clamp=1)])) is None
    assert number_key(groups([row(0.5, seed=1), row(0.5, seed=2)])) is None


def test_there_is_a_picture_for_each_metric_that_was_measured(tmp_path: Path) -> None:
    with_kl = [SweepRow("a", {"seed": 1}, "finished", results=results(0.5, kl=3.0))]
    names = {path.name for path in draw_sweep(tmp_path, with_kl)}
    assert names == {"accuracy.png", "margin.png", "loss.png", "kl.png"}
    assert draw_sweep(tmp_path, [row(None, seed=1)]) == []


def test_the_report_has_means_failures_and_what_is_missing() -> None:
    rows = [*GRID, SweepRow("late", {"objective": "sft", "beta": 1, "seed": 0}, "begun")]
    text = as_markdown("betas", ["recipe=quickstart"], rows, [Path("runs/betas/accuracy.png")])
    assert "5 of 7 jobs are finished" in text
    assert "- beta: 0.1, 10, 1" in text
    assert "| dpo | 0.1 | 2 | 0.600 [-0.671, 1.871] |" in text
    assert "| dpo | 10 | 1 | 0.800 [0.700, 0.900] |" in text
    assert "![held-out accuracy](accuracy.png)" in text
    assert "- objectivedpo-beta10.0-seed1: the loss of step 2 is not finite" in text
    assert "- late: begun" in text
    assert "Student's t over seeds" in text
    assert "what other held-out prompts would change is not in them" in text
    assert text.endswith("\n")


def test_a_report_of_nothing_finished_has_no_table() -> None:
    text = as_markdown("betas", ["recipe=quickstart"], [row(None, seed=1)], [])
    assert "0 of 1 jobs are finished" in text
    assert "| --- |" not in text
