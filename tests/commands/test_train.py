"""`mallowspo train`: what a run leaves behind, and what happens when it is stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mallowspo_cli.reference.store import write_shard
from mallowspo_cli.training import loop
from mallowspo_cli.training.checkpoint import checkpoint_weights
from mallowspo_cli.training.run import Run
from mallowspo_cli.training.telemetry import MEASURED
from tests.commands.conftest import Command
from tests.conftest import pair_rows

STEP_KEYS = {
    "step",
    "epoch",
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "dispersion/weight_mean",
    "grad_norm",
    "learning_rate",
    "pairs_per_second",
}


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in metrics(run)]


def test_a_run_directory_holds_what_other_tools_read(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    done = mallowspo("train", *tiny_words, "eval.kl_prompts=2", "eval.kl_tokens=4")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "tiny"

    assert yaml.safe_load((run / "overrides.yaml").read_text())[0] == "model=tiny_random"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["max_steps"] == 6
    assert json.loads((run / "environment.json").read_text())["versions"]["torch"]
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        "step_000002",
        "step_000004",
        "step_000006",
    ]

    lines = metrics(run)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line.keys() >= STEP_KEYS for line in steps)
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [0, 6]
    assert "eval/rewards/accuracies" in evaluations[0]
    # The policy starts as its reference.
    assert evaluations[0]["eval/rewards/margins"] == 0
    assert steps[0]["dispersion/weight_mean"] > 0

    report = (run / "report.html").read_text()
    assert "held-out accuracy" in report
    assert report.count("data:image/png;base64,") == len(list((run / "plots").glob("*.png"))) == 5
    results = json.loads((run / "results.json").read_text())
    assert results["kl"]["responses"] == 4
    assert "held-out accuracy" in done.out
    assert "report.html" in done.out

    card = (run / "model" / "README.md").read_text()
    dispersion = json.loads((run / "dispersion.json").read_text())
    assert str(dispersion["scale"]) in card
    assert dispersion["fingerprint"] in card
    assert "max_steps: 6" in card
    assert dispersion["weight_mean"] == pytest.approx(1, abs=1e-6)


def test_the_saved_model_is_what_transformers_loads_and_has_moved(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path, tiny_directory: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert mallowspo("train", *tiny_words).code == 0
    saved = tmp_path / "runs" / "tiny" / "model"
    model = AutoModelForCausalLM.from_pretrained(saved)
    before = AutoModelForCausalLM.from_pretrained(tiny_directory)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.chat_template
    assert model.generation_config.eos_token_id == before.generation_config.eos_token_id
    moved = [
        (p - q).abs().max() for p, q in zip(model.parameters(), before.parameters(), strict=True)
    ]
    assert min(moved) > 0


def test_a_killed_run_goes_on_bit_equal_to_one_without_a_stop(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    # 12 training pairs and 4 a step: three steps an epoch, so step 5 is in the middle of one.
    assert mallowspo("train", *tiny_words, "name=whole").code == 0
    assert mallowspo("train", *tiny_words, "name=stopped").code == 0
    stopped = tmp_path / "runs" / "stopped"
    # What a kill -9 within step 5 leaves: checkpoint 4, metrics beyond it, a torn line.
    for path in ("model", "plots", "checkpoints/step_000006"):
        shutil.rmtree(stopped / path)
    for path in ("results.json", "report.html"):
        (stopped / path).unlink()
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')

    done = mallowspo("train", *tiny_words, "name=stopped", "--resume")
    assert done.code == 0, done.err
    assert "going on from" in done.err.replace("\n", " ")
    whole = tmp_path / "runs" / "whole"
    assert timeless(stopped) == timeless(whole)
    ours = load_file(stopped / "model" / "model.safetensors")
    theirs = load_file(whole / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_kill_nine_in_mid_run_then_resume_equals_uninterrupted(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    words = [*tiny_words, "train.max_steps=150", "train.epochs=100", "checkpoint.every=20"]
    command = [sys.executable, "-m", "mallowspo_cli", "train", *words, "name=killed"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=one_thread, stderr=subprocess.DEVNULL)
    killed = tmp_path / "runs" / "killed"
    deadline = time.monotonic() + 120
    while not list((killed / "checkpoints").glob("step_*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list((killed / "checkpoints").glob("step_*")), "nothing to go on from"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "results.json").exists()

    resumed = mallowspo("train", *words, "name=killed", "--resume")
    assert resumed.code == 0, resumed.err
    assert "going on from" in " ".join(resumed.err.split())
    assert mallowspo("train", *words, "name=whole").code == 0
    whole = tmp_path / "runs" / "whole"
    assert timeless(killed) == timeless(whole)
    weights = [run / "model" / "model.safetensors" for run in (killed, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_resume_without_a_whole_checkpoint_starts_afresh_and_says_so(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    assert mallowspo("train", *tiny_words).code == 0
    run = tmp_path / "runs" / "tiny"
    before = timeless(run)
    shutil.rmtree(run / "checkpoints")
    (run / "results.json").unlink()
    done = mallowspo("train", *tiny_words, "--resume")
    assert done.code == 0
    assert "no whole checkpoint; starting afresh" in " ".join(done.err.split())
    assert timeless(run) == before


def test_a_finished_run_is_shown_and_not_trained_again(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    assert mallowspo("train", *tiny_words).code == 0
    weights = tmp_path / "runs" / "tiny" / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    done = mallowspo("train", *tiny_words, "--resume")
    assert done.code == 0
    assert "held-out accuracy" in done.out
    assert weights.stat().st_mtime_ns == written


def test_the_cache_is_built_once_and_serves_other_objectives(
    mallowspo: Command, tiny_words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOWSPO_CACHE", "own_cache")
    first = mallowspo("cache-ref", *tiny_words)
    assert first.code == 0
    for added in ("12 pairs added", "4 pairs added"):
        assert added in " ".join(first.err.split())
    for objective in ("dpo", "mallows_theta", "rainbowpo"):
        done = mallowspo("train", *tiny_words, f"objective={objective}", f"name={objective}")
        assert done.code == 0, done.err
        assert "every pair is there" in " ".join(done.err.split())


@pytest.mark.parametrize(
    "objective", ["dpo", "ipo", "mallows_ipo", "mallows_theta", "rainbowpo", "sft", "simpo"]
)
def test_every_objective_trains(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path, objective: str
) -> None:
    done = mallowspo("train", *tiny_words, f"objective={objective}", "train.max_steps=2")
    assert done.code == 0, done.err
    lines = metrics(tmp_path / "runs" / "tiny")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    reads_reference = objective not in ("sft", "simpo")
    assert (tmp_path / "runs" / "tiny" / "dispersion.json").exists() == reads_reference


def test_losses_do_not_depend_on_how_pairs_are_packed_or_recomputed(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    for name, words in {
        "large": ["train.pack_tokens=4096"],
        "small": ["train.pack_tokens=1"],
        "recomputed": ["train.activation_checkpointing=full"],
    }.items():
        assert mallowspo("train", *tiny_words, *words, f"name={name}").code == 0
    losses = {
        name: [line["loss"] for line in metrics(tmp_path / "runs" / name) if "loss" in line]
        for name in ("large", "small", "recomputed")
    }
    assert losses["small"] == pytest.approx(losses["large"], rel=1e-5)
    assert losses["recomputed"] == pytest.approx(losses["large"], rel=1e-5)


def test_lora_trains_adapters_alone_and_saves_a_merged_model(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    done = mallowspo("train", *tiny_words, "model.lora.rank=4", "train.learning_rate=1e-2")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "tiny"
    checkpoint = checkpoint_weights(run / "checkpoints" / "step_000004")
    assert all("lora_" in name for name in checkpoint)
    assert not any("lora_" in name for name in load_file(run / "model" / "model.safetensors"))
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    evaluated = mallowspo("eval", "preferences", "model=runs/tiny")
    assert evaluated.code == 0, evaluated.err
    after = [line for line in metrics(run) if "eval/loss" in line][-1]
    found = json.loads(next((run / "evaluations").glob("*.json")).read_text())
    assert found["margin"] == pytest.approx(after["eval/rewards/margins"], rel=1e-3, abs=1e-5)


def test_a_dry_run_shows_a_pair_and_writes_no_run(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    done = mallowspo("train", *tiny_words, "--dry-run")
    assert done.code == 0, done.err
    assert "chosen:" in done.out
    assert "would train 6 steps of 4 pairs" in " ".join(done.err.split())
    assert not (tmp_path / "runs").exists()


def test_trackers_are_fed_offline(
    mallowspo_process: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    done = mallowspo_process("train", *tiny_words, "log.wandb=true", "log.tensorboard=true")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "tiny"
    assert list(run.glob("**/events.out.tfevents*"))
    assert list(run.glob("wandb/offline-run-*"))


def test_a_sweep_of_objectives_betas_and_controls_makes_one_reference_pass(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    words = [*tiny_words, "train.max_steps=1", "checkpoint.every=0", "reference.store=store"]
    sweep = [
        [f"objective={objective}", f"objective.beta={beta}"]
        for objective in ("dpo", "mallows_theta", "mallows_phi")
        for beta in (0.05, 0.1, 0.5)
    ]
    controls = [["dispersion.mode=shuffled"], ["dispersion.mode=constant"]]
    passes = []
    for index, choice in enumerate([*sweep, *controls]):
        done = mallowspo("train", *words, *choice, f"name=run{index}")
        assert done.code == 0, done.err
        file = tmp_path / "runs" / f"run{index}" / "environment.json"
        passes.append(json.loads(file.read_text())["reference_pass"])
    assert passes[0] == {"scored": 16, "reused": 0}
    assert passes[1:] == [{"scored": 0, "reused": 16}] * 10


def test_a_policy_that_is_not_the_reference_stops_before_the_first_step(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    words = [*tiny_words, "reference.store=store", "train.max_steps=1"]
    assert mallowspo("cache-ref", *words).code == 0
    (shard, *_) = sorted((tmp_path / "store").glob("rows-*.parquet"))
    table = pq.read_table(shard)
    moved = pc.subtract(table["chosen_logp"], pa.scalar(3.0, pa.float32()))
    changed = table.set_column(table.schema.get_field_index("chosen_logp"), "chosen_logp", moved)
    shard.unlink()
    write_shard(tmp_path / "store", changed)
    done = mallowspo("train", *words)
    assert done.code == 2
    assert "the policy is not the reference" in done.err
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    assert not metrics.exists() or "learning_rate" not in metrics.read_text()
    assert mallowspo("train", *words, "reference.startup_check=0", "name=other").code == 0


@pytest.mark.parametrize("order", ["easy_first", "hard_first", "stratified"])
def test_the_orders_by_dispersion_train_and_need_no_objective_that_reads_it(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path, order: str
) -> None:
    words = [*tiny_words, "objective=simpo", f"train.order={order}", "train.max_steps=3"]
    done = mallowspo("train", *words)
    assert done.code == 0, done.err
    lines = [json.loads(x) for x in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    means = [line["dispersion/weight_mean"] for line in lines if "learning_rate" in line]
    assert len(means) == 3
    if order == "easy_first":
        assert means[0] > means[1] > means[2]
    elif order == "hard_first":
        assert means[0] < means[1] < means[2]
    else:
        assert max(means) - min(means) < 0.05


def test_keep_trains_on_the_pairs_between_two_quantiles_alone(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    done = mallowspo("train", *tiny_words, "dispersion.keep=[0.5,1]", "train.max_steps=1")
    assert done.code == 0, done.err
    assert "6 of 12 training pairs lie between the quantiles 0.5 and 1 of w" in done.err
    assert json.loads((tmp_path / "runs/tiny/data.json").read_text())["train_pairs"] == 6
    weight = json.loads((tmp_path / "runs/tiny/dispersion.json").read_text())["weight_mean"]
    assert weight == pytest.approx(1, abs=1e-6)


def test_a_column_of_the_data_can_be_the_weight(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    write_rows([{**row, "agreement": 1 + index % 3} for index, row in enumerate(pair_rows(16))])
    column = ["dispersion.source=column", "dispersion.column=agreement", "dispersion.scale=0.5"]
    done = mallowspo("train", *tiny_words, *column, "train.max_steps=1")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "runs/tiny/dispersion.json").read_text())
    assert (found["weight_min"], found["weight_max"]) == (0.5, 1.5)
    missing = mallowspo("train", *tiny_words, "dispersion.source=column", "name=x")
    assert missing.code == 2
    assert "dispersion.column=NAME" in missing.err


def test_resume_adds_to_the_pass_counter_and_refuses_other_numbers_of_the_data(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    def rows(first: int) -> list[dict]:
        return [{**row, "w": first + index} for index, row in enumerate(pair_rows(16))]

    write_rows(rows(1))
    words = [*tiny_words, "dispersion.source=column", "dispersion.column=w", "dispersion.scale=1"]
    assert mallowspo("train", *words).code == 0
    run = tmp_path / "runs" / "tiny"
    scored = json.loads((run / "environment.json").read_text())["reference_pass"]["scored"]
    (run / "results.json").unlink()
    assert mallowspo("train", *words, "--resume").code == 0
    again = json.loads((run / "environment.json").read_text())["reference_pass"]
    assert again == {"scored": scored, "reused": 16}
    (run / "results.json").unlink()
    write_rows(rows(2))
    changed = mallowspo("train", *words, "--resume")
    assert changed.code == 2
    assert "dispersion_numbers changed" in changed.err


def test_the_best_evaluations_checkpoint_is_kept_and_can_be_exported(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    # It falls as training goes on, so the best is not the last.
    metric = "eval/rewards/rejected"
    words = [*tiny_words, f"checkpoint.best_by={metric}", "checkpoint.keep=1", "eval.every=1"]
    done = mallowspo("train", *words, "checkpoint.every=6", "train.learning_rate=3e-3")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "tiny"
    values = {line["step"]: line[metric] for line in metrics(run) if metric in line}
    step = max((s for s in values if s), key=lambda s: values[s])
    assert step < 6
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert best == {"step": step, "metric": metric, "value": values[step]}
    kept = {path.name for path in (run / "checkpoints").glob("step_*")}
    assert kept == {f"step_{step:06d}", "step_000006"}
    exported = mallowspo("export", "run=runs/tiny", "checkpoint=best")
    assert exported.code == 0, exported.err
    found = load_file(run / "export" / "model.safetensors")
    expected = checkpoint_weights(run / "checkpoints" / f"step_{step:06d}")
    assert all(torch.equal(found[name.removeprefix("model.")], expected[name]) for name in expected)


def test_a_signal_saves_the_run_and_resume_equals_uninterrupted(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mallowspo("train", *tiny_words, "name=whole").code == 0
    honest = loop.optimizer_step

    def signalled(run: Run, *arguments: Any) -> Any:
        if arguments[-1] == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return honest(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", signalled)
        done = mallowspo("train", *tiny_words, "name=stopped", "checkpoint.every=0")
    assert done.code == 75
    assert "stopped after step 3 of 6 (SIGUSR1), and saved" in done.err.replace("\n", " ")
    run = tmp_path / "runs" / "stopped"
    assert json.loads((run / "stopped.json").read_text())["step"] == 3
    words = [*tiny_words, "name=stopped", "checkpoint.every=0"]
    assert mallowspo("train", *words, "--resume").code == 0
    assert timeless(run) == timeless(tmp_path / "runs" / "whole")


def test_a_slurm_job_saves_itself_before_its_time_ends(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 200))
    done = mallowspo("train", *tiny_words)
    assert done.code == 75
    assert "stopped after step 1 of 6 (the end of the job's time)" in done.err.replace("\n", " ")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    assert mallowspo("train", *tiny_words, "--resume").code == 0


def test_an_order_by_numbers_of_the_data_needs_no_reference_pass(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    write_rows([{**row, "w": index % 7} for index, row in enumerate(pair_rows(16))])
    words = [*tiny_words, "objective=simpo", "dispersion.source=column", "dispersion.column=w"]
    words += ["train.order=hard_first", "dispersion.keep=[0.3,1]", "train.max_steps=1"]
    done = mallowspo("train", *words)
    assert done.code == 0, done.err
    assert "training pairs lie between the quantiles 0.3 and 1 of w" in done.err
    counts = json.loads((tmp_path / "runs/tiny/environment.json").read_text())["reference_pass"]
    assert counts == {"scored": 0, "reused": 0}
    assert "reference" not in done.err.replace("reference_pass", "")


def test_raters_that_the_data_has_not_are_missed_before_any_pass(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    store = ["reference.store=store"]
    done = mallowspo("train", *tiny_words, "dispersion.source=raters", *store)
    assert done.code == 2
    assert "has none: expected the columns prompt, responses and rater_scores" in done.err
    assert not (tmp_path / "store").exists()
