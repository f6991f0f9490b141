"""A run's directory: whose it is, what it says of itself, and whether it may be used again."""

import fcntl
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from mallowspo_cli.distributed import world_size
from mallowspo_cli.errors import CheckpointError
from mallowspo_cli.files import make_directory, write_json, write_text
from mallowspo_cli.recipe.load import LoadedRecipe

PACKAGES = (
    *("mallowspo", "torch", "transformers", "datasets", "accelerate", "hydra-core", "peft"),
    *("deepspeed", "bitsandbytes"),
)
FREE_KEYS = (
    *("log", "checkpoint", "reference", "output_dir"),
    *("train.pack_tokens", "train.activation_checkpointing", "train.compile", "train.liger"),
    "train.hang_seconds",
)
"""Keys that a resumed run may change: they leave the numbers alone, up to rounding."""
LOCK = ".lock"


def check_directory(directory: Path, loaded: LoadedRecipe, resume: bool) -> bool:
    """Make sure that `directory` is free or this run's own; returns whether its run is finished.

    Raises:
        CheckpointError: it is another run's, or is not a run at all.
    """
    if all(path.name == LOCK for path in directory.iterdir()):
        return False
    _check_owner(directory, loaded, resume)
    return (directory / "results.json").is_file()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make a run's directory and keep other processes out of it.

    Raises:
        MallowsPOError: it cannot be written.
        CheckpointError: another process is at work there.
    """
    make_directory(directory, "the run")
    with (directory / LOCK).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process trains in {directory}. Wait for it, or give another place "
                "(output_dir=...)."
            ) from error
        try:
            yield
        finally:
            (directory / LOCK).unlink(missing_ok=True)


def claim(
    directory: Path, loaded: LoadedRecipe, data: dict[str, Any], about: dict[str, Any]
) -> None:
    """Write what the run is. Until then nothing stands in the way of a mended command.

    Args:
        data: what the run is trained on and weighed by; a resumed run has to find the same.
        about: what else belongs into environment.json.

    Raises:
        CheckpointError: the run began with other data.
    """
    file = directory / "data.json"
    if file.is_file() and (before := json.loads(file.read_text())) != data:
        changed = [key for key in data if data[key] != before.get(key)]
        raise CheckpointError(
            f"the run in {directory} began with other data: {', '.join(changed)} changed since "
            "(data.json). Put the data back, or start anew (output_dir=...)."
        )
    write_json(file, data)
    write_text(directory / "recipe.yaml", loaded.to_yaml())
    write_text(directory / "overrides.yaml", yaml.safe_dump(loaded.overrides))
    write_json(directory / "environment.json", {**environment(), **about})


def environment() -> dict[str, Any]:
    """What a reader of the run needs to repeat it."""
    cuda = torch.cuda.is_available()
    return {
        "versions": {name: v for name in PACKAGES if (v := _version(name)) is not None},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "command": sys.argv,
    }


def _check_owner(directory: Path, loaded: LoadedRecipe, resume: bool) -> None:
    recipe_file = directory / "recipe.yaml"
    if not recipe_file.is_file():
        raise CheckpointError(
            f"{directory} holds files but no run. Give another place: output_dir=..."
        )
    if not resume:
        raise CheckpointError(
            f"{directory} holds a run already. Go on with it (--resume), or give another place "
            "(name=... or output_dir=...)."
        )
    try:
        before = _numbers(yaml.safe_load(recipe_file.read_text()))
    except (yaml.YAMLError, AttributeError) as error:
        raise CheckpointError(f"{recipe_file} is no recipe any more. Put it back.") from error
    now = _numbers(yaml.safe_load(loaded.to_yaml()))
    changed = [
        f"{key} was {before.get(key)}, is {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"{directory} holds a run of another recipe ({'; '.join(changed[:4])}). Repeat its "
            "words, or give another place (output_dir=...)."
        )


def _numbers(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keys that change the numbers, flat."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if path in FREE_KEYS:
            continue
        if isinstance(value, dict):
            flat |= _numbers(value, f"{path}.")
        else:
            flat[path] = value
    return flat


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout that this package runs from, if it is one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": False}
    try:
        # A wheel in a virtual environment inside another repository is not of that repository.
        ours = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], **options)
        head = subprocess.run([*git, "rev-parse", "HEAD"], **options)
    except OSError:
        return None
    return head.stdout.strip() if ours.returncode == 0 else None
