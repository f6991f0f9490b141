"""Tokenised pairs as Arrow tables: memory-mapped, with what became of every row that was read."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntFlag
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mallowspo_cli.errors import DataError
from mallowspo_cli.files import cache_directory

TokenIds = NDArray[np.int32]

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("where", pa.string()),
        ("cause", pa.string()),
        ("error", pa.string()),
        ("prompt_key", pa.int64()),
        ("pair_id", pa.string()),
        ("prompt", pa.list_(pa.int32())),
        ("chosen", pa.list_(pa.int32())),
        ("rejected", pa.list_(pa.int32())),
        ("oddities", pa.int32()),
        ("column", pa.float64()),
        ("rater_neg_log_phi", pa.float64()),
    ]
)
"""One line a pair, or one for a row that gave none. `row` counts the data's rows from 0; `cause`
says why a pair was left out (then `pair_id` is null) or cut; `error` is set where it is no pair."""


def pair_id(prompt: TokenIds, chosen: TokenIds, rejected: TokenIds) -> str:
    """blake2b-128 (hex) of the three token lists, each as its length and its ids, little-endian.

    Shuffling, filtering or sharding can never pair a score with the wrong example.
    """
    digest = hashlib.blake2b(digest_size=16)
    for ids in (prompt, chosen, rejected):
        digest.update(np.int32(len(ids)).astype("<i4").tobytes())
        digest.update(np.asarray(ids, dtype="<i4").tobytes())
    return digest.hexdigest()


def pairs_digest(pair_ids: Iterable[str]) -> str:
    """Names pairs in their order."""
    return hashlib.blake2b("".join(pair_ids).encode(), digest_size=16).hexdigest()


class Oddity(IntFlag):
    """What is odd about a pair's text, in any language."""

    BLANK_TURN = 1
    """A turn of the prompt has no text."""
    ROLE_NAME = 2
    """A response is nothing but the name of a role."""
    SPECIAL_TOKEN = 4
    """A text holds the spelling of a special token, which the tokenizer takes for the token."""
    REPEATED_PROMPT = 8
    """Both responses begin with the text of the prompt's last turn."""


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """Token ids of one pair. A response holds what is trained: its text and its end token."""

    pair_id: str
    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds


class TokenizedPairs(Sequence[TokenizedPair]):
    """Pairs ready to score, in order, and what was left out or cut on the way.

    Tokens stay in the tables' memory, which may be mapped from files: a pair is looked at only when
    it is asked for.
    """

    def __init__(
        self,
        tables: Sequence[pa.Table],
        lines: NDArray[np.int64] | None = None,
        left_out: Counter[str] | None = None,
    ):
        """`lines` are positions in the tables, one after another; None takes all.

        Lines without a pair count as losses, and so do the pairs of `left_out`, by cause.
        """
        self._left_out = left_out or Counter()
        self._batches = [batch for table in tables for batch in table.to_batches() if len(batch)]
        self._ends = np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)
        total = int(self._ends[-1]) if self._batches else 0
        self._lines = np.arange(total) if lines is None else np.asarray(lines, dtype=np.int64)
        self._kept = self._lines[self.valid("pair_id")[self._lines]]
        self._lists = [
            {name: _list_views(batch[name]) for name in ("prompt", "chosen", "rejected")}
            for batch in self._batches
        ]

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenizedPairs": ...
    def __getitem__(self, index: int | slice) -> "TokenizedPair | TokenizedPairs":
        if isinstance(index, slice):
            return self._of(self._kept[index])
        line = int(self._kept[index])
        number = int(np.searchsorted(self._ends, line, side="right"))
        batch = self._batches[number]
        inner = line - (int(self._ends[number]) - len(batch))
        lists = {
            name: values[offsets[inner] : offsets[inner + 1]]
            for name, (offsets, values) in self._lists[number].items()
        }
        pair = TokenizedPair(str(batch["pair_id"][inner]), **lists)
        if pair_id(pair.prompt, pair.chosen, pair.rejected) != pair.pair_id:
            raise DataError(
                f"the prepared tokens of pair {pair.pair_id} changed on disk. Remove the prepared "
                f"data, {cache_directory() / 'data'}; it is made again."
            )
        return pair

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> "TokenizedPairs":
        """The pairs at these positions, in this order; losses are left behind."""
        return self._of(self._kept[np.asarray(indices, dtype=np.int64)])

    def _of(self, lines: NDArray[np.int64]) -> "TokenizedPairs":
        new = object.__new__(TokenizedPairs)
        new._batches, new._ends, new._lists = self._batches, self._ends, self._lists
        new._lines = new._kept = lines
        new._left_out = Counter()
        return new

    @cached_property
    def pair_ids(self) -> list[str]:
        """Content ids, in order."""
        return self.values("pair_id").tolist()

    @property
    def considered(self) -> int:
        """Pairs and pairless rows from which these were taken."""
        return len(self._lines) + sum(self._left_out.values())

    @cached_property
    def losses(self) -> Counter[str]:
        """Cause to number of pairs dropped or cut."""
        causes = self.raw("cause")[self._lines]
        return Counter(cause for cause in causes.tolist() if cause is not None) + self._left_out

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(N, 3) number of tokens of prompt, chosen and rejected."""
        names = ("prompt", "chosen", "rejected")
        columns = [self.of_lists(name, lambda offsets, _: np.diff(offsets)) for name in names]
        return np.stack(columns, axis=1).astype(np.int64)

    def of_lists(
        self, name: str, function: Callable[[NDArray[np.int32], TokenIds], NDArray[Any]]
    ) -> NDArray[Any]:
        """(N,) a number for each token list of a column, of the kept pairs.

        `function` is given (L + 1,) offsets and the tokens of L lists, one after another, and
        returns (L,) numbers. It is called for one file after another: all tokens are never copied.
        """
        parts = [function(*lists[name]) for lists in self._lists]
        return np.concatenate(parts)[self._kept] if parts else np.empty(0)

    def values(self, name: str) -> NDArray[Any]:
        """(N,) a column of the kept pairs; missing numbers are NaN."""
        return self.raw(name)[self._kept]

    def lines(self, columns: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Every line that was read, kept or not, as {column: value}."""
        table = {name: self.raw(name)[self._lines].tolist() for name in columns}
        for values in zip(*table.values(), strict=True):
            yield dict(zip(table, values, strict=True))

    def raw(self, name: str) -> NDArray[Any]:
        """A column of all lines of the tables; 0 or NaN where a number is missing."""
        filled = [
            batch[name].fill_null(0) if name in ("prompt_key", "oddities") else batch[name]
            for batch in self._batches
        ]
        parts = [column.to_numpy(zero_copy_only=False) for column in filled]
        return np.concatenate(parts) if parts else np.empty(0)

    def valid(self, name: str) -> NDArray[np.bool_]:
        """Which lines of the tables have a value in a column."""
        parts = [batch[name].is_valid().to_numpy(zero_copy_only=False) for batch in self._batches]
        return np.concatenate(parts) if parts else np.empty(0, dtype=bool)


def longer_rows(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) tokens of the prompt and the longer response: a pair's width in a padded batch.

    `lengths` (N, 3) are tokens of prompt, chosen and rejected.
    """
    return lengths[:, 0] + lengths[:, 1:].max(axis=1)


def write_table(path: Path, table: pa.Table) -> None:
    """An uncompressed Arrow file, so that reading maps it instead of copying it."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table.combine_chunks())


def map_table(path: Path) -> pa.Table:
    """A table whose columns stay on disk until they are touched. Raises pa.ArrowException."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _list_views(column: Any) -> tuple[NDArray[np.int32], TokenIds]:
    """(offsets, values) of a list column, without a copy. A null has no tokens."""
    offsets = column.offsets.to_numpy()
    return offsets, column.values.to_numpy()
