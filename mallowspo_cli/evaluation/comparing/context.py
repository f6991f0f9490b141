"""What all comparisons are computed with: resampling, length control, the prompts' entropies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.comparing.lengths import Calibration, LengthFiles, read_calibration
from mallowspo_cli.evaluation.comparing.matching import Match
from mallowspo_cli.evaluation.comparing.metrics import Resampling
from mallowspo_cli.evaluation.comparing.sides import Evaluation, Side
from mallowspo_cli.evaluation.outputs import DISPERSION
from mallowspo_cli.evaluation.win_rates.difficulty import is_official

AGREE = 0.01
"""Entropies, or weights w, of the same text that differ by more (relative) are not the same."""


@dataclass(frozen=True)
class Context:
    """What all metrics are computed with."""

    sides: Sequence[Side]
    resampling: Resampling
    lengths: LengthFiles | None
    entropies: Mapping[tuple[str, str], float]
    """By instruction and the baseline's answer."""
    notes: list[str]
    """Of what is not compared, and why; grows."""


def labels_of(context: Context, match: Match[Any], pair: tuple[int, int]) -> str:
    """Which sides a note is about, and on what."""
    labels = " and ".join(context.sides[index].label for index in pair)
    return f"{labels}{f' on {match.title}' if match.title else ''}"


def calibration_of(context: Context, match: Match[Evaluation]) -> Calibration | None:
    """Difficulties of all instructions of a match; None without files, or where they do not fit."""
    if context.lengths is None:
        return None
    texts = {t: None for of in match.of.values() for e in of.values() for t in e.annotations}
    if context.lengths.official_only and not is_official(list(texts)):
        return None
    try:
        return read_calibration(context.lengths, list(texts))
    except EvalError as error:
        context.notes.append(
            f"{match.title or 'the evaluation'}: length control without difficulties: {error}"
        )
        return None


def read_entropies(
    sides: Sequence[Side], notes: list[str]
) -> tuple[str | None, dict[tuple[str, str], float]]:
    """Entropies under the first reference model that any evaluation names.

    They are of a baseline's answers: another baseline has others for the same instructions.
    """
    found: dict[tuple[str, str], float] = {}
    known = [e for s in sides for m in s.members for e in m.evaluations if e.entropies]
    for evaluation in known:
        file = evaluation.place.parent / DISPERSION
        if evaluation.reference != known[0].reference:
            notes.append(
                f"{file} is not used: its entropies are of {evaluation.reference}, others of "
                f"{known[0].reference}."
            )
            continue
        differ = 0
        for text, value in evaluation.entropies.items():
            if row := evaluation.annotations.get(text):
                first = found.setdefault((text, row.output_1), value)
                differ += abs(value - first) > AGREE * first
        if differ:
            notes.append(
                f"{file} has other entropies than the directories before it for {differ} of the "
                "same instructions and baseline's answers. Theirs are used."
            )
    return known[0].reference if known else None, found
