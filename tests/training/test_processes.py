"""Losses and weights depend neither on the number of processes, nor on the engine or a stop."""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mallowspo_cli.training.checkpoint import checkpoint_weights, whole_checkpoints
from tests.training.launched import (
    STEPS,
    curve,
    launch,
    process_of,
    start,
    steps_of,
    wait,
    wait_for_step,
    words,
)

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
BCO = ("objective=bco", "objective.dispersion=true")
LORA = ("model.lora.rank=4", "model.lora.alpha=8", "train.learning_rate=1e-2")
RUNS = {
    "one process": ("one process", ()),
    "padded": ("one process", ("model.attention=sdpa",)),
    "ddp": ("ddp", ()),
    "zero2": ("zero2", ()),
    "zero3": ("zero3", ()),
    "one process, lora": ("one process", LORA),
    "zero3, lora": ("zero3", LORA),
    "one process, bco": ("one process", BCO),
    "zero3, bco": ("zero3", BCO),
    "zero2, bf16": ("zero2", ("objective=dpo", "train.precision=bf16", "model.dtype=float32")),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def runs(place: Path) -> dict[str, Path]:
    """A run in each way, by name."""
    places = {name: place / name.replace(", ", "_").replace(" ", "_") for name in RUNS}
    for name, (kind, more) in RUNS.items():
        # Another layout or precision has a reference store of its own.
        store = (
            (f"reference.store={place / 'other_store'}_{kind}",)
            if name in ("padded", "zero2, bf16")
            else ()
        )
        launch(kind, [*words(place, places[name]), *more, *store])
    return places


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        *(("padded", "one process"), ("ddp", "one process"), ("zero2", "one process")),
        *(("zero3", "one process"), ("zero3, lora", "one process, lora")),
        ("zero3, bco", "one process, bco"),
    ],
)
def test_losses_and_weights_are_those_of_one_process(
    runs: dict[str, Path], found: str, expected: str
) -> None:
    ours, theirs = curve(runs[found]), curve(runs[expected])
    assert len(theirs["loss"]) == STEPS
    assert len(theirs["eval/loss"]) == 2
    # The loss falls, or agreement would say little.
    assert theirs["loss"][-1] < 0.8 * theirs["loss"][0]
    for key, values in theirs.items():
        # Relative 1e-5, of what a margin or log-prob of some nats is.
        assert ours[key] == pytest.approx(values, rel=1e-5, abs=1e-5), key
    weights, other = (load_file(runs[n] / "model/model.safetensors") for n in (found, expected))
    assert weights.keys() == other.keys()
    for name, values in other.items():
        torch.testing.assert_close(weights[name], values, rtol=0, atol=2e-5, msg=name)


def test_zero3_leaves_no_process_whole_weights(runs: dict[str, Path]) -> None:
    engines = {
        name: json.loads((run / "environment.json").read_text())["engine"]
        for name, run in runs.items()
    }
    assert engines["zero3"]["kind"] == "ZeRO-3"
    assert engines["zero3"]["weights"] == engines["one process"]["weights"] > 10_000
    assert engines["zero3"]["weights_of_a_process"] == 0
    assert engines["ddp"]["kind"] == "DDP"
    assert engines["zero2"]["kind"] == "ZeRO-2"
    assert engines["ddp"]["weights_of_a_process"] == engines["ddp"]["weights"]


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_a_checkpoint_of_two_processes_holds_what_one_writes(
    runs: dict[str, Path], name: str
) -> None:
    ours, theirs = (whole_checkpoints(runs[n])[-1] for n in (name, "one process"))
    assert len(list(ours.glob("rank_*"))) == 2
    found, expected = checkpoint_weights(ours), checkpoint_weights(theirs)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=0, atol=2e-5, msg=key)


def test_in_bf16_the_float32_masters_are_what_is_saved(runs: dict[str, Path]) -> None:
    run = runs["zero2, bf16"]
    losses = curve(run)["loss"]
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(math.log(2), abs=0.02)
    assert losses[-1] < 0.8 * losses[0]
    saved = load_file(run / "model/model.safetensors")
    masters = checkpoint_weights(whole_checkpoints(run)[-1])
    assert all(torch.equal(masters[f"model.{name}"], saved[name]) for name in saved)
    rounded = sum(int((v == v.bfloat16().float()).sum()) for v in saved.values())
    assert rounded < 0.5 * sum(v.numel() for v in saved.values())


@pytest.fixture(scope="module")
def killed(place: Path, runs: dict[str, Path]) -> tuple[Path, str, float]:
    """A ZeRO-3 run of which process 1 was killed, what it said, and how long the end took."""
    run = place / "killed"
    process = start("zero3", words(place, run))
    wait_for_step(run, 5, process)
    began = time.monotonic()
    os.kill(process_of(process, 1), signal.SIGKILL)
    code, output = wait(process)
    assert code != 0
    assert 5 <= steps_of(run) < STEPS
    return run, output, time.monotonic() - began


def test_a_process_that_dies_ends_the_others_within_a_minute(
    killed: tuple[Path, str, float],
) -> None:
    _, output, seconds = killed
    assert seconds < 60
    # One line in the place of a second fault.
    if "another process of this launch ended" not in output:
        assert "Signal 9 (SIGKILL) received by PID" in output


def test_a_run_goes_on_after_a_kill_as_if_there_had_been_none(
    killed: tuple[Path, str, float], place: Path, runs: dict[str, Path]
) -> None:
    run = place / "resumed"
    shutil.copytree(killed[0], run)
    output = launch("zero3", [*words(place, run), "--resume"])
    assert "going on from" in output
    # Same machine, same number of processes: to the bit.
    assert curve(run) == curve(runs["zero3"])
    weights, other = (load_file(r / "model/model.safetensors") for r in (run, runs["zero3"]))
    assert all(torch.equal(weights[name], other[name]) for name in other)


def test_one_process_goes_on_where_two_were_stopped(
    killed: tuple[Path, str, float], place: Path, runs: dict[str, Path]
) -> None:
    run = place / "resumed_by_one"
    shutil.copytree(killed[0], run)
    launch("one process", [*words(place, run), "--resume"])
    found, expected = curve(run), curve(runs["one process"])
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-5, abs=1e-5), key


def test_two_processes_go_on_where_one_was_stopped(place: Path, runs: dict[str, Path]) -> None:
    run = place / "resumed_by_two"
    process = start("one process", words(place, run))
    wait_for_step(run, 2, process)
    process.send_signal(signal.SIGTERM)
    code, output = wait(process)
    assert code == 75, output
    assert "stopped after step" in output
    stopped = steps_of(run)
    assert whole_checkpoints(run)[-1].name == f"step_{stopped:06d}"
    told = json.loads((run / "stopped.json").read_text())
    assert told == {"step": stopped, "reason": "SIGTERM"}
    launch("zero3", [*words(place, run), "--resume"])
    assert not (run / "stopped.json").exists()
    found, expected = curve(run), curve(runs["one process"])
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-5, abs=1e-5), key


def test_fsdp2_goes_on_where_zero3_was_killed(
    killed: tuple[Path, str, float], place: Path, runs: dict[str, Path]
) -> None:
    run = place / "resumed_by_fsdp2"
    shutil.copytree(killed[0], run)
    arguments = [str(run), *words(place, run)[1:]]
    code, output = wait(start("ddp", arguments, ["tests.training.fsdp_rank"]))
    assert code == 0, output[-4000:]
    found, expected = curve(run), curve(runs["one process"])
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-5, abs=1e-5), key
    whole = load_file(run / "whole.safetensors")
    saved = checkpoint_weights(whole_checkpoints(run)[-1])
    other = checkpoint_weights(whole_checkpoints(runs["one process"])[-1])
    assert whole.keys() == saved.keys() == other.keys()
    for name, values in other.items():
        assert torch.equal(whole[name], saved[name]), name
        torch.testing.assert_close(whole[name], values, rtol=0, atol=2e-5, msg=name)
