"""Where rows come from: a hub id, files, a glob, a saved Arrow directory, or the package itself."""

import functools
import glob
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mallowspo_cli.distributed import log
from mallowspo_cli.errors import DataError, first_line
from mallowspo_cli.files import cache_directory, content_digest
from mallowspo_cli.recipe.schema import DatasetConfig, PartConfig

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""File endings and the reader of `datasets` for each."""

Rows = Any
"""A `datasets.Dataset`: memory-mapped, `rows[a:b]` gives {column: values}."""


@dataclass(frozen=True)
class Source:
    """One split of one data set."""

    name: str
    """For messages: a file's name, or the hub id and split."""
    part: str
    """Name of the part in a mixture; empty otherwise."""
    weight: float
    format: str
    load: Callable[[], Rows]
    """Reads the rows. Raises DataError."""
    digest: Callable[[], str]
    """Names the content. For files it reads no row."""
    shared: bool
    """Whether training and held-out pairs come from these rows, by prompt."""


def open_sources(config: DatasetConfig, split: str) -> list[Source]:
    """The sources of `split`, which is "train" or "eval", one for each part that has the split.

    Raises:
        DataError: nothing is there; names the place.
    """
    parts = config.parts or {"": PartConfig(path=str(config.path))}
    # A part without an eval split of its own has held-out pairs only where `eval_size` takes some.
    held_out = {
        name: (part.eval_split or config.eval_split) is not None or config.eval_size > 0
        for name, part in parts.items()
    }
    return [
        _open(name, part, config, split)
        for name, part in parts.items()
        if split == "train" or held_out[name]
    ]


def read_rows(data: Rows, name: str, start: int, stop: int) -> list[dict[str, Any]]:
    """Rows `start` to `stop` as {column: value}.

    Raises:
        DataError: text that is not UTF-8.
    """
    try:
        columns = data[start:stop]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 (in rows {start} to {stop - 1}): {first_line(error)}."
        ) from error
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _open(part_name: str, part: PartConfig, config: DatasetConfig, split: str) -> Source:
    train = part.train_split or config.train_split
    own = train if split == "train" else part.eval_split or config.eval_split
    wanted = own if own is not None else train
    options = {
        "revision": part.revision or config.revision,
        "name": part.subset or config.subset,
        "data_dir": part.data_dir or config.data_dir,
    }
    given = part.format != "auto" or bool(config.parts)
    name, load, digest = _find(part.path, wanted, train, options)
    return Source(
        name=name,
        part=part_name,
        weight=part.weight,
        format=part.format if given else config.format,
        load=functools.cache(load),
        digest=digest,
        shared=(part.eval_split or config.eval_split) is None and config.eval_size > 0,
    )


def _find(
    path: str, split: str, train_split: str, options: dict[str, str | None]
) -> tuple[str, Callable[[], Rows], Callable[[], str]]:
    """Name, loader and digest of a split."""
    local = path
    if path.startswith("package:"):
        local = str(Path(__file__).parent / path.removeprefix("package:"))
    place = Path(local).expanduser()
    if place.is_dir():
        if saved := _saved_directory(place, split):
            name = f"{path} ({split})"
            return name, lambda: _read_saved(saved, name), lambda: _digest([*saved.glob("*.arrow")])
        return _files([_split_file(place, path, split)], None)
    found = [place] if place.is_file() else map(Path, glob.glob(str(place), recursive=True))
    if files := sorted(found):
        # The training file would be its own held-out set.
        if split != train_split:
            raise DataError(
                f"{path} has no split '{split}'. Set dataset.eval_split=null and "
                "dataset.eval_size=N, or give a directory with a file for each split."
            )
        return _files(files, None if place.is_file() else path)
    if place.suffix in READERS or path.startswith((".", "/", "~", "package:")):
        raise DataError(f"no data at {path}.")
    load = functools.cache(lambda: _read_hub(path, split, options))
    name = f"{path} ({split})"
    return name, load, lambda: _digest([Path(file["filename"]) for file in load().cache_files])


def _saved_directory(place: Path, split: str) -> Path | None:
    """The directory of a split that `datasets` saved, if `place` is one."""
    if (place / "dataset_dict.json").is_file():
        if not (place / split / "state.json").is_file():
            names = ", ".join(sorted(f.parent.name for f in place.glob("*/state.json")))
            raise DataError(f"{place} has no split '{split}'; it has {names or 'none'}.")
        return place / split
    return place if (place / "state.json").is_file() else None


def _split_file(place: Path, path: str, split: str) -> Path:
    """The one file of a split in a directory of files."""
    files = [f for ending in READERS for f in sorted(place.glob(f"{split}{ending}"))]
    if not files:
        raise DataError(
            f"{path} has no split '{split}': no {split}.jsonl, .json, .csv, .parquet or .arrow."
        )
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError(f"{path} has {names}; expected one file for '{split}'.")
    return files[0]


def _files(
    files: list[Path], pattern: str | None
) -> tuple[str, Callable[[], Rows], Callable[[], str]]:
    name = pattern or files[0].name
    return name, lambda: _read_files(files, name), lambda: _digest(files)


def _digest(files: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(files):
        digest.update(f"{file.suffix}\0{content_digest(file)}\n".encode())
    return digest.hexdigest()


def _read_files(files: list[Path], name: str) -> Rows:
    import datasets

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
    names = [str(file) for file in files]
    # `datasets` would find a changed file by its time alone.
    options["cache_dir"] = str(cache_directory() / "rows" / f"v1-{_digest(files)}")
    return _load(
        lambda: datasets.load_dataset(reader, data_files=names, split="train", **options),
        f"{name} cannot be read as {reader}",
    )


def _read_saved(directory: Path, name: str) -> Rows:
    import datasets

    return _load(lambda: datasets.load_from_disk(str(directory)), f"{name} cannot be read as arrow")


def _load(read: Callable[[], Rows], failure: str) -> Rows:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    # It would log a failed read too; the error below says it in one line.
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        return read()
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise DataError(f"{failure}: {first_line(error.__cause__ or error)}") from error


def _read_hub(path: str, split: str, options: dict[str, str | None]) -> Rows:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    log.info("reading %s, split %s", path, split)
    try:
        return datasets.load_dataset(path, split=split, **options)  # type: ignore[arg-type]
    except ValueError as error:
        raise DataError(f"{path}: {first_line(error)}") from error
    except (OSError, RuntimeError, DatasetGenerationError) as error:
        raise DataError(
            f"{path} is not a file or directory here, and cannot be read from the hub "
            f"({type(error).__name__}). Check the name and the connection, or give a local file."
        ) from error
