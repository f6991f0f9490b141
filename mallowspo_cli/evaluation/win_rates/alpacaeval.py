"""What AlpacaEval 2 asks for: its instructions, its baseline's answers, and the data of its fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.judges.options import OPENAI
from mallowspo_cli.evaluation.judges.pairwise import Pair, pair_of
from mallowspo_cli.evaluation.outputs import (
    Annotation,
    Output,
    printable,
    read_outputs,
    read_rows,
    unique_instructions,
)
from mallowspo_cli.evaluation.sampling.tasks import Task
from mallowspo_cli.evaluation.win_rates.difficulty import is_official

REPOSITORY = "tatsu-lab/alpaca_eval"
BASELINE = "gpt4_1106_preview"
"""Whose answers the leaderboard compares with."""
BASELINE_FILE = "alpaca_eval_gpt4_baseline.json"
GAMED_FILE = "df_gamed.csv"
DIFFICULTY_FILE = "instruction_difficulty.csv"
ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
"""The leaderboard's judge; its model is no longer served."""
INSTRUCTIONS = 805
LIMIT_SEED = 0
"""Of the draw that `eval.limit` makes: the same instructions for every model."""


@dataclass(frozen=True)
class Inputs:
    """Instructions in order, and what answered them before."""

    tasks: list[Task]
    order: list[str]
    """All instructions of the file, also those that eval.limit leaves out."""


def hub_file(name: str, instead: str) -> Path:
    """A file of AlpacaEval's data set, read as it is: no loader and no code of it runs.

    Args:
        instead: the word that names a local file.

    Raises:
        EvalError: neither in the cache nor to be fetched.
    """
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(REPOSITORY, name, repo_type="dataset"))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise EvalError(
            f"{name} of {REPOSITORY} is not in the local hub cache and the hub cannot be reached. "
            f"Connect, or give a local file: {instead}=FILE."
        ) from error


def read_inputs(path: Path | None, limit: int | None) -> Inputs:
    """The instructions of a file, or AlpacaEval's own; `limit` of them, drawn with a fixed seed.

    Raises:
        EvalError: no such file, or a row without an instruction.
    """
    file = path or hub_file(BASELINE_FILE, "instructions")
    rows = read_rows(file)
    for number, row in enumerate(rows):
        if not isinstance(row.get("instruction"), str) or not row["instruction"].strip():
            raise EvalError(
                f"{file} row {number} has no text under 'instruction'. It has: "
                f"{', '.join(sorted(row))}."
            )
    order = [printable(row["instruction"]) for row in rows]
    unique_instructions(order, str(file))
    chosen = range(len(rows))
    if limit is not None and limit < len(rows):
        drawn = np.random.default_rng(LIMIT_SEED).choice(len(rows), size=limit, replace=False)
        chosen = sorted(drawn.tolist())
    tasks = [Task.of(order[i], str(rows[i].get("dataset") or "")) for i in chosen]
    return Inputs(tasks, order)


def read_baseline(named: Path | None, instructions: Path | None) -> list[Output]:
    """The answers to compare with: those named, else those in the instructions' own file.

    Args:
        named: a model_outputs.json, or an evaluation's or a run's directory that holds one.

    Raises:
        EvalError: there are none.
    """
    if named is None:
        file = instructions or hub_file(BASELINE_FILE, "baseline")
        if not all(isinstance(row.get("output"), str) for row in read_rows(file)):
            raise EvalError(
                f"{file} holds instructions alone, so there is nothing to compare with. Give "
                "baseline=FILE (a model_outputs.json) or baseline=RUN."
            )
        return read_outputs(file)
    return read_outputs(outputs_file(named))


def outputs_file(named: Path) -> Path:
    """The model_outputs.json of a file's, an evaluation's or a run's name.

    Raises:
        EvalError: there is none, or several.
    """
    if named.is_file():
        return named
    own = [
        named / "model_outputs.json",
        named / "evaluations" / "alpacaeval" / "model_outputs.json",
    ]
    there = [file for file in own if file.is_file()][:1]
    there = there or sorted(named.glob("evaluations/*/model_outputs.json"))
    if len(there) != 1:
        what = ", ".join(map(str, there)) or "no model_outputs.json"
        raise EvalError(
            f"{named} holds {what}; expected one. Give the file, or sample first: "
            f"mallowspo eval alpacaeval model={named} stage=generate"
        )
    return there[0]


def joined(outputs: Sequence[Output], baseline: Sequence[Output], what: str) -> list[Pair]:
    """The model's and the baseline's answer to each instruction of `outputs`, joined by it.

    Raises:
        EvalError: the baseline lacks some.
    """
    known = {row.instruction: row for row in baseline}
    lacking = [row.instruction for row in outputs if row.instruction not in known]
    if lacking:
        raise EvalError(
            f"{what} answers {len(known)} instructions, but not {len(lacking)} of the "
            f"{len(outputs)} to judge, such as {lacking[0][:60]!r}. Give another baseline=, or the "
            "instructions that it answers: instructions=FILE."
        )
    return [pair_of(known[row.instruction], row) for row in outputs]


def not_comparable(rows: Sequence[Annotation], judge: Mapping[str, Any]) -> list[str]:
    """Why a figure cannot be set beside the leaderboard's; empty where nothing speaks against it.

    Args:
        judge: what judge.json says; empty where it is not there.
    """
    reasons = []
    annotator, baseline = rows[0].annotator, rows[0].generator_1
    if annotator != ANNOTATOR:
        reasons.append(f"the judge is {annotator}, not {ANNOTATOR}")
    if baseline != BASELINE:
        reasons.append(f"the baseline is {baseline}, not {BASELINE}")
    if not is_official([row.instruction for row in rows]):
        reasons.append("the instructions are not AlpacaEval's")
    elif len(rows) != INSTRUCTIONS:
        reasons.append(f"{len(rows)} of its {INSTRUCTIONS} instructions were judged")
    if judge.get("swap") == "both":
        reasons.append("each pair was judged in both orders")
    if judge.get("seed"):
        reasons.append(f"the order of answers was drawn with seed {judge['seed']}")
    if judge.get("server") not in (None, OPENAI):
        reasons.append(f"the judge was asked at {judge['server']}")
    return reasons
