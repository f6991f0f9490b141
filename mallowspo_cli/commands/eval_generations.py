"""`mallowspo eval generations`: how diverse sampled answers are."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mallowspo_cli.commands.generate_stage import generate_stage, measure_dispersion
from mallowspo_cli.commands.prepare import one_process
from mallowspo_cli.commands.prompt_sources import chosen_dataset, held_out_prompts
from mallowspo_cli.commands.subject import Evaluated, clean_name, find_model
from mallowspo_cli.commands.words import only_words, typed, whole_number
from mallowspo_cli.distributed import log, set_up_logging
from mallowspo_cli.errors import EvalError, RecipeError, first_line
from mallowspo_cli.evaluation.diversity import Answer, prompt_values, read_answers
from mallowspo_cli.evaluation.outputs import DISPERSION, GENERATION, GENERATIONS, read_object
from mallowspo_cli.evaluation.sampling.tasks import GenerateOptions, Task
from mallowspo_cli.evaluation.strata import by_dispersion, estimate, tercile_members
from mallowspo_cli.evaluation.win_rates.alpacaeval import read_inputs
from mallowspo_cli.files import make_directory
from mallowspo_cli.report.generations import print_diversity, write_diversity

OWN = ("model", "from", "instructions", "dataset", "reference", "eval.limit", "output_dir")
SAMPLES = {"generate.samples": "4"}
LIMIT = 256
"""Prompts of a data set unless eval.limit says otherwise."""
AGAINST = "against"
"""Directory of an evaluation that holds another model's answers."""


def run(words: list[str]) -> None:
    """Measure diversity; see `mallowspo eval generations --help`."""
    set_up_logging()
    one_process("eval generations")
    groups = {"generate": GenerateOptions}
    own, others = only_words(words, OWN, groups, ("model.", "dataset."))
    if "dataset" in own or "instructions" in own:
        place, model = _sampled(own, others)
    else:
        place, model = _found(own, others)
    results = measure(place)
    results["model"] = model or str(place)
    write_diversity(place, results)
    print_diversity(results, place)


def measure(place: Path) -> dict[str, Any]:
    """The diversity of the answers in an evaluation's directory, as plain values.

    Raises:
        EvalError: no answers, or files that cannot be read.
    """
    sampling, answers = read_answers(place / GENERATIONS)
    kept, samples, left_out = whole_prompts(answers)
    values = prompt_values(list(kept.values()))
    reference, entropies = read_entropies(place / DISPERSION)
    members = tercile_members([entropies.get(text, math.nan) for text in kept])
    thirds, gaps = by_dispersion(values, members)
    return {
        "generations": str(place / GENERATIONS),
        "sampling": sampling,
        "prompts": len(kept),
        "samples": samples,
        "left_out": left_out,
        "metrics": {name: asdict(estimate(column)) for name, column in values.items()},
        "reference": reference,
        "terciles": {name: len(rows) for name, rows in members.items()},
        "by_dispersion": {
            third: {name: asdict(entry) for name, entry in entries.items()}
            for third, entries in thirds.items()
        },
        "high_minus_low": {name: asdict(entry) for name, entry in gaps.items()},
    }


def whole_prompts(
    answers: dict[str, list[Answer]],
) -> tuple[dict[str, list[Answer]], int, int]:
    """The prompts with as many answers as any, that number, and how many prompts have fewer: values
    between the answers to a prompt depend on their number."""
    samples = max(map(len, answers.values()))
    kept = {text: found for text, found in answers.items() if len(found) == samples}
    left_out = len(answers) - len(kept)
    if left_out:
        log.info("left out %d prompts with fewer than %d answers", left_out, samples)
    return kept, samples, left_out


def read_entropies(file: Path) -> tuple[str | None, dict[str, float]]:
    """The reference and the entropy of each instruction; nothing where there is no such file.

    Raises:
        EvalError: it holds something else.
    """
    if not file.is_file():
        return None, {}
    found = read_object(file)
    try:
        reference, entropies = str(found["reference"]), dict(found["entropy"])
        known = {str(text): float(value) for text, value in entropies.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise EvalError(
            f"{file} holds no entropies ({type(error).__name__}: {first_line(error)}). Remove it, "
            "or put it back as it was."
        ) from error
    for text, value in known.items():
        if not 0 < value <= 1:
            raise EvalError(f"{file}: the entropy of {text[:40]!r} is {value:g}; expected 0 to 1.")
    return reference, known


def _sampled(own: dict[str, str], others: list[str]) -> tuple[Path, str]:
    """Sample answers (those that are not there yet); their directory and the model's name."""
    if "from" in own or "model" not in own or ("dataset" in own and "instructions" in own):
        raise EvalError(
            "to sample answers give model=, and either instructions= or dataset=, and no from=. "
            "Example: mallowspo eval generations model=runs/quickstart instructions=mine.jsonl"
        )
    data = [word for word in others if word.startswith("dataset.")]
    subject = find_model(own["model"], [word for word in others if word not in data])
    options = typed(GenerateOptions, "generate", SAMPLES | own)
    name, tasks, answers = _tasks(own, data)
    place = subject.directory(f"generations-{clean_name(name)}")
    if "output_dir" in own:
        place = Path(own["output_dir"]).expanduser()
    make_directory(place, "the evaluation")
    generate_stage(subject, tasks, options, place)
    reference = subject.reference(own.get("reference"))
    if answers and reference is not None:
        measure_dispersion(reference, answers, place)
    return place, str(subject.run or subject.name)


def _tasks(
    own: dict[str, str], data_words: list[str]
) -> tuple[str, list[Task], list[tuple[Task, str]]]:
    """Name of the prompts, the prompts, and an answer to each where the data has one."""
    limit = whole_number(own, "eval.limit", LIMIT)
    if "dataset" in own:
        config = chosen_dataset([f"dataset={own['dataset']}", *data_words])
        pairs = held_out_prompts(config, limit)
        tasks = [task for task, _ in pairs]
        return config.title, tasks, [(task, pair.chosen.content) for task, pair in pairs]
    for word in (*data_words, *(key for key in ("reference",) if key in own)):
        raise RecipeError(f"found {word} without dataset=NAME, whose chosen answers it is about.")
    file = Path(own["instructions"]).expanduser()
    most = limit if "eval.limit" in own else None
    return file.stem, read_inputs(file, most).tasks, []


def _found(own: dict[str, str], others: list[str]) -> tuple[Path, str | None]:
    """The directory with generations that the words name, and the model's name."""
    unused = [*others, *(key for key in own if key not in ("model", "from"))]
    if unused:
        raise RecipeError(
            f"{unused[0]} is about sampling, and there is nothing to sample from. Add "
            "instructions=FILE or dataset=NAME."
        )
    if "from" in own:
        place = Path(own["from"]).expanduser()
        if not (place / GENERATIONS).is_file():
            raise EvalError(f"{place} holds no {GENERATIONS}. Give an evaluation's directory.")
        return place, own.get("model")
    if "model" not in own:
        raise EvalError(
            "found no model= and no from=. Example: mallowspo eval generations "
            "model=runs/quickstart"
        )
    subject = find_model(own["model"])
    return _only(subject), str(subject.run or subject.name)


def _source(place: Path) -> str | None:
    """Where the model came from whose answers lie in a directory."""
    file = place / GENERATION
    return read_object(file).get("source") if file.is_file() else None


def _only(subject: Evaluated) -> Path:
    """The one directory with generations of a model."""
    if subject.run is not None:
        files = sorted((subject.run / "evaluations").rglob(GENERATIONS))
    else:
        files = sorted(Path("reports").glob(f"*-{subject.name}/**/{GENERATIONS}"))
        # The name of another model may end in this one's.
        files = [file for file in files if _source(file.parent) == subject.model.source]
    files = [file for file in files if file.parent.name != AGAINST]
    if len(files) == 1:
        return files[0].parent
    if files:
        raise EvalError(
            f"{subject.name} has several evaluations with generations. Name one: "
            f"{' or '.join(f'from={file.parent}' for file in files)}"
        )
    raise EvalError(
        f"no generations of {subject.name} are there. Sample some: instructions=FILE or "
        "dataset=NAME."
    )
