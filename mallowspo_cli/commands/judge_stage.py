"""The judge stage of an evaluation: who is asked, what it takes, and what is written."""

import os
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from mallowspo_cli.distributed import log
from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.journal import Journal
from mallowspo_cli.evaluation.judges.annotators import Annotator, find_annotator
from mallowspo_cli.evaluation.judges.judging import (
    Endpoint,
    Estimate,
    Judge,
    Judged,
    JudgeOptions,
    Pair,
    answered,
    estimate,
    judge_pairs,
    settings,
)
from mallowspo_cli.evaluation.outputs import ANNOTATIONS, JUDGE, JUDGEMENTS
from mallowspo_cli.files import make_directory, write_json


def check_judge(options: JudgeOptions) -> None:
    """Find out what can be known before anything is asked.

    Raises:
        EvalError: no such annotator, no key, no model, or a package that is missing.
    """
    annotator = find_annotator(options.annotator)
    if options.engine == "endpoint":
        _judge(annotator, options)


def foresee(pairs: Sequence[Pair], options: JudgeOptions, directory: Path) -> None:
    """Say what judging these answers would still take; ask nothing."""
    annotator = find_annotator(options.annotator)
    name, file = _name(annotator, options), directory / JUDGEMENTS
    done: Collection[str] = ()
    if file.is_file():
        try:
            with Journal(file, settings(annotator, name, options)) as journal:
                done = answered(journal.lines)
        except EvalError:
            log.info("%s holds another judge's answers: these count as not judged", file)
    log.info("%s", _told(estimate(pairs, annotator, options, done), name, options))


def judge_stage(pairs: Sequence[Pair], options: JudgeOptions, directory: Path) -> Judged:
    """Judge the answers; writes annotations.json and judge.json.

    Raises:
        EvalError: the judge cannot be asked; what it has answered stays.
    """
    if not pairs:
        raise EvalError("there is no answer to judge. Sample some: stage=generate.")
    annotator = find_annotator(options.annotator)
    name = _name(annotator, options)
    make_directory(directory, "the evaluation")
    with Journal(directory / JUDGEMENTS, settings(annotator, name, options)) as journal:
        needed = estimate(pairs, annotator, options, answered(journal.lines))
        log.info("%s", _told(needed, name, options))
        found = judge_pairs(pairs, annotator, _judge(annotator, options), options, journal)
    rows = [row.as_dict() for row in found.annotations]
    about = {
        key: value for key, value in asdict(found).items() if key not in ("annotations", "asked")
    }
    write_json(directory / ANNOTATIONS, rows)
    write_json(
        directory / JUDGE,
        {
            "annotator": rows[0]["annotator"],
            "source": annotator.source,
            "model": name,
            "server": options.base_url if options.engine == "endpoint" else None,
            "swap": options.swap,
            "seed": options.seed,
            "pairs": len(rows),
            "failed_share": found.failed_share,
            **about,
        },
    )
    return found


def check_failures(found: Judged, options: JudgeOptions) -> None:
    """Let the command fail where too many judgements did; all that there is has been written.

    Raises:
        EvalError: their share is above judge.max_failures.
    """
    if found.failed_share <= options.max_failures:
        return
    failure = found.failures[0]
    raise EvalError(
        f"{100 * found.failed_share:.1f} % of {len(found.annotations)} judgements failed, more "
        f"than judge.max_failures={options.max_failures:g} (one of them: {failure.reason}). The "
        "figures leave them out, so they may be biased. The same command asks them again."
    )


def _name(annotator: Annotator, options: JudgeOptions) -> str:
    return options.model or annotator.model or "a judge"


def _judge(annotator: Annotator, options: JudgeOptions) -> Judge:
    """What will be asked; the key is read here and goes nowhere else.

    Raises:
        EvalError: no key, no model, or a package that is missing.
    """
    if options.engine == "transformers":
        return _local_judge(annotator, options)
    key, variable = None, options.key_variable
    if variable is not None:
        key = os.environ.get(variable)
        if not key:
            raise EvalError(
                f"the judge at {options.base_url} needs a key, and {variable} is not set. Set it, "
                "name another variable (judge.api_key_env=NAME), or another judge "
                "(judge.base_url=http://127.0.0.1:8000/v1, judge.engine=transformers)."
            )
    return Endpoint(annotator, options, key)


def _local_judge(annotator: Annotator, options: JudgeOptions) -> Judge:
    # Heavy, and a server's client has no need of them.
    from mallowspo_cli.commands.prepare import default_device
    from mallowspo_cli.commands.subject import bare_model
    from mallowspo_cli.evaluation.judges.local import LocalJudge
    from mallowspo_cli.models.load import (
        TORCH_DTYPES,
        load_model,
        load_tokenizer,
        model_directory,
    )

    name = options.model or annotator.model
    if name is None:
        raise EvalError(f"the annotator {annotator.name} names no judge. Add judge.model=NAME.")
    config = bare_model(name)
    place = model_directory(config)
    tokenizer = load_tokenizer(place, config.chat_template)
    model = load_model(place, TORCH_DTYPES[config.dtype], "sdpa").to(default_device())
    return LocalJudge(name, model, tokenizer, annotator, options.batch_size)


def _told(needed: Estimate, name: str, options: JudgeOptions) -> str:
    """What judging will take, in a line."""
    if needed.requests == 0:
        return f"judging: all answers of {name} are there"
    cost = "price unknown" if needed.cost is None else f"{needed.cost:.2f} US dollars at most"
    if options.local and options.price is None:
        cost = "no price"
    seconds = needed.seconds
    time = "" if seconds is None else f", some {max(1, round(seconds / 60))} min"
    return (
        f"judging: {needed.requests:,} questions to {name}, about {needed.input_tokens:,} tokens "
        f"in, at most {needed.output_tokens:,} out, {cost}{time}"
    )
