"""From rows to pairs, and which of them belong to a split: held out, capped, mixed by weight."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mallowspo_cli.data.formats import Format, Row, choose_format
from mallowspo_cli.data.pairs import PreferencePair
from mallowspo_cli.data.sources import Source, open_sources, read_rows
from mallowspo_cli.data.tokenize import Item, prompt_key
from mallowspo_cli.errors import DataError
from mallowspo_cli.recipe.choices import OnError
from mallowspo_cli.recipe.nearest import nearest
from mallowspo_cli.recipe.schema import DatasetConfig

HELD_OUT_SEED = 0
"""Of the shuffle that picks held-out prompts, and of the draw that a mixture makes. Not the
recipe's: runs of another seed, and later evaluations, hold out the same pairs."""


def load_pairs(config: DatasetConfig, split: str) -> list[PreferencePair]:
    """The pairs of `split`, which is "train" or "eval", in the data's order, all in memory.

    Without an eval split of its own, whole prompts of the training split are held out until they
    have `eval_size` pairs: pairs of one prompt never stand on both sides.

    Raises:
        DataError: nothing there, no rows, a row that is no pair; names the place.
    """
    if not has_split(config, split):
        return []
    sources = open_sources(config, split)
    items = [
        [item for _, item, _ in read_items(source, config, None, 0, None)] for source in sources
    ]
    every = [item for part in items for item in part]
    for item in every:
        if isinstance(item, DataError) and config.on_error is OnError.stop:
            raise item
    keys = [prompt_key(i.prompt) if isinstance(i, PreferencePair) else None for i in every]
    known = np.asarray([key is not None for key in keys], dtype=bool)
    numbers = np.asarray([key or 0 for key in keys], dtype=np.int64)
    sizes = [len(part) for part in items]
    lines, _ = split_lines(config, split, sources, sizes, numbers, known, known)
    return [item for line in lines if isinstance(item := every[line], PreferencePair)]


def has_split(config: DatasetConfig, split: str) -> bool:
    """Whether there is anything in the split."""
    own = [config.eval_split, *(part.eval_split for part in config.parts.values())]
    return split == "train" or any(own) or config.eval_size > 0


def read_items(
    source: Source, config: DatasetConfig, column: str | None, start: int, stop: int | None
) -> Iterator[tuple[int, Item, float]]:
    """(row number, pair or why there is none, number in `column`) of rows `start` to `stop`.

    A row may give several pairs, or none. Raises DataError: no rows, or a layout that is not known.
    """
    data = source.load()
    to_pairs = layout_of(source)
    if column is not None and column not in data.column_names:
        raise DataError(
            f"{source.name} has no column '{column}' (dispersion.column)."
            f"{nearest(column, data.column_names)} It has: {', '.join(data.column_names)}."
        )
    stop = len(data) if stop is None else min(stop, len(data))
    for index, row in enumerate(read_rows(data, source.name, start, stop), start):
        for item, number in _row_items(row, f"{source.name} row {index}", to_pairs, config, column):
            yield index, item, number


def layout_of(source: Source) -> Format:
    """The source's layout, told from its first row where it is not named.

    Raises:
        DataError: no rows, or a layout that is not known.
    """
    data = source.load()
    if len(data) == 0:
        raise DataError(f"{source.name} holds no rows.")
    return choose_format(source.format, read_rows(data, source.name, 0, 1)[0], source.name)


def _row_items(
    row: Row, where: str, to_pairs: Format, config: DatasetConfig, column: str | None
) -> Iterator[tuple[Item, float]]:
    try:
        number = _number(row, column, where) if column is not None else np.nan
        for item in to_pairs(row, where, config):
            yield item, number
    except DataError as error:
        yield error, np.nan


def _number(row: Row, column: str, where: str) -> float:
    """The number; NaN where the row has none, which gives its pairs w = 1."""
    value = row.get(column)
    if value is None:
        return np.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: dispersion.column={column} is {value!r}; expected a number.")
    return float(value)


def split_lines(
    config: DatasetConfig,
    split: str,
    sources: Sequence[Source],
    sizes: Sequence[int],
    keys: NDArray[np.int64],
    known: NDArray[np.bool_],
    usable: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], Counter[str]]:
    """Positions, in order, of the lines that belong to a split; and pairs left out, by cause.

    Args:
        sources: the split's sources; lines of the first come first.
        sizes: number of lines of each.
        keys: (N,) the prompt's key of each line, where `known`.
        usable: (N,) whether the line's pair can be scored. Caps and mixtures count these alone.

    Raises:
        DataError: nothing is left to train on.
    """
    part = np.repeat(np.arange(len(sources)), sizes)
    shared = np.asarray([source.shared for source in sources], dtype=bool)[part]
    taken = np.ones(len(keys), dtype=bool)
    left_out: Counter[str] = Counter()
    if bool(shared.any()):
        held = _held_out_prompts(keys[shared & known], config.eval_size)
        inside = np.isin(keys, list(held)) & known
        taken[shared] = inside[shared] == (split == "eval")
    if config.max_pairs_per_prompt is not None:
        most = config.max_pairs_per_prompt
        within = _first_of_prompt(keys, usable & taken, most) | ~usable
        left_out[f"dropped: more than {most} pairs of a prompt"] = int((taken & ~within).sum())
        taken &= within
    if split == "train" and len(sources) > 1:
        drawn = _mixed(part, [s.weight for s in sources], usable & taken) | ~usable
        left_out["dropped: beyond the mixture's weights"] = int((taken & ~drawn).sum())
        taken &= drawn
    return np.flatnonzero(taken), +left_out


def _held_out_prompts(keys: NDArray[np.int64], eval_size: int) -> set[int]:
    """Prompts at the end of a shuffle that together have at least `eval_size` pairs."""
    counts = Counter(keys.tolist())
    prompts = list(counts)
    random.Random(HELD_OUT_SEED).shuffle(prompts)
    held_out: set[int] = set()
    size = 0
    while size < eval_size and prompts:
        size += counts[prompts[-1]]
        held_out.add(prompts.pop())
    if not prompts:
        raise DataError(
            f"dataset.eval_size={eval_size} leaves none of {len(keys)} pairs "
            f"({len(counts)} prompts) to train on. Set it lower."
        )
    return held_out


def _first_of_prompt(
    keys: NDArray[np.int64], lines: NDArray[np.bool_], count: int
) -> NDArray[np.bool_]:
    """The first `count` of `lines` of each prompt."""
    seen: Counter[int] = Counter()
    first = np.zeros(len(keys), dtype=bool)
    for index in np.flatnonzero(lines).tolist():
        key = int(keys[index])
        first[index] = seen[key] < count
        seen[key] += 1
    return first


def _mixed(
    part: NDArray[np.int64], weights: Sequence[float], usable: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Usable lines in proportion to the parts' weights, as many as there can be without repeats."""
    sizes = [int((usable & (part == index)).sum()) for index in range(len(weights))]
    total = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    drawn = np.zeros(len(part), dtype=bool)
    for index, weight in enumerate(weights):
        lines = np.flatnonzero(usable & (part == index))
        order = np.random.default_rng(HELD_OUT_SEED).permutation(len(lines))
        drawn[lines[order[: round(total * weight)]]] = True
    return drawn
