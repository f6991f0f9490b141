"""Runs of losses that need details of the scores, or a statistic of earlier steps."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mallowspo_cli.training.telemetry import MEASURED
from tests.commands.conftest import Command

FASTER = "train.learning_rate=1e-2"
"""So that rewards leave 0 within six steps."""


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in found]


def of_steps(run: Path, key: str) -> list[float]:
    return [line[key] for line in lines(run) if "loss" in line]


def last_loss(run: Path) -> float:
    """The held-out loss after the last step."""
    return [line["eval/loss"] for line in lines(run) if "eval/loss" in line][-1]


def evaluated(mallowspo: Command, *words: str) -> float:
    """The loss that `eval preferences` finds."""
    done = mallowspo("eval", "preferences", *words, "eval.output=numbers.json")
    assert done.code == 0, done.err
    return json.loads(Path("numbers.json").read_text())["loss"]


def copy_as_killed(whole: Path, killed: Path) -> None:
    """What a kill within step 5 leaves of a run."""
    shutil.copytree(whole, killed)
    for path in ("model", "plots", "checkpoints/step_000006"):
        shutil.rmtree(killed / path)
    for path in ("results.json", "report.html"):
        (killed / path).unlink()


@pytest.mark.parametrize("objective", ["wpo", "ld_dpo", "bco", "beta_dpo"])
def test_a_killed_run_goes_on_bit_equal_to_one_without_a_stop(
    objective: str, mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    words = [*tiny_words, FASTER, f"objective={objective}", "objective.dispersion=true"]
    assert mallowspo("train", *words).code == 0
    run, whole = tmp_path / "runs" / "tiny", tmp_path / "whole"
    run.rename(whole)
    copy_as_killed(whole, run)
    done = mallowspo("train", *words, "--resume")
    assert done.code == 0, done.err
    assert "going on from" in " ".join(done.err.split())
    assert lines(run) == lines(whole)
    ours, theirs = (load_file(r / "model" / "model.safetensors") for r in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    results = [json.loads((r / "results.json").read_text()) for r in (run, whole)]
    assert results[0]["running"] == results[1]["running"]
    assert bool(results[0]["running"]) == (objective in ("bco", "beta_dpo"))
    if objective == "beta_dpo":
        assert len(set(of_steps(run, "objective/beta"))) > 2
    if objective == "wpo":
        assert all(0 < weight <= 1 for weight in of_steps(run, "objective/pair_weight"))
        assert evaluated(mallowspo, "model=runs/tiny") == pytest.approx(last_loss(run), rel=1e-5)


def test_bcos_threshold_follows_the_steps_and_is_the_runs_last_at_evaluation(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    words = [*tiny_words, FASTER, "objective=bco"]
    for name, tokens in (("tiny", 4096), ("single", 1)):
        assert mallowspo("train", *words, f"train.pack_tokens={tokens}", f"name={name}").code == 0
    run, single = tmp_path / "runs" / "tiny", tmp_path / "runs" / "single"
    # Whatever the packs of a step.
    losses = of_steps(run, "loss")
    assert losses == pytest.approx(of_steps(single, "loss"), rel=1e-4)

    centres, shifts = (of_steps(run, f"objective/{key}") for key in ("centre", "shift"))
    means = [sum(centres[:step]) / max(step, 1) for step in range(7)]
    assert shifts == pytest.approx(means[:6], rel=1e-6, abs=1e-9)
    assert abs(means[-1]) > 1e-3
    results = json.loads((run / "results.json").read_text())
    assert results["running"] == {"shift": pytest.approx(means[-1]), "steps": 6}

    assert evaluated(mallowspo, "model=runs/tiny") == pytest.approx(last_loss(run), rel=1e-5)
    data = [word for word in tiny_words if word.startswith(("dataset", "train.precision"))]
    bare = ["model=runs/tiny/model", "reference=tiny_random", "objective=bco", *data]
    # A bare model knows of no steps: its threshold is 0.
    at_zero = evaluated(mallowspo, *bare, "objective.beta=0.1")
    assert at_zero != pytest.approx(last_loss(run), rel=1e-5)
