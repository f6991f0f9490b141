"""Checkpoints: whole or absent, and checked before they are used."""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mallowspo_cli.errors import CheckpointError, first_line
from mallowspo_cli.files import sha256, whole_directory, write_json

WEIGHTS, OPTIMIZER, STATE, MANIFEST = (
    "trainable.safetensors",
    "optimizer.pt",
    "state.json",
    "manifest.json",
)
UNREADABLE = (
    *(OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError),
    *(SafetensorError, UnpicklingError),
)
"""What a damaged file can raise."""


@dataclass
class TrainState:
    """Where a run stands. The data position follows from the step."""

    step: int = 0
    """Optimizer steps done."""


def checkpoint_path(run_directory: Path, step: int) -> Path:
    """checkpoints/step_000100 of a run."""
    return run_directory / "checkpoints" / f"step_{step:06d}"


def whole_checkpoints(run_directory: Path) -> list[Path]:
    """A run's checkpoints, oldest first. A half-written one has another name."""
    found = {
        int(path.name.removeprefix("step_")): path
        for path in (run_directory / "checkpoints").glob("step_*")
        if re.fullmatch(r"step_\d+", path.name) and (path / MANIFEST).is_file()
    }
    return [found[step] for step in sorted(found)]


def save_checkpoint(
    run_directory: Path,
    model: nn.Module,
    optimizer: Any,
    state: TrainState,
    keep: int,
) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`."""
    path = checkpoint_path(run_directory, state.step)
    for left in (path, *path.parent.glob(".step_*.tmp")):
        # What a kill in the middle of writing or removing one has left.
        shutil.rmtree(left, ignore_errors=True)
    with whole_directory(path) as target:
        weights = {n: p.detach().cpu().contiguous() for n, p in _trainable(model)}
        save_file(weights, target / WEIGHTS)
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state()
        torch.save({"optimizer": optimizer.state_dict(), "rng": rng}, target / OPTIMIZER)
        write_json(target / STATE, asdict(state))
        digests = {p.name: sha256(p) for p in sorted(target.iterdir())}
        write_json(target / MANIFEST, digests)
    for old in whole_checkpoints(run_directory)[:-keep]:
        shutil.rmtree(old)
    return path


def load_checkpoint(path: Path, model: nn.Module, optimizer: Any) -> TrainState:
    """Put a checkpoint's weights, optimizer state and random state in place.

    Raises:
        CheckpointError: damaged, or of another model.
    """
    try:
        digests = json.loads((path / MANIFEST).read_text())
        damaged = [n for n in (WEIGHTS, OPTIMIZER, STATE) if sha256(path / n) != digests[n]]
        if damaged:
            raise _damaged(path, f"{', '.join(damaged)} changed since it was written")
        state = TrainState(**json.loads((path / STATE).read_text()))
        weights = load_file(path / WEIGHTS)
        # Tensors and plain values only: no code in the file can run.
        saved = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
        moments, rng = saved["optimizer"], saved["rng"]
    except UNREADABLE as error:
        raise _damaged(path, first_line(error)) from error
    own = dict(_trainable(model))
    if weights.keys() != own.keys() or any(weights[n].shape != own[n].shape for n in own):
        raise CheckpointError(f"{path} is a checkpoint of another model than the recipe's.")
    try:
        optimizer.load_state_dict(moments)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is a checkpoint of another optimizer than the recipe's: {first_line(error)}."
        ) from error
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    return state


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {path} is damaged: {why}. Remove that directory; --resume then goes on "
        "from the one before it, or starts afresh."
    )
