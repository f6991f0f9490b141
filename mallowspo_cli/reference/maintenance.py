"""Housekeeping of reference stores: who works there, merging, left-over files, differences."""

import contextlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mallowspo_cli.errors import CacheError
from mallowspo_cli.reference.claims import STALE_SECONDS, process_alive
from mallowspo_cli.reference.store import (
    COLUMNS,
    ReferenceRows,
    ReferenceStore,
    read_shard,
    write_shard,
)

TEMPORARY_SECONDS = 60.0
"""A temporary file that was not written to for so long has lost its process."""
CACHED = re.compile(r"\.?v\d+-[0-9a-f]+(\.[0-9a-f]+\.tmp)?")
"""Names that the cache gives stores, prepared data and rows, and those on their way out."""


@dataclass(frozen=True)
class HeldClaim:
    """A claim that lies in a store."""

    file: Path
    owner: str
    """Host and process, for people."""
    silent_seconds: float
    """Since its last sign of life."""
    live: bool
    """Whether its process may still work: it is there, as far as we can tell, and gives signs."""


def claims_of(store: Path) -> list[HeldClaim]:
    """The claims of a store, live and stale."""
    directory = store / "claims"
    if not directory.is_dir():
        return []
    now = _clock_of(directory)
    found = [_claim(file, now) for file in sorted(directory.iterdir()) if file.name[0] != "."]
    return [claim for claim in found if claim is not None]


def _claim(file: Path, now: float) -> HeldClaim | None:
    try:
        silent, text = now - file.stat().st_mtime, file.read_text()
    except FileNotFoundError:
        return None
    owner, dead = "unknown", False
    try:
        said = json.loads(text)
        owner = f"process {said['process']} on {said['host']}"
        dead = said["host"] == socket.gethostname() and not process_alive(int(said["process"]))
    except (ValueError, KeyError, TypeError):
        # Not written yet, or cut off: its age decides.
        pass
    return HeldClaim(file, owner, silent, live=not dead and silent <= STALE_SECONDS)


def _clock_of(directory: Path) -> float:
    """The time by the clock that dates the directory's files, which may be a file server's."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def notes(store: ReferenceStore) -> dict[str, list[str]]:
    """What the shards say of how they were made: name to values, each once."""
    found: dict[str, dict[str, None]] = {}
    for shard in _readable(store):
        for key, value in _about(pq.read_schema(shard)).items():
            found.setdefault(key, {}).update(dict.fromkeys(value.split("; ")))
    return {key: list(values) for key, values in found.items()}


def _readable(store: ReferenceStore) -> list[Path]:
    return [shard for shard in store.shards() if shard not in store.damaged]


def _about(schema: pa.Schema) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}


def shard_of(store: ReferenceStore, pair_id: str) -> Path:
    """The shard whose row of a pair counts.

    Raises:
        CacheError: none has the pair.
    """
    for shard in _readable(store):
        if pair_id in read_shard(shard)["pair_id"].to_pylist():
            return shard
    raise CacheError(f"no shard in {store.path} holds a row for pair {pair_id}.")


@dataclass(frozen=True)
class Merge:
    """What `merge_shards` did."""

    shards: list[str]
    """Names of the shards that were merged; none where there was nothing to do."""
    rows: int
    """Rows that stayed."""
    doubled: int
    """Rows left out because an older shard has the pair."""
    dropped: int
    """Rows left out because their pair is not wanted."""
    freed: int
    """Bytes."""


def merge_shards(store: ReferenceStore, wanted: Collection[str] | None = None) -> Merge:
    """Make one shard of all; lookups stay as they are, bit for bit.

    The merged shard takes the oldest one's place, and is there whole before the first of the others
    goes. Killed in between, the store holds rows twice, and the same ones count.

    Args:
        wanted: drop rows of all other pairs; None keeps all.

    Raises:
        CacheError: a shard was damaged since the store was opened.
    """
    shards = _readable(store)
    if not shards:
        return Merge([], 0, 0, 0, 0)
    size = sum(shard.stat().st_size for shard in shards)
    tables = [read_shard(shard) for shard in shards]
    table = pa.concat_tables(t.replace_schema_metadata(None) for t in tables).combine_chunks()
    first: dict[str, int] = {}
    for position, pair in enumerate(table["pair_id"].to_pylist()):
        first.setdefault(pair, position)
    kept = [place for pair, place in first.items() if wanted is None or pair in wanted]
    if len(shards) == 1 and len(kept) == len(table):
        return Merge([], len(table), 0, 0, 0)
    name = None
    if kept:
        about = {key: "; ".join(values) for key, values in notes(store).items()}
        merged = table.take(kept).replace_schema_metadata(about)
        name = write_shard(store.path, merged, place=shards[0].name.rpartition("-")[0])
        size -= (store.path / name).stat().st_size
    # Newest first: of a pair that two shards hold, the older row is never the first to go. Where
    # the others added nothing, the merged shard is the oldest one, under its very name.
    remove([shard for shard in reversed(shards) if shard.name != name])
    doubled, dropped = len(table) - len(first), len(first) - len(kept)
    return Merge([shard.name for shard in shards], len(kept), doubled, dropped, size)


def left_over(store: Path) -> list[Path]:
    """Files that nobody will read again: damaged shards, what a killed process was writing, and
    claims of processes that are gone.
    """
    now = _clock_of(store)
    temporary = [
        path for path in store.glob(".*.tmp") if now - path.stat().st_mtime > TEMPORARY_SECONDS
    ]
    stale = [claim.file for claim in claims_of(store) if not claim.live]
    return sorted([*store.glob("*.damaged"), *temporary, *stale])


def unused(cache: Path, days: int, own: Collection[Path]) -> list[Path]:
    """Stores and prepared data under `cache`, and files of its `launches` and `digests`, that were
    not used for so many days. Never those in `own`.
    """
    before = time.time() - days * 86400
    kept = {path.resolve() for path in own}
    return [
        path
        for path in _disposable(cache)
        if path.resolve() not in kept and last_used(path) < before
    ]


def _disposable(cache: Path) -> Iterator[Path]:
    # What does not bear one of our names, and what is only linked to, is somebody else's.
    for kind in ("reference", "data", "rows"):
        for path in sorted((cache / kind).glob("*v*")):
            if CACHED.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                yield path
    for kind in ("launches", "digests"):
        yield from (path for path in sorted((cache / kind).glob("*")) if path.is_file())


def last_used(path: Path) -> float:
    """When a file, or the newest file of a directory, was read or written, in seconds."""
    inside = [file.stat() for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
    # The time at which a directory itself was read says only that somebody listed it.
    own = path.stat()
    times = [own.st_mtime] if path.is_dir() else [own.st_mtime, own.st_atime]
    return max([*times, *(max(status.st_mtime, status.st_atime) for status in inside)])


def remove(paths: Sequence[Path]) -> int:
    """Remove files and directories; returns the bytes of files that this frees."""
    freed = 0
    for path in paths:
        if path.is_dir():
            freed += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            # In one step, so that a store is never there in part.
            name = path.name.removeprefix(".").partition(".")[0]
            gone = path.rename(path.with_name(f".{name}.{uuid.uuid4().hex[:12]}.tmp"))
            shutil.rmtree(gone)
            continue
        # Another process may tidy up as well.
        with contextlib.suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            freed += size
    return freed


def differences(found: ReferenceRows, expected: ReferenceRows) -> dict[str, Tensor]:
    """|found - expected| of each column, (B,) float64; 0 where both are the same or no number."""

    def of(name: str) -> Tensor:
        one, other = getattr(found, name).double(), getattr(expected, name).double()
        same = (one == other) | (one.isnan() & other.isnan())
        return torch.where(same, 0.0, (one - other).abs())

    return {name: of(name) for name in COLUMNS}
