"""Preparation: every row of a split tokenised once, into files that later runs map into memory."""

import hashlib
import json
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.data.dataset import has_split, layout_of, read_items, split_lines
from mallowspo_cli.data.formats import format_name
from mallowspo_cli.data.sources import Source, open_sources
from mallowspo_cli.data.table import SCHEMA, TokenizedPairs, map_table, write_table
from mallowspo_cli.data.tokenize import (
    BATCH_PAIRS,
    check_losses,
    stop_at_broken,
    tokenize_items,
)
from mallowspo_cli.distributed import log, progress
from mallowspo_cli.errors import first_line
from mallowspo_cli.files import cache_directory, make_directory, whole_file, write_json
from mallowspo_cli.recipe.schema import DatasetConfig

VERSION = 1
"""Of the files' layout and of the tokenisation rule."""
ROWS_PER_SHARD = 1024
"""Rows of the data in one file: what a killed preparation can lose."""
TOKENISATION_KEYS = (
    *("max_length", "max_prompt_length", "truncation", "header_in_response"),
    *("pairing", "min_score_ratio", "min_score_gap"),
)
"""Keys of the data set that change a pair's tokens, or which pairs a row gives."""


@dataclass(frozen=True)
class PreparedSplit:
    """A split, ready to score."""

    pairs: TokenizedPairs
    rows: int
    """Rows of the data."""
    read: int
    """Rows that were read: fewer under a limit."""
    layouts: dict[str, str]
    """Source name to layout."""
    part_names: list[str]
    """Name of each part of a mixture, in order; one empty name otherwise."""
    parts: np.ndarray[Any, np.dtype[np.int64]]
    """(N,) which part each pair is of."""


def prepare_split(
    config: DatasetConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    column: str | None = None,
    limit: int | None = None,
    keep_empty: bool = False,
) -> PreparedSplit | None:
    """The pairs of `split` ("train" or "eval"); None where it has none.

    Args:
        column: column of the data whose number is kept for each pair.
        limit: take only the first so many rows, in memory.
        keep_empty: return a split of which no pair is left, with what became of its rows.

    Raises:
        DataError: data that cannot be read, a row that is no pair (unless `config.on_error` is
            drop), or no pair left (unless `keep_empty`).
    """
    if limit is not None:
        config = replace(config, eval_size=min(config.eval_size, limit // 4))
    if not has_split(config, split):
        return None
    sources = open_sources(config, split)
    found = [_prepared(source, tokenizer, config, column, limit) for source in sources]
    tables = [table for source in found for table in source.tables]
    every = TokenizedPairs(tables)
    check = stop_at_broken if keep_empty else check_losses
    check(every, config)
    sizes = [sum(len(table) for table in source.tables) for source in found]
    keys, usable = every.raw("prompt_key"), every.valid("pair_id")
    known = every.valid("prompt_key")
    lines, left_out = split_lines(config, split, sources, sizes, keys, known, usable)
    pairs = TokenizedPairs(tables, lines, left_out)
    check(pairs, config)
    parts = np.repeat(np.arange(len(sources)), sizes)[lines[usable[lines]]]
    rows, read = sum(source.rows for source in found), sum(source.read for source in found)
    layouts = {source.name: each.layout for source, each in zip(sources, found, strict=True)}
    return PreparedSplit(pairs, rows, read, layouts, [source.part for source in sources], parts)


@dataclass(frozen=True)
class _Tables:
    tables: list[pa.Table]
    rows: int
    read: int
    layout: str


def _prepared(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    config: DatasetConfig,
    column: str | None,
    limit: int | None,
) -> _Tables:
    """A source's tables, from its files where they are there, else made now."""
    if limit is not None:
        items = list(read_items(source, config, column, 0, limit))
        rows = len(source.load())
        table = tokenize_items(items, tokenizer, config)
        return _Tables([table], rows, min(limit, rows), format_name(layout_of(source)))
    place = prepared_path(source, tokenizer, config, column)
    if ready := _open(place):
        return ready
    make_directory(place, "prepared data")
    layout, rows = format_name(layout_of(source)), len(source.load())
    with progress(f"preparing {source.name}", rows, "rows") as advance:
        for start in range(0, rows, ROWS_PER_SHARD):
            file = place / f"pairs-{start:09d}.arrow"
            if not file.is_file():
                stop = start + ROWS_PER_SHARD
                items = read_items(source, config, column, start, stop)
                # A row can give many pairs: no more of them at a time than the tokenizer works on.
                batches = iter(lambda items=items: list(islice(items, BATCH_PAIRS)), [])
                parts = [tokenize_items(batch, tokenizer, config) for batch in batches]
                table = pa.concat_tables(parts or [SCHEMA.empty_table()])
                stop_at_broken(TokenizedPairs([table]), config)
                with whole_file(file) as temporary:
                    write_table(temporary, table)
            advance(min(ROWS_PER_SHARD, rows - start))
    sizes = {file.name: file.stat().st_size for file in sorted(place.glob("pairs-*.arrow"))}
    manifest = {"source": source.name, "rows": rows, "layout": layout, "files": sizes}
    write_json(place / "manifest.json", manifest)
    ready = _open(place)
    assert ready is not None
    return ready


def _open(place: Path) -> _Tables | None:
    """Finished files; None where there are none, or where one of them is not whole."""
    file = place / "manifest.json"
    if not file.is_file():
        return None
    manifest = json.loads(file.read_text())
    for name, size in manifest["files"].items():
        if not (place / name).is_file() or (place / name).stat().st_size != size:
            log.info("prepared data: %s is damaged and is made again", place / name)
            (place / name).unlink(missing_ok=True)
            file.unlink()
            return None
    try:
        tables = [map_table(place / name) for name in sorted(manifest["files"])]
    except pa.ArrowException as error:
        log.info("prepared data: %s is damaged (%s) and is made again", place, first_line(error))
        for name in ("manifest.json", *manifest["files"]):
            (place / name).unlink(missing_ok=True)
        return None
    return _Tables(tables, manifest["rows"], manifest["rows"], manifest["layout"])


def prepared_path(
    source: Source, tokenizer: PreTrainedTokenizerBase, config: DatasetConfig, column: str | None
) -> Path:
    """Where a source's files lie: named by content, layout, limits, tokenizer and template."""
    backend = tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]
    values = {
        "name": source.name,
        "content": source.digest(),
        "format": source.format,
        "column": column,
        "tokenizer": hashlib.blake2b(backend.encode(), digest_size=16).hexdigest(),
        "template": str(tokenizer.chat_template),
        "special": sorted(map(str, tokenizer.special_tokens_map.items())),
        **{key: str(getattr(config, key)) for key in TOKENISATION_KEYS},
    }
    text = json.dumps(values, sort_keys=True)
    key = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    return cache_directory() / "data" / f"v{VERSION}-{key}"
