"""A run's directory: whose it is, what it says of itself, and whether it may be used again."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from mallowspo_cli.errors import CheckpointError
from mallowspo_cli.files import make_directory, write_json, write_text
from mallowspo_cli.recipe.load import LoadedRecipe

PACKAGES = ("mallowspo", "torch", "transformers", "datasets", "accelerate", "hydra-core", "peft")
FREE_KEYS = ("log", "checkpoint", "reference", "output_dir", "train.pack_tokens")
"""Keys that a resumed run may change: they leave the numbers alone."""


def check_directory(directory: Path, loaded: LoadedRecipe, resume: bool) -> bool:
    """Make sure that `directory` is free or this run's own; returns whether its run is finished.

    Raises:
        CheckpointError: it is another run's, or is not a run at all.
        MallowsPOError: it cannot be written.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file. Give another place: output_dir=...")
    if directory.exists() and any(directory.iterdir()):
        _check_owner(directory, loaded, resume)
        if (directory / "results.json").is_file():
            return True
    make_directory(directory, "the run")
    return False


def claim(directory: Path, loaded: LoadedRecipe) -> None:
    """Write what the run is. Until then nothing stands in the way of a mended command."""
    write_text(directory / "recipe.yaml", loaded.to_yaml())
    write_text(directory / "overrides.yaml", yaml.safe_dump(loaded.overrides))
    write_json(directory / "environment.json", environment())


def environment() -> dict[str, Any]:
    """What a reader of the run needs to repeat it."""
    cuda = torch.cuda.is_available()
    return {
        "versions": {name: v for name in PACKAGES if (v := _version(name)) is not None},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
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
    before = _numbers(yaml.safe_load(recipe_file.read_text()))
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
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
