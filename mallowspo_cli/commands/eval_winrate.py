"""`mallowspo eval winrate`: sampled answers to a dataset's prompts, judged against others."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mallowspo_cli.commands.generate_stage import generate_outputs, measure_dispersion
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
    score_stage,
    stage_of,
)
from mallowspo_cli.commands.prompt_sources import chosen_dataset, held_out_prompts
from mallowspo_cli.commands.subject import Evaluated, clean_name, find_model
from mallowspo_cli.commands.words import only_words, typed, whole_number
from mallowspo_cli.data.pairs import PreferencePair
from mallowspo_cli.distributed import log, set_up_logging
from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.judges.judging import Judged, JudgeOptions, Pair
from mallowspo_cli.evaluation.outputs import OUTPUTS, Output, read_outputs
from mallowspo_cli.evaluation.sampling.tasks import GenerateOptions, Task
from mallowspo_cli.evaluation.win_rates.alpacaeval import joined
from mallowspo_cli.evaluation.win_rates.summary import LengthData
from mallowspo_cli.recipe.schema import DatasetConfig
from mallowspo_cli.report.temperatures import write_temperatures

CHOSEN = "chosen"
NAMES = (
    *("model", "reference", "judge", "against", "dataset", "output_dir", "stage", "eval.limit"),
    "temperatures",
)
GROUPS = {"generate": GenerateOptions, "judge": JudgeOptions}
LIMIT = 256
"""Prompts that are judged unless eval.limit says otherwise."""
ANNOTATOR = "dialogue"


@dataclass(frozen=True)
class _Asked:
    """The command's words, checked."""

    subject: Evaluated
    against: Evaluated | None
    """None: the data's chosen answers."""
    dataset: DatasetConfig
    reference: str | None
    stage: str
    limit: int
    temperatures: list[float]
    output_dir: str | None
    generate: GenerateOptions
    judge: JudgeOptions

    @property
    def directory(self) -> Path:
        """Of the whole evaluation."""
        if self.output_dir is not None:
            return Path(self.output_dir).expanduser()
        other = CHOSEN if self.against is None else self.against.name
        title = clean_name(self.dataset.title)
        return self.subject.directory(f"winrate-{title}-against-{clean_name(other)}")

    def places(self) -> Iterator[tuple[float, Path]]:
        """Each temperature with its directory."""
        for temperature in self.temperatures:
            inside = f"temperature-{temperature:g}" if len(self.temperatures) > 1 else ""
            yield temperature, self.directory / inside


def run(words: Sequence[str], dry_run: bool) -> None:
    """Sample, judge and score; see `mallowspo eval winrate --help`."""
    set_up_logging()
    asked = _read(words)
    stages = ("generate", "judge", "score") if asked.stage == "all" else (asked.stage,)
    scores_alone = stages == ("score",) and not dry_run
    pairs = [] if scores_alone else held_out_prompts(asked.dataset, asked.limit)
    if dry_run:
        for _, place in asked.places():
            sampled = (place / OUTPUTS).is_file()
            if not sampled:
                log.info("no answers are sampled yet: the data's stand in for their lengths")
            found = _pairs(asked, pairs, place) if sampled else _stand_ins(pairs)
            foresee(found, asked.judge, place)
        return
    if "judge" in stages:
        # Before hours of sampling, not after them.
        check_judge(asked.judge)
    judged: list[Judged] = []
    summaries: dict[float, dict[str, Any]] = {}
    for temperature, place in asked.places():
        if "generate" in stages:
            _generate(asked, pairs, temperature, place)
        if "judge" in stages:
            judged.append(judge_stage(_pairs(asked, pairs, place), asked.judge, place))
        if "score" in stages:
            summaries[temperature] = _score(asked, place, temperature)
    if len(summaries) > 1:
        write_temperatures(asked.directory, summaries)
        log.info("all temperatures: %s", asked.directory / "temperatures.md")
    for found in judged:
        check_failures(found, asked.judge)


def _read(words: Sequence[str]) -> _Asked:
    own, rest = only_words(words, NAMES, GROUPS, through=("dataset.", "model."))
    name_annotator(own, ANNOTATOR)
    for name in ("model", "dataset"):
        if name not in own:
            raise EvalError(
                f"found no {name}=. Example: mallowspo eval winrate model=runs/quickstart "
                "dataset=quickstart_pairs"
            )
    generate = typed(GenerateOptions, "generate", own)
    against = own.get("against", CHOSEN)
    data = [word for word in rest if word.startswith("dataset.")]
    model = [word for word in rest if word.startswith("model.")]
    dataset = chosen_dataset([f"dataset={own['dataset']}", *data])
    return _Asked(
        find_model(own["model"], model),
        None if against == CHOSEN else find_model(against),
        dataset,
        own.get("reference"),
        stage_of(own),
        whole_number(own, "eval.limit", LIMIT),
        _temperatures(own, generate),
        own.get("output_dir"),
        generate,
        typed(JudgeOptions, "judge", own),
    )


def _temperatures(own: Mapping[str, str], generate: GenerateOptions) -> list[float]:
    if "temperatures" not in own:
        return [generate.temperature]
    if "generate.temperature" in own:
        raise EvalError("generate.temperature and temperatures= exclude each other; leave one out.")
    try:
        found = [float(text) for text in own["temperatures"].split(",")]
        # What is out of range is refused by the options themselves.
        return [replace(generate, temperature=value).temperature for value in dict.fromkeys(found)]
    except ValueError as error:
        raise EvalError(
            f"temperatures={own['temperatures']}: expected numbers, such as 0.25,0.7,1."
        ) from error


def _generate(
    asked: _Asked, pairs: Sequence[tuple[Task, PreferencePair]], temperature: float, place: Path
) -> None:
    tasks, options = [task for task, _ in pairs], replace(asked.generate, temperature=temperature)
    generate_outputs(asked.subject, tasks, options, place)
    if asked.against is not None:
        generate_outputs(asked.against, tasks, options, place / "against")
    reference = asked.subject.reference(asked.reference)
    if reference is not None:
        answers = [(task, pair.chosen.content) for task, pair in pairs]
        measure_dispersion(reference, answers, place)


def _pairs(asked: _Asked, pairs: Sequence[tuple[Task, PreferencePair]], place: Path) -> list[Pair]:
    """The model's and the others' answers to the prompts."""
    if not (place / OUTPUTS).is_file():
        raise EvalError(f"{place} holds no {OUTPUTS}. Sample answers first: stage=generate.")
    outputs = read_outputs(place / OUTPUTS)
    outputs = answers_to([task for task, _ in pairs], outputs, str(place / OUTPUTS))
    _check_name(outputs, asked.subject.name, place)
    if asked.against is None:
        others = [
            Output(task.instruction, pair.chosen.content.strip(), CHOSEN, task.dataset)
            for task, pair in pairs
        ]
    else:
        others = read_outputs(place / "against" / OUTPUTS)
        _check_name(others, asked.against.name, place / "against")
    return joined(outputs, others, "against")


def _stand_ins(pairs: Sequence[tuple[Task, PreferencePair]]) -> list[Pair]:
    """The data's chosen and rejected answers, for an estimate before anything is sampled."""
    return [
        Pair(task.instruction, pair.chosen.content, CHOSEN, pair.rejected.content, "rejected")
        for task, pair in pairs
    ]


def _check_name(outputs: Sequence[Output], name: str, place: Path) -> None:
    """Refuse answers of another model than the words name.

    Raises:
        EvalError: they are.
    """
    if outputs[0].generator != name:
        raise EvalError(
            f"{place} holds answers of {outputs[0].generator}, not of {name}. Give another "
            "output_dir=, or sample again there."
        )


def _score(asked: _Asked, place: Path, temperature: float) -> dict[str, Any]:
    rows = judged_annotations(place)
    reason = "the prompts of a dataset have no known difficulty"
    stages = made_by(place)
    known = stages.get("generation", {}).get("temperature", temperature)
    about = {"evaluation": f"win rate on {asked.dataset.title}", "temperature": known}
    data = LengthData(None, None, None, reason)
    return score_stage(rows, data, place, {**about, **stages}, [])
