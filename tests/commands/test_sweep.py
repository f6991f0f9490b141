"""`mallowspo sweep`: a row for every choice, also of what fails, stops or runs elsewhere."""

import contextlib
import csv
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from mallowspo_cli.__main__ import main
from mallowspo_cli.commands import jobs, sweep_launch
from mallowspo_cli.training import loop
from mallowspo_cli.training.run import Run
from mallowspo_cli.training.telemetry import MEASURED
from tests.commands.conftest import Command
from tests.test_slurm import Job as SlurmJob


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs jobs in this process, which saves each the seconds of a start; their words, in order."""
    started: list[list[str]] = []

    def run(command: Sequence[str], output: int) -> tuple[int, str | None]:
        words = list(command[command.index("mallowspo_cli") + 1 :])
        started.append(words)
        AcceleratorState._reset_state(reset_partial_state=True)
        log = logging.getLogger("mallowspo")
        handlers = log.handlers[:]
        with (
            os.fdopen(os.dup(output), "a") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
            monkeypatch.context() as patch,
        ):
            patch.setattr(sys, "argv", ["mallowspo", *words])
            with pytest.raises(SystemExit) as stop:
                main()
        log.handlers[:] = handlers
        return int(stop.value.code or 0), None

    monkeypatch.setattr(jobs, "_run", run)
    return started


@pytest.fixture
def words(tiny_words: list[str]) -> list[str]:
    """A sweep's words of two steps a job."""
    left_out = ("name=", "train.max_steps=", "train.learning_rate=")
    kept = [word for word in tiny_words if not word.startswith(left_out)]
    return [*kept, "train.max_steps=2", "reference.store=store"]


def table(directory: Path) -> dict[str, dict[str, str]]:
    with (directory / "sweep.csv").open(newline="") as file:
        return {row["job"]: row for row in csv.DictReader(file)}


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


GRID = ["objective=dpo,mallows_theta", "train.learning_rate=1e-3,1e30"]
"""A step of the second rate leaves weights of which the next step's loss is not finite."""
NAMES = [
    *("dpo-learning_rate0.001", "dpo-learning_rate1e30"),
    *("mallows_theta-learning_rate0.001", "mallows_theta-learning_rate1e30"),
]


def test_what_fails_is_noted_the_rest_goes_on_and_is_not_run_again(
    mallowspo: Command, words: list[str], quick: list[list[str]], tmp_path: Path
) -> None:
    done = mallowspo("sweep", *words, *GRID, "name=grid")
    assert done.code == 2
    last = done.err.strip().splitlines()[-1]
    assert last.startswith(f"mallowspo: 2 of 4 jobs failed: {NAMES[1]}, {NAMES[3]}.")
    place = tmp_path / "runs" / "grid"
    rows = table(place)
    assert list(rows) == NAMES
    assert [row["status"] for row in rows.values()] == ["finished", "failed"] * 2
    for name in (NAMES[0], NAMES[2]):
        results = json.loads((place / name / "results.json").read_text())
        row = rows[name]
        assert float(row["accuracy"]) == results["after"]["eval/rewards/accuracies"]
        assert float(row["margin"]) == pytest.approx(results["after"]["eval/rewards/margins"], 1e-4)
        assert float(row["seconds"]) == pytest.approx(results["training_seconds"], 1e-4)
        assert results["name"] == f"grid/{name}"
    assert (rows[NAMES[2]]["objective"], rows[NAMES[2]]["train.learning_rate"]) == (
        *("mallows_theta", "0.001"),
    )
    for name in (NAMES[1], NAMES[3]):
        assert "not finite" in rows[name]["reason"]
        assert f"failed: {rows[name]['reason']}" in (place / f"{name}.log").read_text()
    report = (place / "report.md").read_text()
    assert "2 of 4 jobs are finished" in report
    assert f"- {NAMES[1]}: " in report
    assert (place / "accuracy.png").is_file()

    # One pass of the reference serves all.
    counts = [
        json.loads((place / name / "environment.json").read_text())["reference_pass"]
        for name in NAMES
    ]
    assert counts == [{"scored": 16, "reused": 0}, *[{"scored": 0, "reused": 16}] * 3]

    assert len(quick) == 4
    again = mallowspo("sweep", *words, *GRID, "name=grid")
    assert again.code == 2
    assert again.err.count("finished before") == 2
    assert [f"name=grid/{name}" in run for run, name in zip(quick[4:], NAMES[1::2], strict=True)]
    assert table(place) == rows


def test_a_sweep_that_was_stopped_goes_on_as_if_it_had_not_been(
    mallowspo: Command,
    words: list[str],
    quick: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = [*words, "train.learning_rate=1e-3"]
    assert mallowspo("train", *grid, "seed=1", "name=whole").code == 0
    honest, steps = loop.optimizer_step, []

    def signalled(run: Run, *arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return honest(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", signalled)
        stopped = mallowspo("sweep", *grid, "seed=1,2", "name=cut")
    assert stopped.code == 75
    assert "stopped in seed1. The same command goes on from there." in stopped.err
    assert len(quick) == 1
    place = tmp_path / "runs" / "cut"
    assert [row["status"] for row in table(place).values()] == ["stopped", "waiting"]

    assert mallowspo("sweep", *grid, "seed=1,2", "name=cut").code == 0
    assert len(quick) == 3
    assert "going on from" in (place / "seed1.log").read_text()
    assert metrics(place / "seed1") == metrics(tmp_path / "runs" / "whole")
    assert [row["status"] for row in table(place).values()] == ["finished", "finished"]
    assert "Student's t over seeds" in (place / "report.md").read_text()


def test_printed_lines_run_as_they_stand_and_the_same_words_collect_them(
    mallowspo: Command, words: list[str], quick: list[list[str]], tmp_path: Path
) -> None:
    grid = [*words, "train.learning_rate=1e-3", "dispersion.clamp=[0.5,2],null", "name=elsewhere"]
    printed = mallowspo("sweep", *grid, "--launch", "print")
    assert printed.code == 0, printed.err
    lines = printed.out.splitlines()
    assert len(lines) == 2
    assert quick == []
    for line in lines[:1]:
        program, *line_words = shlex.split(line)
        assert program == "mallowspo"
        assert mallowspo(*line_words).code == 0
    left = mallowspo("sweep", *grid, "--launch", "print")
    assert left.out.splitlines() == lines[1:]
    rows = table(tmp_path / "runs" / "elsewhere")
    assert [row["status"] for row in rows.values()] == ["finished", "waiting"]
    assert "1 of 2 jobs are finished" in " ".join(left.err.split())


def test_a_launchers_file_is_put_before_every_job(
    mallowspo: Command, words: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "two words.yaml"
    file.write_text("num_processes: 2\n")
    done = mallowspo("sweep", *words, "seed=1,2", f"accelerate={file}", "--launch", "print")
    head = ["accelerate", "launch", "--config_file", str(file), "-m", "mallowspo_cli", "train"]
    assert [shlex.split(line)[:7] for line in done.out.splitlines()] == [head] * 2
    missing = mallowspo("sweep", *words, "seed=1,2", "accelerate=no.yaml", "--launch", "print")
    assert missing.code == 2
    assert "no launcher's file at accelerate=no.yaml" in missing.err


def test_the_array_of_slurm_runs_each_job_as_one_node_does(
    mallowspo: Command, words: list[str], tmp_path: Path
) -> None:
    quoted = ["dataset.path='a b.jsonl'" if w.startswith("dataset.path") else w for w in words]
    done = mallowspo("sweep", *quoted, "seed=1,2", "name=a/b", "--launch", "slurm")
    assert done.code == 0, done.err
    submit = "sbatch --partition=PARTITION --account=ACCOUNT runs/a/b/sweep.sbatch"
    assert done.out.strip() == submit
    script = tmp_path / "runs" / "a" / "b" / "sweep.sbatch"
    text = script.read_text()
    subprocess.run(["bash", "-n", script], check=True)
    assert submit in text
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --array=0-1", "#SBATCH --job-name=a-b", "#SBATCH --requeue"} <= set(options)
    assert "#SBATCH --signal=TERM@300" in options
    assert len([line for line in options if "--output" in line]) == 1
    # What a site calls its queues is given to sbatch.
    assert not any("partition" in line or "account" in line for line in options)

    task = SlurmJob(tmp_path, str(script), SLURM_ARRAY_TASK_ID="1")
    assert task.run() == 0
    (call,) = task.of("accelerate")
    trained = call["words"][call["words"].index("train") + 1 :]
    assert "dataset.path='a b.jsonl'" in trained
    assert trained[-3:] == ["seed=2", "name=a/b/seed2", "--resume"]
    assert "recipes/accelerate/zero3.yaml" in call["words"]

    task.environment |= {"TRAINER_CODE": "2"}
    assert task.run() == 1
    log = tmp_path / "runs/a/b/seed2.log"
    assert log.read_text().endswith("failed: ended with exit code 1\n")
    task.environment |= {"TRAINER_CODE": "75", "SLURM_RESTART_COUNT": "0"}
    assert task.run() == 75
    assert task.of("scontrol")[-1]["words"] == ["requeue", "4321"]
    assert "failed" not in log.read_text().splitlines()[-1]


def test_an_array_is_of_the_words_given_whatever_the_place_or_the_shell_has(
    mallowspo: Command, words: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "my own.yaml"
    file.write_text("num_processes: 2\n")
    given = ["seed=1,2", "output_dir='two words/x'", f"accelerate={file}"]
    done = mallowspo("sweep", *words, *given, "--launch", "slurm")
    assert done.code == 0, done.err
    script = tmp_path / "two words" / "x" / "sweep.sbatch"
    assert shlex.split(done.out)[-1] == "two words/x/sweep.sbatch"
    options = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    (output,) = [words for words in map(shlex.split, options) if "--output" in words[1]]
    assert output[1:] == ["--output=two words/x/slurm-%A_%a.log"]

    said = [
        "mallowspo (process 1): the loss is not finite.",
        "mallowspo: another process of this launch ended, and its own message says why (closed).",
    ]
    trainer = f"import sys; print({said[0]!r}); print({said[1]!r}); sys.exit(2)"
    task = SlurmJob(
        *(tmp_path, str(script)),
        trainer=trainer,
        SLURM_ARRAY_TASK_ID="0",
        ACCELERATE_FILE="other.yaml",
    )
    assert task.run() == 1
    (call,) = task.of("accelerate")
    assert call["words"][call["words"].index("--config_file") + 1] == str(file)
    log = tmp_path / "two words" / "x" / "seed1.log"
    assert log.read_text().endswith("failed: the loss is not finite.\n")


def test_a_package_without_the_scripts_says_what_works_there(
    mallowspo: Command, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_launch, "ONE_NODE", Path("no/such.sbatch"))
    done = mallowspo("sweep", *words, "seed=1,2", "--launch", "slurm")
    assert done.code == 2
    assert "--launch print gives the commands." in done.err


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ([], "no key has several values"),
        (["objective=dpo,dpoo"], "Did you mean 'dpo'?"),
        (["seed=1,2", "acelerate=x.yaml"], "Did you mean 'accelerate'?"),
        (["seed=1,2", "recipe=other"], "expected one"),
        (["seed=1,2", "--launch", "cloud"], "'cloud' is not one of 'local', 'slurm', 'print'"),
    ],
)
def test_bad_words_cost_nothing(
    mallowspo: Command,
    words: list[str],
    quick: list[list[str]],
    tmp_path: Path,
    added: list[str],
    said: str,
) -> None:
    done = mallowspo("sweep", *words, *added)
    assert done.code == 2
    assert said in done.err
    assert quick == []
    assert not (tmp_path / "runs").exists()


def test_other_words_under_the_same_name_are_refused_before_the_first_job(
    mallowspo: Command, words: list[str], quick: list[list[str]], tmp_path: Path
) -> None:
    place = tmp_path / "runs" / "mine" / "seed2"
    place.mkdir(parents=True)
    shown = mallowspo("recipes", "show", "quickstart", *words[1:], "seed=2", "name=mine/seed2")
    (place / "recipe.yaml").write_text(shown.out)
    done = mallowspo("sweep", *words, "seed=1,2", "name=mine", "train.weight_decay=0.5")
    assert done.code == 2
    assert "train.weight_decay was 0.0, is 0.5" in done.err
    assert quick == []


def test_a_sweep_is_not_launched_itself(
    mallowspo: Command, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = mallowspo("sweep", *words, "seed=1,2")
    assert done.code == 2
    assert "accelerate=FILE launches each job" in done.err
