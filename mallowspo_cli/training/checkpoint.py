"""Checkpoints: whole or absent, checked before they are used, and read by any number of processes.

A checkpoint is a directory: a file of each process (`training/pieces.py`), and a manifest with the
digests of all, which the main process writes last.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor

from mallowspo_cli.errors import CheckpointError, MallowsPOError, first_line
from mallowspo_cli.files import sha256, sync, write_json
from mallowspo_cli.models.flops import whole_shape
from mallowspo_cli.training.engine import Engine
from mallowspo_cli.training.pieces import WEIGHT, Piece, Pieces, write_pieces

STATE, MANIFEST, BEST = "state.json", "manifest.json", "best.json"
FORMAT = 2
RNG = "rng"
"""Kind of the pieces that hold random states; their names say of which device and process."""
SEEN_SECONDS = 60.0
"""How long the main process waits until it sees the files of all machines."""
UNREADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, SafetensorError)
"""What a damaged file can raise."""


@dataclass
class TrainState:
    """Where a run stands. The data position follows from the step."""

    step: int = 0
    """Optimizer steps done."""
    running: dict[str, float] = field(default_factory=dict)
    """Running statistics of the objective after them, the same in every process."""


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


def best_checkpoint(run_directory: Path) -> dict[str, Any] | None:
    """Step, metric and value of the best evaluation that has a checkpoint; None without one."""
    file = run_directory / "checkpoints" / BEST
    return json.loads(file.read_text()) if file.is_file() else None


def save_checkpoint(
    run_directory: Path,
    engine: Engine,
    state: TrainState,
    keep: int,
    best: dict[str, Any] | None,
    alive: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint, then remove all but the newest `keep` and the best.

    Every process calls this. It is absent until every process has written its file.

    Args:
        best: what best.json says from now on; None leaves it.
        alive: called as it goes on.

    Raises:
        CheckpointError: a process could not write (in all of them).
    """
    accelerator, path = engine.accelerator, checkpoint_path(run_directory, state.step)
    # A name that all processes know; a kill in the middle leaves it behind.
    temporary = path.with_name(f".{path.name}.tmp")

    def begin() -> None:
        if accelerator.is_main_process:
            for left in (path, *path.parent.glob(".step_*.tmp")):
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)

    _together(engine, begin)
    name = shard_name(accelerator.process_index, accelerator.num_processes)

    def write_own() -> dict[str, str]:
        # Where each machine has a directory of its own, the main process will miss this file.
        temporary.mkdir(parents=True, exist_ok=True)
        write_pieces(temporary / name, _watched((engine.pieces(), _random_states(engine)), alive))
        alive()
        sync(temporary / name)
        alive()
        return {name: sha256(temporary / name)}

    digests = _together(engine, write_own)

    def finish() -> None:
        if not accelerator.is_main_process:
            return
        files = {k: v for each in digests for k, v in each.items()}
        _wait_for(temporary, list(files))
        kept = best or best_checkpoint(run_directory)
        about = {
            "format": FORMAT,
            "optimizer": engine.optimizer_name,
            "processes": accelerator.num_processes,
            "best": kept,
        }
        write_json(temporary / STATE, {**asdict(state), **about})
        write_json(temporary / MANIFEST, {**files, STATE: sha256(temporary / STATE)})
        temporary.rename(path)
        sync(path.parent)
        if best is not None:
            write_json(path.parent / BEST, best)
        _prune(run_directory, keep, kept)

    _together(engine, finish)
    return path


def _prune(run_directory: Path, keep: int, best: dict[str, Any] | None) -> None:
    """Remove all but the newest `keep` and the best."""
    for old in whole_checkpoints(run_directory)[:-keep]:
        if best is None or old != checkpoint_path(run_directory, best["step"]):
            # Under the name of what is half-written: a kill on the way leaves what the next
            # checkpoint takes away.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.tmp")))


def load_checkpoint(
    path: Path, engine: Engine, alive: Callable[[], None] = lambda: None
) -> TrainState:
    """Put a checkpoint's weights, optimizer states and random states in place.

    Every process calls this, of however many; each reads the ranges that it holds.

    Raises:
        CheckpointError: damaged, or of another model or optimizer (in all processes).
    """
    accelerator = engine.accelerator
    rank, processes = accelerator.process_index, accelerator.num_processes

    def check() -> tuple[TrainState, Pieces]:
        # Each process looks at some of the files.
        state, pieces = read_checkpoint(path, slice(rank, None, processes))
        _check_fits(path, state, pieces, engine)
        if accelerator.is_main_process and state.get("best") is not None:
            # A kill may have come between the checkpoint and its best.json.
            write_json(path.parent / BEST, state["best"])
        # Of a run of before there were any, whose objective has none.
        return TrainState(state["step"], state.get("running", {})), pieces

    state, pieces = _together(engine, check, gather=False)[0]
    alive()

    def put() -> None:
        try:
            engine.load(pieces, state.step)
        except UNREADABLE as error:
            raise damaged(path, first_line(error)) from error

    _together(engine, put)
    alive()
    _set_random_states(engine, pieces)
    return state


def read_checkpoint(path: Path, checked: slice = slice(None)) -> tuple[dict[str, Any], Pieces]:
    """What state.json says and the pieces, the digests of the `checked` files compared.

    Raises:
        CheckpointError: damaged, or of an older version.
    """
    if (path / "trainable.safetensors").is_file():
        raise CheckpointError(
            f"{path} was written by an earlier version. Go on with that version, or start anew."
        )
    try:
        digests = json.loads((path / MANIFEST).read_text())
        count = len(digests) - 1
        names = sorted({STATE, *(shard_name(rank, count) for rank in range(count))})
        changed = [n for n in names if n not in digests or not (path / n).is_file()]
        changed = changed or [n for n in names[checked] if sha256(path / n) != digests[n]]
        if changed:
            raise damaged(path, f"{', '.join(changed)} changed since it was written")
        state = json.loads((path / STATE).read_text())
        if state["processes"] != count or not isinstance(state["step"], int):
            raise damaged(path, f"{STATE} and {MANIFEST} do not agree")
        return state, Pieces([path / n for n in names if n != STATE])
    except UNREADABLE as error:
        raise damaged(path, first_line(error)) from error


def checkpoint_weights(path: Path) -> dict[str, Tensor]:
    """Everything that was trained, whole and in float32, by its name in the scorer.

    Raises:
        CheckpointError: damaged.
    """
    _, pieces = read_checkpoint(path)
    try:
        return {
            name: pieces.read(WEIGHT, name).view(pieces.shapes[WEIGHT, name])
            for name in sorted(pieces.names(WEIGHT))
        }
    except UNREADABLE as error:
        raise damaged(path, first_line(error)) from error


def shard_name(rank: int, processes: int) -> str:
    """File of one process."""
    return f"rank_{rank:05d}_of_{processes:05d}.safetensors"


def damaged(path: Path, why: str) -> CheckpointError:
    """The error of a checkpoint that cannot be read."""
    return CheckpointError(
        f"the checkpoint {path} is damaged: {why}. Remove that directory; --resume then goes on "
        "from the one before it, or starts afresh."
    )


def _check_fits(path: Path, state: dict[str, Any], pieces: Pieces, engine: Engine) -> None:
    own = {name: whole_shape(p) for name, p in engine.trainable.items()}
    found = {name: pieces.shapes[WEIGHT, name] for name in pieces.names(WEIGHT)}
    if own != found:
        raise CheckpointError(f"{path} is a checkpoint of another model than the recipe's.")
    if state.get("optimizer") != engine.optimizer_name:
        raise CheckpointError(
            f"{path} is a checkpoint of another optimizer ({state.get('optimizer')}) than the "
            f"recipe's ({engine.optimizer_name})."
        )


def _together(engine: Engine, work: Callable[[], Any], gather: bool = True) -> list[Any]:
    """Do `work` in every process; an error in one is an error in all of them.

    Returns each process's result, or this one's alone without `gather`.
    """
    result, fault = None, None
    try:
        result = work()
    except (OSError, MallowsPOError, SafetensorError) as error:
        fault = error
    if engine.accelerator.num_processes == 1:
        if fault is not None:
            raise fault
        return [result]
    found = gather_object([(repr(fault) if fault else None, result if gather else None)])
    faults = [(rank, text) for rank, (text, _) in enumerate(found) if text]
    if fault is not None:
        raise fault
    if faults:
        raise CheckpointError(f"process {faults[0][0]} failed: {faults[0][1]}")
    return [each for _, each in found] if gather else [result]


def _wait_for(directory: Path, names: list[str]) -> None:
    """Until all files are seen here: on a shared file system that takes a moment."""
    end = time.monotonic() + SEEN_SECONDS
    while missing := [name for name in names if not (directory / name).is_file()]:
        if time.monotonic() > end:
            raise CheckpointError(
                f"{', '.join(missing[:3])} of a checkpoint cannot be seen by the main process in "
                f"{directory}. Every machine of a launch must see one run directory (output_dir)."
            )
        time.sleep(0.2)


def _watched(parts: Iterable[Iterable[Piece]], alive: Callable[[], None]) -> Iterator[Piece]:
    for piece in chain.from_iterable(parts):
        alive()
        yield piece


def _random_states(engine: Engine) -> list[Piece]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    rank = engine.accelerator.process_index
    return [Piece(RNG, f"{k}/{rank}", 0, tuple(v.shape), v) for k, v in states.items()]


def _set_random_states(engine: Engine, pieces: Pieces) -> None:
    """A process that the run did not have before keeps the state that its seed gave it."""
    rank = engine.accelerator.process_index
    if (RNG, f"cpu/{rank}") in pieces.shapes:
        torch.set_rng_state(pieces.read(RNG, f"cpu/{rank}"))
    if (RNG, f"cuda/{rank}") in pieces.shapes and torch.cuda.is_available():
        torch.cuda.set_rng_state(pieces.read(RNG, f"cuda/{rank}"))
