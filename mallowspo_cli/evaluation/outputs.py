"""Instructions, answers and judgements in the files of AlpacaEval (its names and its schema)."""

import gzip
import json
import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mallowspo_cli.errors import EvalError, first_line

GENERATIONS, GENERATION, OUTPUTS = "generations.jsonl", "generation.json", "model_outputs.json"
JUDGEMENTS, JUDGE, ANNOTATIONS = "judgements.jsonl", "judge.json", "annotations.json"
SUMMARY, DISPERSION = "summary.json", "dispersion.json"
"""Files of an evaluation's directory."""
BASE_WINS, DRAW, MODEL_WINS = 1.0, 1.5, 2.0
"""Ends and middle of `Annotation.preference`."""


@dataclass(frozen=True)
class Output:
    """An instruction and a model's answer: a row of model_outputs.json."""

    instruction: str
    output: str
    generator: str
    dataset: str = ""


@dataclass(frozen=True)
class Annotation:
    """A judged pair of answers: a row of annotations.json."""

    instruction: str
    output_1: str
    generator_1: str
    """The baseline."""
    output_2: str
    generator_2: str
    """The model."""
    annotator: str
    preference: float
    """1 where the baseline's answer is better, 2 where the model's is, between them by the judge's
    probability; NaN where the judge failed."""
    dataset: str = ""
    raw_completion: Any = None
    price_per_example: float | None = None
    """US dollars."""
    time_per_example: float | None = None
    """Seconds."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values; a failed judgement's preference is None."""
        row = asdict(self)
        row["preference"] = None if math.isnan(self.preference) else self.preference
        return row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list or of JSON lines, plain or gzipped.

    Raises:
        EvalError: no such file, or another content.
    """
    text = _text(path)
    try:
        if text.lstrip()[:1] == "[":
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise EvalError(f"{path} is no JSON: {first_line(error)}.") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise EvalError(f"{path}: expected a list of objects, and at least one.")
    return rows


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        EvalError: no such file, or another content.
    """
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise EvalError(f"{path} is no JSON: {first_line(error)}.") from error
    if not isinstance(value, dict):
        raise EvalError(f"{path}: expected an object.")
    return value


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise EvalError(f"cannot read {path}: {first_line(error)}.") from error


def read_outputs(path: Path, generator: str | None = None) -> list[Output]:
    """The rows of a model_outputs.json.

    Args:
        generator: the name of what answered, where the rows have none.

    Raises:
        EvalError: a field is missing, or an instruction is there twice.
    """
    rows = read_rows(path)
    fill = {"generator": generator or path.parent.name or path.stem}
    found = [Output(**_texts(row, Output, path, number, fill)) for number, row in enumerate(rows)]
    unique_instructions([row.instruction for row in found], str(path))
    return found


def read_annotations(path: Path) -> list[Annotation]:
    """The rows of an annotations.json, AlpacaEval's own included.

    Raises:
        EvalError: a field is missing, a preference out of range, or an instruction there twice.
    """
    found = []
    for number, row in enumerate(read_rows(path)):
        texts = _texts(row, Annotation, path, number, {"annotator": "unknown"})
        others: dict[str, Any] = {
            key: row.get(key) for key in ("raw_completion", "price_per_example", "time_per_example")
        }
        preference = _preference(row.get("preference"), path, number)
        found.append(Annotation(preference=preference, **texts, **others))
    unique_instructions([row.instruction for row in found], str(path))
    return found


def unique_instructions(instructions: Sequence[str], where: str) -> None:
    """Refuse a set in which answers could not be told apart by their instruction.

    Raises:
        EvalError: one is there twice.
    """
    text, count = Counter(instructions).most_common(1)[0]
    if count > 1:
        raise EvalError(
            f"{where}: the instruction {text[:60]!r} is there {count} times. Answers are joined by "
            "instruction, so each may be there once."
        )


def _texts(
    row: dict[str, Any], kind: type, path: Path, number: int, fill: dict[str, str]
) -> dict[str, Any]:
    """The fields of `row` that are texts."""
    texts: dict[str, Any] = {}
    for field in fields(kind):
        if field.type is not str:
            continue
        value = row.get(field.name)
        if value is None:
            value = fill.get(field.name, "" if field.name == "dataset" else None)
        if not isinstance(value, str):
            raise EvalError(
                f"{path} row {number}: {field.name!r} is {_kind(value)}; expected a text. It has: "
                f"{', '.join(sorted(row))}."
            )
        texts[field.name] = printable(value)
    return texts


def printable(text: str) -> str:
    """The text with what UTF-8 cannot hold (half of a surrogate pair) replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _preference(value: Any, path: Path, number: int) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EvalError(f"{path} row {number}: preference is {_kind(value)}; expected a number.")
    # 0 is an older way to write a draw.
    number_ = DRAW if value == 0 else float(value)
    if not math.isnan(number_) and not BASE_WINS <= number_ <= MODEL_WINS:
        raise EvalError(f"{path} row {number}: preference is {value:g}; expected 1 to 2.")
    return number_


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
