"""What `mallowspo eval compare` compares: runs, evaluations and seeds, found in directories."""

import glob
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mallowspo_cli.errors import EvalError, first_line
from mallowspo_cli.evaluation.outputs import (
    ANNOTATIONS,
    DISPERSION,
    GENERATIONS,
    JUDGEMENTS,
    Annotation,
    read_annotations,
)

PREFERENCES = "preferences_"


@dataclass(frozen=True)
class Found:
    """Where an evaluation lies."""

    place: Path
    name: str | None
    """Of its directory or data: what tells it from others of the same run."""
    one_of_several: bool
    """Whether it was found in a directory that may hold more of them, and not named itself."""


@dataclass(frozen=True)
class Evaluation(Found):
    """Judged answers of one model."""

    annotations: dict[str, Annotation]
    """By instruction; failed judgements included."""
    judge: str
    baseline: str
    settings: dict[str, Any]
    """What judgements.jsonl says of the judging; empty where there is none."""
    sampling: dict[str, Any]
    """What generations.jsonl says of the sampling; empty where there is none."""
    reference: str | None
    """The model behind the entropies."""
    entropies: dict[str, float]
    """Normalised entropy by instruction; empty where it is not known."""


@dataclass(frozen=True)
class Ranked(Found):
    """Held-out pairs as one model ranks them."""

    pairs: dict[tuple[str, int], tuple[str, float, float]]
    """(prompt, win, w) by pair id and by how often it was there before; w is NaN if unknown."""


@dataclass(frozen=True)
class Member:
    """One model: a training seed of a side, or all of it."""

    name: str
    place: Path
    evaluations: list[Evaluation]
    rankings: list[Ranked]


@dataclass(frozen=True)
class Side:
    """What is compared with the others: a model, or a configuration with its seeds."""

    word: str
    label: str
    members: list[Member]


def read_sides(words: Sequence[str]) -> list[Side]:
    """The sides that words name: each a directory, a file, or a pattern of several seeds.

    Raises:
        EvalError: nothing is there, or something that cannot be read.
    """
    sides = []
    for word, label in zip(words, short_names(words), strict=True):
        places = _places(word)
        names = short_names([str(place) for place in places])
        members = [_member(place, name) for place, name in zip(places, names, strict=True)]
        sides.append(Side(word, label, members))
    return sides


def short_names(words: Sequence[str]) -> list[str]:
    """Paths without the parts that all have in common at their start and end; all different."""
    parts = [
        [part for part in word.split("/") if part not in ("", ".")] or [word] for word in words
    ]
    for backwards in (False, True):
        while (
            all(len(p) > 1 for p in parts) and len({p[-1 if backwards else 0] for p in parts}) == 1
        ):
            parts = [p[:-1] if backwards else p[1:] for p in parts]
    names, seen = [], Counter[str]()
    for each in parts:
        name = "/".join(each)
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def _places(word: str) -> list[Path]:
    path = Path(word).expanduser()
    if path.exists():
        return [path]
    if not any(mark in word for mark in "*?["):
        raise EvalError(f"nothing is at {word}. Name a run, an evaluation's directory or a file.")
    found = sorted(glob.glob(os.path.expanduser(word)), key=_in_order)
    if not found:
        raise EvalError(f"nothing matches {word}. `ls {word}` shows what there is.")
    return [Path(place) for place in found]


def _in_order(text: str) -> list[tuple[int, int, str]]:
    """seed2 before seed10."""
    words = "".join(c if c.isdecimal() else f"\0{c}\0" for c in text).split("\0")
    return [(0, int(w), "") if w.isdecimal() else (1, 0, w) for w in words if w]


def _member(place: Path, name: str) -> Member:
    if place.is_file():
        if place.suffix == ".parquet":
            return Member(name, place, [], [read_pairs(place)])
        return Member(name, place, [read_evaluation(place)], [])
    if (place / ANNOTATIONS).is_file():
        return Member(name, place, [read_evaluation(place / ANNOTATIONS)], [])
    root = place / "evaluations"
    if not root.is_dir():
        # That of evaluations itself, or of one at several temperatures.
        root = place
    annotated = sorted([*root.glob(f"*/{ANNOTATIONS}"), *root.glob(f"*/*/{ANNOTATIONS}")])
    ranked = sorted(root.glob(f"{PREFERENCES}*.parquet"))
    if not annotated and not ranked:
        old = " (its preferences_*.json is of an older version)" * any(root.glob("pref*.json"))
        raise EvalError(
            f"{place} holds no {ANNOTATIONS} and no {PREFERENCES}*.parquet{old}. Evaluate it "
            f"first: mallowspo eval alpacaeval model={place}, or eval preferences model={place}"
        )
    evaluations = [read_evaluation(path, root) for path in annotated]
    return Member(name, place, evaluations, [read_pairs(path, root) for path in ranked])


def read_evaluation(path: Path, root: Path | None = None) -> Evaluation:
    """An annotations.json and what lies beside it.

    Args:
        root: the directory that was named, where it holds several.

    Raises:
        EvalError: it cannot be read, or holds judgements of several judges.
    """
    rows = read_annotations(path)
    judges = sorted({row.annotator for row in rows})
    if len(judges) > 1:
        raise EvalError(f"{path} holds judgements of {', '.join(judges)}; expected one judge's.")
    directory = path.parent
    found = _object(directory / DISPERSION)
    return Evaluation(
        place=path,
        name=directory.name if root is None else directory.relative_to(root).as_posix(),
        one_of_several=root is not None,
        annotations={row.instruction: row for row in rows},
        judge=judges[0],
        baseline=", ".join(sorted({row.generator_1 for row in rows})),
        settings=_header(directory / JUDGEMENTS),
        sampling=_header(directory / GENERATIONS),
        reference=found.get("reference"),
        entropies=_entropies(found, directory / DISPERSION),
    )


def read_pairs(path: Path, root: Path | None = None) -> Ranked:
    """A parquet file of `mallowspo eval preferences`; `root` as in `read_evaluation`.

    Raises:
        EvalError: it cannot be read, lacks a column, or has a win that is not within 0 to 1.
    """
    columns = ("pair_id", "prompt", "win", "weight")
    try:
        table = pq.read_table(path, columns=list(columns))
        ids, prompts, wins, weights = (table.column(name).to_pylist() for name in columns)
        numbers = [float(win) for win in wins]
        known = [math.nan if weight is None else float(weight) for weight in weights]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise EvalError(
            f"{path} is no table of pairs ({first_line(error)}); expected what `mallowspo eval "
            "preferences` writes."
        ) from error
    if not ids:
        raise EvalError(f"{path} holds no pair.")
    # NaN is in no range.
    if wrong := [row for row, win in enumerate(numbers) if not 0 <= win <= 1]:
        raise EvalError(
            f"{path}: 'win' is {numbers[wrong[0]]:g} for {len(wrong)} of {len(ids)} pairs, such as "
            f"{ids[wrong[0]]}; expected 0 to 1. Write it anew: mallowspo eval preferences."
        )
    seen: Counter[str] = Counter()
    pairs = {}
    for pair_id, *values in zip(ids, prompts, numbers, known, strict=True):
        pairs[pair_id, seen[pair_id]] = tuple(values)
        seen[pair_id] += 1
    name = path.stem.removeprefix(PREFERENCES) if path.stem.startswith(PREFERENCES) else None
    return Ranked(path, name, root is not None, pairs)


def _entropies(found: dict[str, Any], path: Path) -> dict[str, float]:
    entropies = found.get("entropy", {})
    known = entropies if isinstance(entropies, dict) else {"": entropies}
    known = {text: value for text, value in known.items() if value is not None}
    if not all(isinstance(value, float | int) and 0 < value <= 1 for value in known.values()):
        raise EvalError(f"{path}: expected an entropy above 0, up to 1, by instruction.")
    return known


def _header(path: Path) -> dict[str, Any]:
    """The first line of a journal, which says how its results were made."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        return _parsed(file.readline(), path)


def _object(path: Path) -> dict[str, Any]:
    return _parsed(path.read_bytes(), path) if path.is_file() else {}


def _parsed(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise EvalError(f"{path} is no JSON: {first_line(error)}.") from error
    if not isinstance(value, dict):
        raise EvalError(f"{path}: expected an object.")
    return value
