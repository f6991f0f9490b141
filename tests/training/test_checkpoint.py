"""Checkpoints are whole or absent, come back bit for bit, and run no code.

What several processes write and read is in test_sharded.py and test_processes.py.
"""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from mallowspo_cli.errors import CheckpointError
from mallowspo_cli.files import sha256, write_json
from mallowspo_cli.recipe.schema import TrainConfig
from mallowspo_cli.training import checkpoint
from mallowspo_cli.training.checkpoint import (
    MANIFEST,
    STATE,
    TrainState,
    best_checkpoint,
    checkpoint_path,
    checkpoint_weights,
    load_checkpoint,
    save_checkpoint,
    shard_name,
    whole_checkpoints,
)
from mallowspo_cli.training.engine import Engine
from mallowspo_cli.training.optim import build_optimizer

SHARD = shard_name(0, 1)


def small_model(seed: int = 0, width: int = 3) -> nn.Module:
    """Two layers, of which the first is frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))
    model[0].requires_grad_(False)
    return model


def trained(seed: int = 0, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = small_model(seed)
    optimizer = build_optimizer(model, TrainConfig(learning_rate=0.1, weight_decay=0.01))
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 4), step + 1.0)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Another initial model of the same shape, with an optimizer that has done nothing."""
    model = small_model(seed=7)
    model[0].load_state_dict(small_model()[0].state_dict())
    return model, build_optimizer(model, TrainConfig(learning_rate=0.1, weight_decay=0.01))


def engine(model: nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
    return Engine(Accelerator(cpu=True), model, optimizer)


def save(directory: Path, step: int = 3, keep: int = 5, best: dict[str, Any] | None = None) -> Path:
    return save_checkpoint(directory, engine(*trained()), TrainState(step), keep, best)


def bits(value: Any) -> Any:
    """Tensors as dtype and bytes, so that equality is to the bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [bits(inner) for inner in value]
    return value


def refusal(path: Path) -> str:
    """The message with which a checkpoint is refused; model and optimizer stay as they were."""
    model, optimizer = fresh()
    before = bits([model.state_dict(), optimizer.state_dict()])
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, engine(model, optimizer))
    assert bits([model.state_dict(), optimizer.state_dict()]) == before
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def with_digests(path: Path) -> None:
    """Give a changed checkpoint a manifest that fits it."""
    write_json(path / MANIFEST, {n: sha256(path / n) for n in (SHARD, STATE)})


def test_weights_optimizer_random_state_and_step_come_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    torch.manual_seed(5)
    path = save_checkpoint(tmp_path, engine(model, optimizer), TrainState(3), 1, None)
    drawn = torch.rand(4)
    again, again_optimizer = fresh()
    assert load_checkpoint(path, engine(again, again_optimizer)) == TrainState(3)
    assert bits(again.state_dict()) == bits(model.state_dict())
    assert bits(again_optimizer.state_dict()) == bits(optimizer.state_dict())
    assert torch.equal(torch.rand(4), drawn)


def test_running_statistics_come_back_to_the_last_bit(tmp_path: Path) -> None:
    state = TrainState(3, {"shift": 0.1 + 0.2, "steps": 3.0, "tiny": -5e-324})
    path = save_checkpoint(tmp_path, engine(*trained()), state, 1, None)
    assert load_checkpoint(path, engine(*fresh())) == state


def test_a_checkpoint_of_before_there_were_running_statistics_has_none(tmp_path: Path) -> None:
    path = save(tmp_path)
    content = json.loads((path / STATE).read_text())
    del content["running"]
    write_json(path / STATE, content)
    with_digests(path)
    assert load_checkpoint(path, engine(*fresh())) == TrainState(3, {})


def test_the_step_after_a_load_is_the_one_without_it(tmp_path: Path) -> None:
    path = save(tmp_path)
    again, again_optimizer = fresh()
    load_checkpoint(path, engine(again, again_optimizer))
    again_optimizer.zero_grad()
    again(torch.full((2, 4), 4.0)).square().sum().backward()
    again_optimizer.step()
    expected, _ = trained(steps=4)
    assert bits(again.state_dict()) == bits(expected.state_dict())


def test_only_what_is_trained_is_written(tmp_path: Path) -> None:
    model, _ = trained()
    found = checkpoint_weights(save(tmp_path))
    assert set(found) == {"1.weight", "1.bias"}
    assert all(torch.equal(found[name], dict(model.named_parameters())[name]) for name in found)


def test_the_best_stays_beside_the_newest(tmp_path: Path) -> None:
    best = {"step": 2, "metric": "eval/loss", "value": 0.5}
    save(tmp_path, 1, keep=1)
    save(tmp_path, 2, keep=1, best=best)
    for step in (3, 4):
        save(tmp_path, step, keep=1)
    assert whole_checkpoints(tmp_path) == [checkpoint_path(tmp_path, step) for step in (2, 4)]
    assert best_checkpoint(tmp_path) == best
    save(tmp_path, 5, keep=1, best={**best, "step": 5})
    assert whole_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 5)]


def test_a_checkpoint_of_an_earlier_version_is_named(tmp_path: Path) -> None:
    path = save(tmp_path)
    (path / "trainable.safetensors").touch()
    assert "earlier version" in refusal(path)


def test_the_newest_are_kept_by_number(tmp_path: Path) -> None:
    for step in (1, 2, 999_999, 1_000_000):
        save(tmp_path, step, keep=2)
    found = whole_checkpoints(tmp_path)
    assert found == [checkpoint_path(tmp_path, step) for step in (999_999, 1_000_000)]
    assert sorted(found) == sorted((tmp_path / "checkpoints").iterdir())


def test_half_written_checkpoints_are_not_seen(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (tmp_path / "checkpoints/.step_000002.abc.tmp").mkdir()
    (tmp_path / "checkpoints/step_000003").mkdir()
    (tmp_path / "checkpoints/step_x").mkdir()
    assert whole_checkpoints(tmp_path) == [path]
    assert whole_checkpoints(tmp_path / "elsewhere") == []


def test_a_save_that_fails_leaves_nothing_and_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1, keep=1)

    def full_disk(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_pieces", full_disk)
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, 2, keep=1)
    assert whole_checkpoints(tmp_path) == [path]
    # What it left goes with the next.
    save(tmp_path, 3, keep=2)
    assert sorted((tmp_path / "checkpoints").iterdir()) == whole_checkpoints(tmp_path)


@pytest.mark.parametrize("name", [SHARD, STATE])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path)
    content = (path / name).read_bytes()
    if damage == "gone":
        (path / name).unlink()
    elif damage == "cut":
        (path / name).write_bytes(content[: len(content) // 2])
    else:
        (path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    message = refusal(path)
    assert "is damaged" in message
    assert name in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '"x"', "\x00"])
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    path = save(tmp_path)
    (path / MANIFEST).write_text(text)
    assert "is damaged" in refusal(path)


@pytest.mark.parametrize("name", [SHARD, STATE])
@pytest.mark.parametrize("content", [b"", b"[]", b"[1]", b"\x80\x02", b"PK\x03\x04"])
def test_broken_content_under_a_fitting_manifest_is_refused(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = save(tmp_path)
    (path / name).write_bytes(content)
    with_digests(path)
    assert "is damaged" in refusal(path)


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("bare", [False, True])
def test_no_code_of_a_pickle_runs(tmp_path: Path, bare: bool) -> None:
    path, place = save(tmp_path), tmp_path / "trapped"
    if bare:
        (path / SHARD).write_bytes(pickle.dumps(Trap(place), protocol=2))
    else:
        torch.save({"1.weight": Trap(place)}, path / SHARD)
    with_digests(path)
    assert "is damaged" in refusal(path)
    assert not place.exists()
    # The trap is a real one.
    pickle.loads(pickle.dumps(Trap(place)))
    assert place.exists()


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    other = small_model(width=5)
    with pytest.raises(CheckpointError, match="another model"):
        load_checkpoint(path, engine(other, build_optimizer(other, TrainConfig())))
    all_trained = small_model().requires_grad_(True)
    with pytest.raises(CheckpointError, match="another model"):
        load_checkpoint(path, engine(all_trained, build_optimizer(all_trained, TrainConfig())))


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    model = small_model(seed=7)
    before = bits(model.state_dict())
    model[0].requires_grad_(False)
    optimizer = torch.optim.RMSprop(model[1].parameters())
    with pytest.raises(CheckpointError, match=r"another optimizer \(AdamW\) .* \(RMSprop\)"):
        load_checkpoint(path, engine(model, optimizer))
    assert bits(model.state_dict()) == before


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    path = save(tmp_path)
    names = {p.name for p in path.iterdir()} - {MANIFEST}
    assert set(json.loads((path / MANIFEST).read_text())) == names == {SHARD, STATE}
