"""The CSV files that length control needs: gamed judgements, and columns in general."""

import csv
import gzip
import io
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mallowspo_cli.errors import EvalError, first_line

NO_NUMBER = ("", "NA", "nan", "NaN")
"""How a missing number is written."""


@dataclass(frozen=True)
class Gamed:
    """Judgements of the baseline's long- and short-winded twins: AlpacaEval's df_gamed.csv."""

    index: NDArray[np.int64]
    """(G,) number of the instruction in the set."""
    preference: NDArray[np.float64]
    """(G,) in [0, 1], NaN where the judge failed."""
    std_delta_len: NDArray[np.float64]
    """(G,) length of the baseline's answer less the twin's, in its standard deviations."""
    instruction_difficulty: NDArray[np.float64]
    """(G,)"""


def read_gamed(path: Path) -> Gamed:
    """Read df_gamed.csv, plain or gzipped.

    Raises:
        EvalError: a column is missing, a field is no number or out of range.
    """
    names = ("index", "preference", "std_delta_len", "instruction_difficulty")
    columns = read_columns(path, names)
    preference = numbers(columns, "preference", path, missing=True)
    if ((preference < 0) | (preference > 1)).any():
        row = int(np.argmax((preference < 0) | (preference > 1)))
        raise EvalError(
            f"{path} row {row}: 'preference' is {preference[row]:g}; expected 0 to 1 (a preference "
            "of 1 to 2, less 1)."
        )
    if any(
        text.strip() not in ("False", "0", "0.0") for text in columns.get("not_gamed_baseline", [])
    ):
        raise EvalError(
            f"{path}: 'not_gamed_baseline' is not False everywhere; expected gamed rows alone."
        )
    return Gamed(
        row_numbers(columns, "index", path),
        preference,
        numbers(columns, "std_delta_len", path),
        numbers(columns, "instruction_difficulty", path),
    )


def read_columns(path: Path, required: Sequence[str]) -> dict[str, list[str]]:
    """Every column of a CSV file with a head, plain or gzipped, as texts.

    Raises:
        EvalError: no such file, no CSV, no row, or a column of `required` is missing.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        head, *rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise EvalError(f"cannot read {path}: {first_line(error)}.") from error
    except ValueError as error:
        raise EvalError(f"{path} is empty; expected a CSV file with a head.") from error
    if missing := [name for name in required if name not in head]:
        raise EvalError(
            f"{path} has no column {', '.join(map(repr, missing))}. It has: "
            f"{', '.join(map(repr, head))}."
        )
    rows = [row for row in rows if row]
    if not rows:
        raise EvalError(f"{path} has a head and no rows.")
    for number, row in enumerate(rows):
        if len(row) != len(head):
            raise EvalError(f"{path} row {number}: {len(row)} fields; expected {len(head)}.")
    return {name: [row[place] for row in rows] for place, name in enumerate(head)}


def numbers(
    columns: dict[str, list[str]], name: str, path: Path, *, missing: bool = False
) -> NDArray[np.float64]:
    """A column as (rows,) finite numbers; with `missing`, an empty field is NaN.

    Raises:
        EvalError: a field is no number.
    """
    found = np.empty(len(columns[name]))
    for row, text in enumerate(columns[name]):
        try:
            value = math.nan if missing and text.strip() in NO_NUMBER else float(text)
        except ValueError:
            value = math.inf
        if math.isinf(value) or (math.isnan(value) and not missing):
            raise EvalError(f"{path} row {row}: {name!r} is {text[:40]!r}; expected a number.")
        found[row] = value
    return found


def row_numbers(columns: dict[str, list[str]], name: str, path: Path) -> NDArray[np.int64]:
    """A column as (rows,) whole numbers from 0.

    Raises:
        EvalError: a field is no such number.
    """
    found = numbers(columns, name, path)
    wrong = (found < 0) | (found != np.floor(found)) | (found > 2**53)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise EvalError(
            f"{path} row {row}: {name!r} is {columns[name][row][:40]!r}; expected 0, 1, 2..."
        )
    return found.astype(np.int64)
