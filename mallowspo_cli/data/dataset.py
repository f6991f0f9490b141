"""Read preference pairs from a hub id, files, a directory, or the package itself."""

import glob
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

from mallowspo_cli.data.formats import choose_format
from mallowspo_cli.data.pairs import Message, PreferencePair
from mallowspo_cli.distributed import log
from mallowspo_cli.errors import DataError, first_line
from mallowspo_cli.recipe.schema import DatasetConfig

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""File endings and the reader of `datasets` for each."""


HELD_OUT_SEED = 0
"""Of the shuffle that picks held-out prompts. Not the recipe's: runs of another seed, and later
evaluations, hold out the same pairs."""


def load_pairs(config: DatasetConfig, split: str) -> list[PreferencePair]:
    """The pairs of `split`, which is "train" or "eval", in the data's order.

    Without an eval split of its own, whole prompts of the training split are held out until they
    have `eval_size` pairs: pairs of one prompt never stand on both sides.

    Raises:
        DataError: nothing there, no rows, a row that is no pair; names the place.
    """
    if split == "eval" and config.eval_split is None and config.eval_size == 0:
        return []
    own = config.train_split if split == "train" else config.eval_split
    rows, name = _read(config, own if own is not None else config.train_split)
    if not rows:
        raise DataError(f"{name} holds no rows.")
    to_pair = choose_format(config.format, rows[0], name)
    pairs = [to_pair(row, f"{name} row {index}") for index, row in enumerate(rows)]
    if config.eval_split is not None:
        return pairs
    held_out = _held_out_prompts(pairs, config.eval_size)
    return [pair for pair in pairs if (pair.prompt in held_out) == (split == "eval")]


def _held_out_prompts(pairs: list[PreferencePair], eval_size: int) -> set[tuple[Message, ...]]:
    """Prompts at the end of a shuffle that together have at least `eval_size` pairs."""
    counts = Counter(pair.prompt for pair in pairs)
    prompts = list(counts)
    random.Random(HELD_OUT_SEED).shuffle(prompts)
    held_out: set[tuple[Message, ...]] = set()
    size = 0
    while size < eval_size and prompts:
        size += counts[prompts[-1]]
        held_out.add(prompts.pop())
    if not prompts:
        raise DataError(
            f"dataset.eval_size={eval_size} leaves none of {len(pairs)} pairs "
            f"({len(counts)} prompts) to train on."
        )
    return held_out


def _read(config: DatasetConfig, split: str) -> tuple[list[dict[str, Any]], str]:
    """Raw rows, and a name for them in messages."""
    path = config.path
    if path.startswith("package:"):
        path = str(Path(__file__).parent / path.removeprefix("package:"))
    place = Path(path).expanduser()
    if place.is_dir():
        files = [f for ending in READERS for f in sorted(place.glob(f"{split}{ending}"))]
        if not files:
            raise DataError(
                f"{config.path} has no split '{split}': no {split}.jsonl, .json, .csv or .parquet."
            )
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise DataError(f"{config.path} has {names}; expected one file for '{split}'.")
        return _read_files(files, files[0].name), files[0].name
    found = [place] if place.is_file() else map(Path, glob.glob(str(place), recursive=True))
    if files := sorted(found):
        # The training file would be its own held-out set.
        if split != config.train_split:
            raise DataError(
                f"{config.path} has no split '{split}'. Set dataset.eval_split=null and "
                "dataset.eval_size=N, or give a directory with a file for each split."
            )
        name = place.name if place.is_file() else config.path
        return _read_files(files, name), name
    if place.suffix in READERS or config.path.startswith((".", "/", "~", "package:")):
        raise DataError(f"no data at {config.path}.")
    return _read_hub(config, split), f"{config.path} ({split})"


def _read_files(files: list[Path], name: str) -> list[dict[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    for file in files:
        if file.suffix not in READERS:
            raise DataError(f"cannot read {file.name}; expected one of {', '.join(READERS)}.")
        if file.suffix != files[0].suffix:
            raise DataError(f"{name} mixes {files[0].suffix} and {file.suffix}; expected one kind.")
        if file.stat().st_size == 0:
            raise DataError(f"{file.name} is empty.")
    reader = READERS[files[0].suffix]
    # "None" and "NA" are words in a text column.
    options: dict[str, Any] = {"keep_default_na": False} if reader == "csv" else {}
    datasets.disable_progress_bars()
    # It would log a failed read too; the error below says it in one line.
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        names = [str(file) for file in files]
        data = datasets.load_dataset(reader, data_files=names, split="train", **options)
        return data.to_list()
    except (DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{name} cannot be read as {reader}: {first_line(cause)}") from error


def _read_hub(config: DatasetConfig, split: str) -> list[dict[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    log.info("reading %s, split %s", config.path, split)
    try:
        return datasets.load_dataset(config.path, revision=config.revision, split=split).to_list()
    except ValueError as error:
        raise DataError(f"{config.path}: {first_line(error)}") from error
    except (OSError, RuntimeError, DatasetGenerationError) as error:
        raise DataError(
            f"{config.path} is not a file or directory here, and cannot be read from the hub "
            f"({type(error).__name__}). Check the name and the connection, or give a local file."
        ) from error
