"""`mallowspo eval alpacaeval`: AlpacaEval 2 in three stages, each of which can be stopped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mallowspo_cli.commands.judge_stage import (
    check_failures,
    check_judge,
    foresee,
    judge_stage,
)
from mallowspo_cli.commands.judged import (
    answers_to,
    judged_annotations,
    made_by,
    name_annotator,
    path_of,
    score_stage,
    stage_of,
)
from mallowspo_cli.commands.subject import Evaluated, clean_name, find_model
from mallowspo_cli.commands.words import only_words, typed, whole_number
from mallowspo_cli.distributed import log, set_up_logging
from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.judges.judging import JudgeOptions, Pair
from mallowspo_cli.evaluation.judges.pairwise import pair_of
from mallowspo_cli.evaluation.outputs import (
    OUTPUTS,
    Annotation,
    Output,
    read_annotations,
    read_outputs,
)
from mallowspo_cli.evaluation.sampling.tasks import GenerateOptions
from mallowspo_cli.evaluation.win_rates.alpacaeval import (
    BASELINE,
    BASELINE_FILE,
    DIFFICULTY_FILE,
    GAMED_FILE,
    hub_file,
    joined,
    not_comparable,
    read_baseline,
    read_inputs,
)
from mallowspo_cli.evaluation.win_rates.difficulty import is_official
from mallowspo_cli.evaluation.win_rates.summary import LengthData

NAME = "alpacaeval"
NAMES = (
    *("model", "reference", "judge", "baseline", "instructions", "outputs", "annotations"),
    *("difficulty", "gamed", "output_dir", "stage", "eval.limit"),
)
GROUPS = {"generate": GenerateOptions, "judge": JudgeOptions}
SOURCES = {
    "all": ("model", "outputs"),
    "generate": ("model",),
    "judge": ("model", "outputs"),
    "score": ("model", "annotations", "output_dir"),
}
"""For each stage the words of which one has to be there."""


@dataclass(frozen=True)
class _Asked:
    """The command's words, checked."""

    own: Mapping[str, str]
    subject: Evaluated | None
    """What `model=` stands for."""
    stage: str
    limit: int | None
    instructions: Path | None
    baseline: Path | None
    outputs: Path | None
    annotations: Path | None
    difficulty: Path | None
    gamed: Path | None
    generate: GenerateOptions
    judge: JudgeOptions


def run(words: Sequence[str], dry_run: bool) -> None:
    """Generate, judge and score; see `mallowspo eval alpacaeval --help`."""
    set_up_logging()
    asked = _read(words)
    directory = _directory(asked)
    stages = ("generate", "judge", "score") if asked.stage == "all" else (asked.stage,)
    if dry_run:
        _foresee(asked, directory)
        return
    if "judge" in stages:
        # Before hours of sampling, not after them.
        check_judge(asked.judge)
        _check_baseline(asked)
    if "generate" in stages and asked.outputs is None:
        _generate(asked, directory)
    judged = None
    if "judge" in stages:
        judged = judge_stage(_pairs(asked, directory), asked.judge, directory)
    if "score" in stages:
        _score(asked, directory)
    if judged is not None:
        check_failures(judged, asked.judge)


def _read(words: Sequence[str]) -> _Asked:
    own, rest = only_words(words, NAMES, GROUPS, through=("model.",))
    name_annotator(own)
    stage = stage_of(own)
    if not any(name in own for name in SOURCES[stage]):
        wanted = " or ".join(f"{name}=" for name in SOURCES[stage])
        raise EvalError(
            f"stage={stage} needs {wanted}. Example: mallowspo eval alpacaeval "
            "model=runs/quickstart"
        )
    if "outputs" in own and ("model" in own or rest or stage in ("generate", "score")):
        raise EvalError(
            "outputs= brings a model's answers, to be judged: leave model= out, and let stage= be "
            "all or judge."
        )
    if "annotations" in own and (stage != "score" or "model" in own):
        raise EvalError(
            "annotations= brings judgements, to be scored: give stage=score, and leave model= out."
        )
    return _Asked(
        own,
        find_model(own["model"], rest) if "model" in own else None,
        stage,
        whole_number(own, "eval.limit", 1) if "eval.limit" in own else None,
        path_of(own, "instructions"),
        hub_file(BASELINE_FILE, "baseline")
        if own.get("baseline") == BASELINE
        else path_of(own, "baseline"),
        path_of(own, "outputs"),
        path_of(own, "annotations"),
        path_of(own, "difficulty"),
        path_of(own, "gamed"),
        typed(GenerateOptions, "generate", own),
        typed(JudgeOptions, "judge", own),
    )


def _directory(asked: _Asked) -> Path:
    """Where the files go: output_dir=, beside the model, or reports/ by the generator's name."""
    if "output_dir" in asked.own:
        return Path(asked.own["output_dir"]).expanduser()
    if asked.subject is not None:
        return asked.subject.directory(NAME)
    if asked.annotations is not None:
        generator = read_annotations(asked.annotations)[0].generator_2
    else:
        assert asked.outputs is not None
        generator = read_outputs(asked.outputs)[0].generator
    return Path("reports") / f"{NAME}-{clean_name(generator)}"


def _generate(asked: _Asked, directory: Path) -> None:
    from mallowspo_cli.commands.generate_stage import generate_outputs, measure_dispersion

    subject = asked.subject
    assert subject is not None
    tasks = read_inputs(asked.instructions, asked.limit).tasks
    generate_outputs(subject, tasks, asked.generate, directory)
    reference = subject.reference(asked.own.get("reference"))
    if reference is None:
        return
    try:
        baseline = read_baseline(asked.baseline, asked.instructions)
    except EvalError as error:
        log.info("prompt dispersion is left out: %s", error)
        return
    known = {row.instruction: row.output for row in baseline}
    answers = [(task, known[i]) for task in tasks if (i := task.instruction) in known]
    measure_dispersion(reference, answers, directory)


def _check_baseline(asked: _Asked) -> None:
    """See that there is something to compare each answer with.

    Raises:
        EvalError: there is not.
    """
    baseline = read_baseline(asked.baseline, asked.instructions)
    if asked.outputs is None:
        tasks = read_inputs(asked.instructions, asked.limit).tasks
        joined([Output(t.instruction, "", "") for t in tasks], baseline, "the baseline")


def _foresee(asked: _Asked, directory: Path) -> None:
    """Say what judging would take; where nothing is sampled, baseline answers stand in."""
    file = asked.outputs or directory / OUTPUTS
    if file.is_file():
        foresee(_pairs(asked, directory), asked.judge, directory)
        return
    log.info("no answers are sampled yet: the baseline's stand in for their lengths")
    wanted = {task.instruction for task in read_inputs(asked.instructions, asked.limit).tasks}
    rows = [r for r in read_baseline(asked.baseline, asked.instructions) if r.instruction in wanted]
    # One character more: equal answers would not be judged.
    pairs = [pair_of(row, replace(row, output=row.output + " ")) for row in rows]
    foresee(pairs, asked.judge, directory)


def _pairs(asked: _Asked, directory: Path) -> list[Pair]:
    """The answers that are to be judged."""
    file = asked.outputs or directory / OUTPUTS
    if not file.is_file():
        raise EvalError(f"{directory} holds no {OUTPUTS}. Sample answers first: stage=generate.")
    outputs = read_outputs(file)
    if asked.limit is not None or asked.instructions is not None:
        tasks = read_inputs(asked.instructions, asked.limit).tasks
        outputs = answers_to(tasks, outputs, str(file))
    baseline = read_baseline(asked.baseline, asked.instructions)
    return joined(outputs, baseline, str(asked.own.get("baseline", "the baseline")))


def _score(asked: _Asked, directory: Path) -> None:
    if asked.annotations is not None:
        rows, about = read_annotations(asked.annotations), {}
    else:
        rows, about = judged_annotations(directory), made_by(directory)
    order = None
    if asked.instructions is not None:
        order = read_inputs(asked.instructions, None).order
    notes = []
    if reasons := not_comparable(rows, about.get("judge", {})):
        notes.append(f"Not comparable with the AlpacaEval 2 leaderboard: {'; '.join(reasons)}.")
    data = _length_data(asked, rows, order)
    score_stage(rows, data, directory, {"evaluation": "AlpacaEval 2", **about}, notes)


def _length_data(
    asked: _Asked, rows: Sequence[Annotation], order: Sequence[str] | None
) -> LengthData:
    """The files of the fit: those named, else AlpacaEval's own for its own instructions."""
    if asked.difficulty is not None or asked.gamed is not None:
        return LengthData(asked.gamed, asked.difficulty, order)
    if not is_official([row.instruction for row in rows]):
        reason = (
            "the instructions are not AlpacaEval's, and no difficulties of theirs were given "
            "(gamed=FILE, difficulty=FILE)"
        )
        return LengthData(None, None, order, reason)
    try:
        files = hub_file(GAMED_FILE, "gamed"), hub_file(DIFFICULTY_FILE, "difficulty")
    except EvalError as error:
        return LengthData(None, None, order, str(error))
    return LengthData(*files, order)
