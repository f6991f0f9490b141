"""What all tests share: no network, a cache of their own, a tiny model and tiny data."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before transformers, datasets or huggingface_hub are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton, where that is installed.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("default", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "default")


LONGEST = (
    *("training/test_processes.py", "commands/test_train.py", "recipe/test_load.py"),
    *("test_recipes.py", "commands/test_eval_alpacaeval.py", "test_readme.py"),
)
"""Begun first, so that no core waits at the end for the other's long file."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    ranks = {root / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache directory that no other program sees, for the whole session."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOWSPO_CACHE", str(path / "mallowspo"))
        patch.setenv("HF_HOME", str(path / "huggingface"))
        patch.delenv("MALLOWSPO_RECIPE_PATH", raising=False)
        yield path


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors are fastest on one thread, and the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A command run inside a test sets the log up for its terminal; the next test has its own."""
    yield
    log = logging.getLogger("mallowspo")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def tiny_directory(own_cache: Path) -> Path:
    """The directory of `model=tiny_random`."""
    from mallowspo_cli.models.sources import resolve_model

    return resolve_model("random:llama")


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_directory: Path):
    """The byte-level tokenizer of `model=tiny_random`."""
    from mallowspo_cli.models.load import load_tokenizer

    return load_tokenizer(tiny_directory)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes rows as a JSONL file and returns its path."""

    def write(rows: list[dict[str, Any]], name: str = "pairs.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def pair_rows(count: int) -> list[dict[str, str]]:
    """Distinct rows with prompt, chosen and rejected, of different lengths."""
    return [
        {
            "prompt": f"Say {index}" + "!" * (index % 5),
            "chosen": f"Good {index}" + " yes" * (index % 3),
            "rejected": f"Bad {index}" + " no" * (index % 4),
        }
        for index in range(count)
    ]
