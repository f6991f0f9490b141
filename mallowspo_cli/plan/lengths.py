"""Lengths of pairs from a file, to plan without the data, a tokenizer or a hub."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mallowspo_cli.errors import DataError, first_line
from mallowspo_cli.recipe.choices import Truncation
from mallowspo_cli.recipe.schema import DatasetConfig

COLUMNS = ["prompt", "chosen", "rejected"]
FORM = '{"columns": ["prompt", "chosen", "rejected"], "lengths": [[52, 342, 117], ...]}'


@dataclass(frozen=True)
class KnownLengths:
    """Of pairs that fit into a recipe's limits."""

    rows: NDArray[np.int64]
    """(N, 3) tokens of prompt, chosen and rejected."""
    about: str
    """Where they are from, and how many of how many fit."""


def read_lengths(file: Path, config: DatasetConfig, pairs: int | None = None) -> KnownLengths:
    """The lengths in a file, within the recipe's limits.

    Args:
        file: JSON, as `FORM`; other keys are left alone.
        config: whose `max_length`, `max_prompt_length` and `truncation` apply, as to tokens.
        pairs: how many pairs the data has, of which these are a sample: the file's are repeated,
            in their order. None: as many as fit.

    Raises:
        DataError: no such file, another form, or nothing fits.
    """
    every = _read(file)
    rows = _within(every, config)
    if not len(rows):
        raise DataError(
            f"none of the {len(every):,} pairs of {file} fits into dataset.max_length="
            f"{config.max_length} and dataset.max_prompt_length={config.max_prompt_length}."
        )
    about = f"lengths of {file} ({len(rows):,} of {len(every):,} pairs fit"
    if pairs is None:
        return KnownLengths(rows, f"{about})")
    return KnownLengths(rows[np.arange(pairs) % len(rows)], f"{about}, repeated)")


def _read(file: Path) -> NDArray[np.int64]:
    if not file.is_file():
        raise DataError(f"no file of lengths at {file}. It looks like this: {FORM}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("columns", COLUMNS) != COLUMNS:
            raise ValueError(f"columns {found['columns']}")
        rows = np.array(found["lengths"])
        if rows.ndim != 2 or rows.shape[1] != 3 or rows.dtype.kind != "i" or rows.min() < 1:
            raise ValueError("lengths that are not three whole numbers above 0 a pair")
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise DataError(
            f"{file} holds no lengths ({first_line(error)}). Expected: {FORM}"
        ) from error
    return rows.astype(np.int64)


def _within(rows: NDArray[np.int64], config: DatasetConfig) -> NDArray[np.int64]:
    """What is left of the pairs: the rule of `data/tokenize.py`, on numbers of tokens."""
    prompt, chosen, rejected = rows.T
    limit = config.max_prompt_length or config.max_length
    if config.truncation is Truncation.keep_end:
        room = np.minimum(limit, config.max_length - np.maximum(chosen, rejected))
        prompt = np.where((prompt > room) & (room >= 1), room, prompt)
    room = config.max_length - prompt
    if config.truncation is Truncation.keep_start:
        chosen, rejected = np.minimum(chosen, room), np.minimum(rejected, room)
    fits = (prompt <= limit) & (room >= 1) & (np.maximum(chosen, rejected) <= room)
    return np.stack([prompt, chosen, rejected], axis=1)[fits]
