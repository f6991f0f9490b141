"""Which difficulty belongs to which instruction.

AlpacaEval's CSV files number the instructions and do not quote them, and alpaca_eval looks a
difficulty up by the row of the annotation: wrong, without a word, for a shuffled file or a part of
one. Here an instruction finds its number by its text.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.win_rates.calibration import numbers, read_columns, row_numbers

OFFICIAL_ORDER = Path(__file__).parent / "alpaca_order.txt"
"""Digests of AlpacaEval's 805 instructions in their order, made by scripts/record_alpaca_order.py.
214 of its 227 published model_outputs.json have this order, the others lack rows or are shuffled;
so have 129 of the 135 annotations.json looked at, the others lack rows."""

AGREE = 1e-6
VALUE, TEXT = "instruction_difficulty", "instruction"


@dataclass(frozen=True)
class Difficulty:
    """Difficulties of the instructions asked for, and how they were found."""

    values: NDArray[np.float64]
    """(N,)"""
    position: NDArray[np.int64]
    """(N,) numbers of the instructions in their set."""
    joined_by: str
    """A sentence for reports."""
    by_position: bool = False
    """Whether it was only assumed that the instructions are in the order of the set."""


@dataclass(frozen=True)
class _Table:
    """The difficulties of a file."""

    path: Path
    value_of: dict[int, float]
    """By the instruction's number."""
    number_of: dict[str, int]
    """By the instruction's text; empty where the file does not have them."""


def difficulty_of(
    instructions: Sequence[str],
    difficulty_file: Path | None,
    gamed_file: Path | None,
    order: Sequence[str] | None = None,
) -> Difficulty:
    """Look up the difficulty of each instruction.

    A number is found by, in turn: a column `instruction` of the file; the official order of
    AlpacaEval, where it has all the instructions and the file its 805 rows; `order`, where it is as
    long as the file. Where no instruction is known at all, and there are as many as rows in the
    file, row i gets difficulty i, as in alpaca_eval.

    Args:
        instructions: (N,), in any order.
        difficulty_file: a CSV file with `instruction_difficulty`, and with `index` (or a first
            column without a name) or `instruction`.
        gamed_file: df_gamed.csv, whose difficulties serve where there is no `difficulty_file`.
        order: the instructions of the set, in the order of the file.

    Raises:
        EvalError: an instruction cannot be found, or the two files disagree.
    """
    table = _table(difficulty_file, gamed_file)
    number_of, joined_by = _link(instructions, table, order)
    by_position = number_of is None
    found = [row if number_of is None else number_of[text] for row, text in enumerate(instructions)]
    values = np.asarray([table.value_of[number] for number in found], dtype=np.float64)
    return Difficulty(values, np.asarray(found, dtype=np.int64), joined_by, by_position)


def is_official(instructions: Sequence[str]) -> bool:
    """Whether all of them are AlpacaEval's."""
    return len(_official_numbers(instructions)) == len(set(instructions))


def digest(instruction: str) -> str:
    """What stands for an instruction in `OFFICIAL_ORDER`."""
    return hashlib.blake2b(instruction.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _link(
    instructions: Sequence[str], table: _Table, order: Sequence[str] | None
) -> tuple[dict[str, int] | None, str]:
    """Numbers by instruction (None: its row), and a sentence that says how they were found."""
    if table.number_of:
        told = f"the column {TEXT!r} of {table.path}"
        _all_known(instructions, table.number_of, table, told)
        return table.number_of, f"Difficulties are joined by instruction, by {told}."
    official = _official_numbers(instructions)
    places = OFFICIAL_ORDER.read_text().split()
    if all(text in official for text in instructions) and _numbered_to(table, len(places)):
        return official, "Difficulties are joined by instruction, in AlpacaEval's official order."
    if order is not None:
        if not _numbered_to(table, len(order)):
            raise EvalError(
                f"the instructions file has {len(order)} instructions, and {table.path} "
                f"{len(table.value_of)} difficulties: they are not of the same set, so no "
                f"difficulty can be told. Give the files of one set, or add a column {TEXT!r}."
            )
        numbers_ = {text: number for number, text in enumerate(order)}
        _all_known(instructions, numbers_, table, "the instructions file")
        return numbers_, "Difficulties are joined by instruction, in the instructions file's order."
    moved = any(official.get(text, row) != row for row, text in enumerate(instructions))
    if moved or not _numbered_to(table, len(instructions)):
        _all_known(instructions, official, table, "AlpacaEval's official set")
        raise EvalError(
            f"{table.path} has {len(table.value_of)} difficulties; expected one for each of "
            f"AlpacaEval's {len(places)} instructions. Give the whole file, or instructions=FILE "
            "with the instructions in its order."
        )
    return None, (
        "DIFFICULTIES ARE JOINED BY POSITION, as in alpaca_eval: row i of the annotations has "
        f"difficulty i of {table.path}, which is wrong if the annotations are shuffled. To join by "
        "instruction, give instructions=FILE with the instructions in the order of that file."
    )


def _all_known(
    instructions: Sequence[str], numbers_: dict[str, int], table: _Table, where: str
) -> None:
    unknown = [text for text in instructions if text not in numbers_]
    if unknown:
        raise EvalError(
            f"{len(unknown)} of {len(instructions)} instructions are not in {where}, so their "
            f"difficulty is unknown, such as {unknown[0][:60]!r}. Give instructions=FILE with the "
            f"instructions in the order of {table.path}, or add a column {TEXT!r} to that file."
        )


def _official_numbers(instructions: Sequence[str]) -> dict[str, int]:
    """Numbers of those that are AlpacaEval's."""
    numbers_ = {line: row for row, line in enumerate(OFFICIAL_ORDER.read_text().split())}
    found = ((text, numbers_.get(digest(text))) for text in instructions)
    return {text: number for text, number in found if number is not None}


def _numbered_to(table: _Table, count: int) -> bool:
    """Whether the file has the numbers 0 to `count` - 1 and no other."""
    return len(table.value_of) == count and max(table.value_of) == count - 1


def _table(difficulty_file: Path | None, gamed_file: Path | None) -> _Table:
    """The difficulties of the first, checked against the second; or of the second alone."""
    assert difficulty_file is not None or gamed_file is not None
    gamed = None if gamed_file is None else _read(gamed_file, repeated=True)
    if difficulty_file is None:
        assert gamed is not None
        return gamed
    table = _read(difficulty_file, repeated=False)
    if gamed is None or table.number_of:
        return table
    for number, value in table.value_of.items():
        other = gamed.value_of.get(number, value)
        if abs(other - value) > AGREE:
            raise EvalError(
                f"the difficulty of instruction {number} is {value:g} in {difficulty_file} and "
                f"{other:g} in {gamed_file}: they are not of the same set. Give files that belong "
                f"together, or add a column {TEXT!r} to the first."
            )
    return table


def _read(path: Path, *, repeated: bool) -> _Table:
    """A file's difficulties.

    Args:
        repeated: whether an instruction may have several rows, of which the first counts.
    """
    columns = read_columns(path, [VALUE])
    values = numbers(columns, VALUE, path).tolist()
    key = next((name for name in ("index", "") if name in columns), None)
    if key is None and TEXT not in columns:
        raise EvalError(f"{path} has no column 'index' or {TEXT!r}; expected one of them.")
    texts = columns.get(TEXT)
    order = range(len(values)) if key is None else row_numbers(columns, key, path).tolist()
    value_of: dict[int, float] = {}
    number_of: dict[str, int] = {}
    for row, (number, value) in enumerate(zip(order, values, strict=True)):
        if number in value_of or (texts is not None and texts[row] in number_of):
            if repeated:
                continue
            raise EvalError(f"{path} row {row}: the instruction is there twice.")
        value_of[number] = value
        if texts is not None:
            number_of[texts[row]] = number
    return _Table(path, value_of, number_of)
