"""`mallowspo eval preferences` on runs and on bare models."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.commands.conftest import Command
from tests.conftest import pair_rows


@pytest.fixture
def run(mallowspo: Command, tiny_words: list[str], tmp_path: Path) -> Path:
    """A finished Mallows-phi run."""
    assert mallowspo("train", *tiny_words).code == 0
    return tmp_path / "runs" / "tiny"


def last_evaluation(run: Path) -> dict:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/loss" in line][-1]


def found(run: Path) -> dict:
    (file,) = (run / "evaluations").glob("*.json")
    return json.loads(file.read_text())


def test_a_run_evaluates_to_what_its_training_logged(mallowspo: Command, run: Path) -> None:
    done = mallowspo("eval", "preferences", "model=runs/tiny")
    assert done.code == 0, done.err
    logged, again = last_evaluation(run), found(run)
    assert again["loss"] == pytest.approx(logged["eval/loss"], rel=1e-5)
    assert again["accuracy"] == logged["eval/rewards/accuracies"]
    assert again["margin"] == pytest.approx(logged["eval/rewards/margins"], rel=1e-5)
    assert again["displacement"] == logged["eval/displacement"]
    assert f"{again['accuracy']:.3f}" in done.out


def test_single_pairs_lie_beside_the_numbers(mallowspo: Command, run: Path) -> None:
    done = mallowspo("eval", "preferences", "model=runs/tiny", "eval.output=out/numbers.json")
    assert done.code == 0, done.err
    (numbers,) = (run / "evaluations").glob("*.json")
    for place in (numbers, run.parents[1] / "out" / "numbers.json"):
        table = pq.read_table(place.with_suffix(".parquet")).to_pydict()
        again = json.loads(place.read_text())
        assert len(table["pair_id"]) == again["pairs"]
        assert sum(table["win"]) / again["pairs"] == pytest.approx(again["accuracy"])
        assert sum(table["margin"]) / again["pairs"] == pytest.approx(again["margin"])
        assert min(table["weight"]) > 0
    refused = mallowspo("eval", "preferences", "model=runs/tiny", "eval.output=out/x.parquet")
    assert refused.code == 2
    assert "Name a .json" in refused.err


def test_a_run_keeps_its_dispersion_scale_on_other_data(
    mallowspo: Command, run: Path, write_rows: Callable[..., Path]
) -> None:
    other = write_rows(pair_rows(9), "other.jsonl")
    words = ["dataset=local", f"dataset.path={other}", "dataset.eval_size=5"]
    assert mallowspo("eval", "preferences", "model=runs/tiny", *words).code == 0
    again = found(run)
    assert again["pairs"] == 5
    scale = json.loads((run / "dispersion.json").read_text())["scale"]
    assert again["dispersion_scale"] == scale


def test_a_runs_recipe_can_be_overridden_but_not_its_scale(mallowspo: Command, run: Path) -> None:
    words = ["eval", "preferences", "model=runs/tiny"]
    data = ["dataset=local", "dataset.path=pairs.jsonl", "dataset.eval_size=4"]
    assert mallowspo(*words, *data, "objective.beta=0.6").code == 0
    doubled = last_evaluation(run)["eval/rewards/margins"] * 2
    again = json.loads((run / "evaluations" / "preferences_pairs.jsonl.json").read_text())
    assert again["margin"] == pytest.approx(doubled, rel=1e-5)
    assert again["overrides"] == [*data, "objective.beta=0.6"]
    refused = mallowspo(*words, "dispersion.scale=1")
    assert refused.code == 2
    assert "its own dispersion.scale" in refused.err


def test_a_bare_model_against_a_reference_agrees_with_the_run(
    mallowspo: Command, run: Path, tmp_path: Path
) -> None:
    words = ["dataset=local", f"dataset.path={tmp_path / 'pairs.jsonl'}", "dataset.eval_size=4"]
    done = mallowspo(
        *("eval", "preferences", "model=runs/tiny/model", "reference=tiny_random", *words),
        *("train.precision=fp32", "eval.output=out/numbers.json"),
    )
    assert done.code == 0, done.err
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    # DPO with beta 0.1 against the quickstart's 0.3: the same log-ratios on another scale.
    logged = last_evaluation(run)
    assert numbers["margin"] == pytest.approx(logged["eval/rewards/margins"] / 3, rel=1e-4)


def test_a_model_against_itself_has_no_margin(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    words = [word for word in tiny_words if word.startswith("dataset")]
    done = mallowspo(
        *("eval", "preferences", "model=tiny_random", "reference=tiny_random", *words),
        *("train.precision=fp32", "objective=mallows_theta", "eval.output=numbers.json"),
    )
    assert done.code == 0, done.err
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["margin"] == pytest.approx(0, abs=1e-5)
    assert numbers["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_limit_takes_the_first_pairs_and_no_reference_is_read_where_none_is_needed(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    words = [word for word in tiny_words if word.startswith("dataset")]
    done = mallowspo(
        *("eval", "preferences", "model=tiny_random", "objective=simpo", *words),
        *("eval.limit=3", "eval.output=numbers.json"),
    )
    assert done.code == 0, done.err
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["pairs"] == 3
    assert numbers["displacement"] is None
    assert numbers["reference"] is None
    assert pq.read_table(tmp_path / "numbers.parquet")["weight"].null_count == 3
