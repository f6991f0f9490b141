"""Reference scores on disk: append-only Parquet shards under a manifest."""

import contextlib
import hashlib
import json
import os
import shlex
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mallowspo_cli.distributed import log
from mallowspo_cli.errors import CacheError
from mallowspo_cli.files import make_directory, whole_file, write_json
from mallowspo_cli.reference.fingerprint import Fingerprint

FORMAT = 2
"""Version of the layout on disk, and of what the numbers in it mean."""
SHARDS = "rows-*.parquet"
FILL = "mallowspo cache-ref recipe=..."


@dataclass(frozen=True, slots=True)
class ReferenceRows:
    """The stored sums of B pairs, (B,) each: log-probs and entropies in nats, float32."""

    chosen_logp: Tensor
    rejected_logp: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_entropy_sum: Tensor
    rejected_entropy_sum: Tensor
    chosen_first_entropy: Tensor
    rejected_first_entropy: Tensor


COLUMNS = tuple(field.name for field in fields(ReferenceRows))
SCHEMA = pa.schema(
    [("pair_id", pa.string())]
    + [(c, pa.int32() if c.endswith("tokens") else pa.float32()) for c in COLUMNS]
)


class ReferenceStore:
    """Sums per pair content. Rows are only ever added, and a row that was read once stays.

    Several processes may add to one store. Where two have scored the same pair the older shard
    counts, for every reader.
    """

    def __init__(self, path: Path, fingerprint: Fingerprint, vocab_size: int):
        self.path, self.fingerprint, self.vocab_size = path, fingerprint, vocab_size
        self.damaged: list[Path] = []
        """Shards that were not what their names say; their rows are missing."""
        self.reload()

    def reload(self) -> None:
        """Read all shards, oldest first."""
        self._index: dict[str, int] = {}
        self._rows = {
            c: torch.empty(0, dtype=torch.int64 if c.endswith("tokens") else torch.float32)
            for c in COLUMNS
        }
        self._known: set[str] = set()
        self.refresh()

    @classmethod
    def create(cls, path: Path, expected: Fingerprint, vocab_size: int) -> "ReferenceStore":
        """A new, empty store.

        Raises:
            CacheError: `path` holds rows of which nothing says what built them.
        """
        make_directory(path, "the reference store")
        # Another process may have made it, and added rows, since our caller looked.
        if any(path.glob(SHARDS)) and not (path / "manifest.json").is_file():
            raise CacheError(
                f"{path} holds rows but no manifest.json, so nothing says which model they are of. "
                "Remove the directory, or give another: reference.store=..."
            )
        manifest = {"format": FORMAT, "vocab_size": vocab_size, "fingerprint": asdict(expected)}
        mine = path / f".manifest.{uuid.uuid4().hex[:12]}.tmp"
        write_json(mine, manifest)
        try:
            # Unlike a renaming, it leaves alone what another process has put there meanwhile.
            os.link(mine, path / "manifest.json")
        except FileExistsError:
            return cls.open(path, expected)
        except OSError:
            # A file system without hard links.
            mine.replace(path / "manifest.json")
        finally:
            mine.unlink(missing_ok=True)
        return cls(path, expected, vocab_size)

    @classmethod
    def open(
        cls, path: Path, expected: Fingerprint | None, fill_command: str = FILL
    ) -> "ReferenceStore":
        """An existing store; with `expected` None, whatever built it.

        `fill_command` is the `cache-ref` command that errors name.

        Raises:
            CacheError: missing, or built by another model or in another way: lists what differs.
        """
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            if manifest["format"] != FORMAT:
                raise ValueError(f"format {manifest['format']}")
            found = Fingerprint(**manifest["fingerprint"])
            vocab_size = int(manifest["vocab_size"])
        except FileNotFoundError as error:
            raise CacheError(f"no reference store at {path}. Build it: {fill_command}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"{path / 'manifest.json'} is not a manifest of version {FORMAT}. Remove the "
                "directory, or give another: reference.store=..."
            ) from error
        if expected is not None and (differences := found.differences(expected)):
            words = [w for w in shlex.split(fill_command) if not w.startswith("reference.store=")]
            raise CacheError(
                f"the reference store at {path} was built otherwise ({'; '.join(differences)}). "
                f"Build another: {shlex.join(words)} reference.store=NEW (or leave reference.store "
                "out: its place then follows from the model)."
            )
        return cls(path, found, vocab_size)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def pair_ids(self) -> list[str]:
        """The ids of all rows, in the order in which they were added."""
        return list(self._index)

    def shards(self) -> list[Path]:
        """The files of rows, oldest first."""
        return sorted(self.path.glob(SHARDS))

    def missing(self, pair_ids: Sequence[str]) -> list[str]:
        """The ids that the store lacks, each once, in order."""
        return [p for p in dict.fromkeys(pair_ids) if p not in self._index]

    def lookup(self, pair_ids: Sequence[str], device: torch.device | None = None) -> ReferenceRows:
        """The rows of B pairs.

        Raises:
            CacheError: a pair is missing; names the first.
        """
        try:
            index = torch.tensor([self._index[p] for p in pair_ids], dtype=torch.int64)
        except KeyError as error:
            raise CacheError(
                f"the reference store at {self.path} has no row for pair {error.args[0]}. "
                "Complete it: mallowspo cache-ref recipe=..."
            ) from error
        return ReferenceRows(**{c: self._rows[c][index].to(device) for c in COLUMNS})

    def append(
        self, pair_ids: Sequence[str], rows: ReferenceRows, about: dict[str, str] | None = None
    ) -> None:
        """Write a shard, whole or not at all. `about` says how it was made, for people."""
        columns = {c: getattr(rows, c).cpu().numpy() for c in COLUMNS}
        table = pa.table({"pair_id": list(pair_ids), **columns}, schema=SCHEMA)
        name = write_shard(self.path, table.replace_schema_metadata(about or {}))
        self._known.add(name)
        self._add([table])

    def refresh(self) -> None:
        """Read the shards that others have added since. Damaged ones are set aside."""
        tables: dict[str, pa.Table] = {}
        for shard in self.shards():
            if shard.name in self._known:
                continue
            try:
                tables[shard.name] = read_shard(shard)
            except CacheError as error:
                if not shard.exists():
                    # Merged into another one meanwhile, which lies there whole and comes first.
                    self.refresh()
                    return
                self._known.add(shard.name)
                log.warning("%s It is set aside, and its rows are missing.", error)
                self.damaged.append(shard)
                # In a directory that cannot be written it stays, and is passed over each time.
                with contextlib.suppress(OSError):
                    shard.rename(shard.with_suffix(".damaged"))
        self._known.update(tables)
        if tables:
            self._add(list(tables.values()))

    def _add(self, tables: Sequence[pa.Table]) -> None:
        table = pa.concat_tables(t.replace_schema_metadata(None) for t in tables)
        offset = len(self._rows[COLUMNS[0]])
        for position, pair in enumerate(table["pair_id"].to_pylist()):
            self._index.setdefault(pair, offset + position)
        for c in COLUMNS:
            added = torch.from_numpy(table[c].to_numpy().copy()).to(self._rows[c].dtype)
            self._rows[c] = torch.cat([self._rows[c], added])


def write_shard(directory: Path, table: pa.Table, place: str | None = None) -> str:
    """Write rows under a name that tells their age and holds their bytes to account.

    `place` is the beginning of the name; None makes it the newest.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data = sink.getvalue().to_pybytes()
    name = f"{place or f'rows-{time.time_ns():020d}'}-{_digest(data)}.parquet"
    with whole_file(directory / name) as temporary:
        temporary.write_bytes(data)
    return name


def read_shard(shard: Path) -> pa.Table:
    """The rows of a file.

    Raises:
        CacheError: cut off, changed since it was written, or no rows of a store.
    """
    # Parquet reads a flipped bit as another number; the file's name holds its bytes to account.
    try:
        data = shard.read_bytes()
        if shard.name.endswith(f"-{_digest(data)}.parquet"):
            table = pq.read_table(pa.BufferReader(data))
            return table.cast(SCHEMA.with_metadata(table.schema.metadata))
        problem = "its content is not what its name says"
    except (pa.ArrowException, ValueError, OSError) as error:
        problem = str(error).splitlines()[0]
    raise CacheError(f"{shard} is damaged ({problem}).")


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
