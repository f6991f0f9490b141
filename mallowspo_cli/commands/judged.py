"""What `eval alpacaeval` and `eval winrate` share beside their first two stages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.outputs import (
    ANNOTATIONS,
    GENERATION,
    JUDGE,
    SUMMARY,
    Annotation,
    Output,
    read_annotations,
    read_object,
)
from mallowspo_cli.evaluation.sampling.tasks import Task
from mallowspo_cli.evaluation.win_rates.summary import LengthData, summarise
from mallowspo_cli.files import make_directory, write_json
from mallowspo_cli.report.win_rates import print_summary, write_win_rates

STAGES = ("all", "generate", "judge", "score")
SPENT = ("input_tokens", "output_tokens", "cost")
"""What judge.json says of tokens and money."""


def stage_of(own: Mapping[str, str]) -> str:
    """The word `stage=`.

    Raises:
        EvalError: no stage.
    """
    stage = own.get("stage", "all")
    if stage not in STAGES:
        raise EvalError(f"stage={stage} is none of {', '.join(STAGES)}.")
    return stage


def name_annotator(own: dict[str, str], default: str | None = None) -> None:
    """Let `judge=` stand for `judge.annotator=`, which is nearly always named.

    Raises:
        EvalError: both are given.
    """
    if "judge" in own and "judge.annotator" in own:
        raise EvalError("judge= and judge.annotator= name the same; leave one out.")
    named = own.pop("judge", default)
    if named is not None:
        own.setdefault("judge.annotator", named)


def path_of(own: Mapping[str, str], name: str) -> Path | None:
    """A word that names a file or directory.

    Raises:
        EvalError: it is not there.
    """
    if name not in own:
        return None
    path = Path(own[name]).expanduser()
    if not path.exists():
        raise EvalError(f"{name}={own[name]}: there is no such file.")
    return path


def answers_to(tasks: Sequence[Task], outputs: Sequence[Output], where: str) -> list[Output]:
    """The answers to these tasks, in the order of `outputs`.

    Raises:
        EvalError: some are not answered.
    """
    wanted = {task.instruction for task in tasks}
    found = [row for row in outputs if row.instruction in wanted]
    if len(found) < len(wanted):
        raise EvalError(
            f"{where} answers {len(found)} of the {len(wanted)} prompts. Sample the others "
            "(stage=generate), or give the eval.limit that it was sampled with."
        )
    return found


def score_stage(
    annotations: Sequence[Annotation],
    data: LengthData,
    directory: Path,
    about: Mapping[str, Any],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Write and print summary.json, report.md and the picture; returns the summary.

    Args:
        about: further entries of the summary.
        notes: lines for the head of the report.
    """
    summary = {**summarise(annotations, data), **about}
    summary["notes"] = [*notes, *summary["notes"]]
    make_directory(directory, "the evaluation")
    write_json(directory / SUMMARY, summary)
    write_win_rates(directory, summary)
    print_summary(summary, directory)
    return summary


def judged_annotations(directory: Path) -> list[Annotation]:
    """The annotations of an evaluation's judge stage.

    Raises:
        EvalError: it has not been run.
    """
    file = directory / ANNOTATIONS
    if not file.is_file():
        raise EvalError(f"{directory} holds no {ANNOTATIONS}. Judge first: stage=judge.")
    return read_annotations(file)


def made_by(directory: Path) -> dict[str, Any]:
    """What the stages before say of themselves, as `generation` and `judge`, where they ran.

    Without what was spent: an evaluation that was stopped and went on may have spent more for the
    same figures.
    """
    found = {}
    for name, file in (("generation", GENERATION), ("judge", JUDGE)):
        if (directory / file).is_file():
            values = read_object(directory / file)
            found[name] = {key: value for key, value in values.items() if key not in SPENT}
    return found
