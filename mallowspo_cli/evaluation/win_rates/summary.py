"""The score stage: from annotations to the figures of summary.json."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.outputs import Annotation
from mallowspo_cli.evaluation.win_rates.calibration import read_gamed
from mallowspo_cli.evaluation.win_rates.difficulty import Difficulty, difficulty_of
from mallowspo_cli.evaluation.win_rates.length_control import (
    UNPENALISED,
    Judged,
    LengthControlled,
    baseline_itself,
    bootstrap_length_controlled,
    length_controlled,
    refit_of,
)
from mallowspo_cli.evaluation.win_rates.winrate import average_length, extreme_change, win_rate

RESAMPLES = 1000
FIGURES = tuple(f"length_controlled{kind}_winrate" for kind in ("", "_noreg", "_minimal"))


@dataclass(frozen=True)
class LengthData:
    """What AlpacaEval's length control needs beside the annotations."""

    gamed: Path | None
    """df_gamed.csv"""
    difficulty: Path | None
    """instruction_difficulty.csv; None: the difficulties in `gamed`."""
    order: Sequence[str] | None
    """Instructions in the order of the two files' row numbers, where a file gave them."""
    missing: str | None = None
    """Why `gamed` is not there, for the report."""


def summarise(annotations: Sequence[Annotation], data: LengthData) -> dict[str, Any]:
    """AlpacaEval's figures under its names, in percent, with intervals as NAME_low and NAME_high.

    The length-controlled win rate is null where it cannot be had right; `length_control` says why,
    and length_controlled_minimal_winrate stands in: without difficulties, and unlike AlpacaEval's
    fit of that name without a penalty, which would pull it to 50.

    Raises:
        EvalError: nothing is judged; several models in one file; or files that do not fit.
    """
    baseline, model = _one(annotations, "generator_1"), _one(annotations, "generator_2")
    preferences = np.asarray([row.preference for row in annotations])
    raw = win_rate(preferences)
    figures = asdict(raw)
    figures |= {"win_rate_low": figures.pop("low"), "win_rate_high": figures.pop("high")}
    ours = np.asarray([len(row.output_2) for row in annotations])
    theirs = np.asarray([len(row.output_1) for row in annotations])
    summary: dict[str, Any] = {
        "generator": model,
        "baseline": baseline,
        "instructions": len(annotations),
        **figures,
        "avg_length": average_length([row.output_2 for row in annotations]),
        "baseline_avg_length": average_length([row.output_1 for row in annotations]),
        "length_controlled_winrate": None,
        "lc_standard_error": None,
    }
    notes: list[str] = []
    difficulty, why = _difficulty(annotations, data)
    judged = Judged(
        preferences,
        theirs,
        ours,
        difficulty.values if difficulty else None,
        read_gamed(data.gamed) if difficulty and data.gamed else None,
        difficulty.position if difficulty else None,
    )
    if difficulty is not None and data.gamed is None:
        notes.append(
            "length control without AlpacaEval's gamed judgements (gamed=FILE), which its own "
            "figure needs: length_controlled_noreg."
        )
    about: dict[str, Any] = {"fit": judged.variant, "reason": why}
    if difficulty is not None:
        about["difficulty"] = difficulty.joined_by
        if difficulty.by_position:
            notes.append(difficulty.joined_by)
    try:
        same = all(row.output_1 == row.output_2 for row in annotations)
        found = baseline_itself(len(ours)) if same else length_controlled(judged)
    except EvalError as error:
        about["reason"] = str(error)
        notes.append(f"no length-controlled win rate: {error}")
    else:
        summary |= _controlled(judged, found)
        if difficulty is not None:
            about |= {"coefficients": found.coefficients, "c": found.c}
        if why:
            notes.append(f"length control without instruction difficulties: {why}")
        if found.is_shrunk and difficulty is not None:
            notes.append(
                f"length control found nothing to go by: its penalty (C = {found.c:g}) left no "
                "coefficient, so that its figure is 50 whatever the model. Few judgements, or no "
                "difference, do that."
            )
        figure = next(v for key, v in summary.items() if key in FIGURES and v is not None)
        if warning := extreme_change(raw.win_rate, figure):
            notes.append(warning)
    return {**summary, "length_control": about, "notes": notes}


def _controlled(judged: Judged, found: LengthControlled) -> dict[str, Any]:
    if not math.isfinite(found.c):
        # The baseline against itself: nothing was fitted.
        figures = (found.win_rate,) * 3
        return {**_named("length_controlled", *figures), "lc_standard_error": 0.0}
    if judged.difficulty is None:
        value = refit_of(judged, UNPENALISED)(np.arange(len(judged.preference)))
        return _named(found.variant, value, *_interval(judged, UNPENALISED))
    name = "length_controlled" if judged.gamed is not None else found.variant
    figures = _named(name, found.win_rate, *_interval(judged, found.c))
    return {**figures, "lc_standard_error": found.standard_error}


def _interval(judged: Judged, c: float) -> tuple[float, float]:
    return bootstrap_length_controlled(judged, c, RESAMPLES)


def _named(name: str, value: float, low: float, high: float) -> dict[str, Any]:
    name = f"{name}_winrate"
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _difficulty(
    annotations: Sequence[Annotation], data: LengthData
) -> tuple[Difficulty | None, str | None]:
    """Difficulties by instruction, or why there are none."""
    if data.gamed is None and data.difficulty is None:
        return None, data.missing or "no difficulties were given (gamed=FILE, difficulty=FILE)"
    instructions = [row.instruction for row in annotations]
    return difficulty_of(instructions, data.difficulty, data.gamed, data.order), None


def _one(annotations: Sequence[Annotation], field: str) -> str:
    names = sorted({getattr(row, field) for row in annotations})
    if len(names) > 1:
        raise EvalError(
            f"the annotations hold {len(names)} values of {field} ({', '.join(names[:3])}); "
            "expected one. Score each model's annotations by themselves."
        )
    return names[0]
