"""`mallowspo experiment out-of-distribution`: train on one data set, evaluate on others."""

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers.utils.logging

from mallowspo_cli.commands.jobs import Job, check_job, train_job
from mallowspo_cli.commands.ood_datasets import DataSets, prepared_sets, training_words
from mallowspo_cli.commands.ood_evaluation import RunResults, evaluate_run, fill_stores
from mallowspo_cli.commands.ood_words import (
    Entry,
    Wanted,
    check_places,
    experiment_words,
    words_of,
)
from mallowspo_cli.commands.prepare import one_process
from mallowspo_cli.commands.subject import clean_name
from mallowspo_cli.distributed import console, log, set_up_logging
from mallowspo_cli.errors import EvalError, MallowsPOError, RecipeError, first_line
from mallowspo_cli.experiments.ood_samples import Scored
from mallowspo_cli.experiments.out_of_distribution import analyse
from mallowspo_cli.experiments.rated_files import MEANING, PREFIX, prompt_of, write_rated
from mallowspo_cli.files import make_directory, write_json, write_text
from mallowspo_cli.models.load import load_tokenizer, model_directory
from mallowspo_cli.objectives.base import objective_name
from mallowspo_cli.recipe.choices import DispersionMode
from mallowspo_cli.recipe.load import LoadedRecipe, load_recipe
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.report.out_of_distribution import (
    as_csv,
    as_markdown,
    draw_accuracy,
    print_results,
)
from mallowspo_cli.training.watch import StoppedError

QUIET = ("eval.at_start=false", "eval.at_end=false", "eval.every=0", "eval.kl_prompts=0")
"""What a run would measure of itself is measured afterwards; the user's own words come later."""


def run(words: list[str]) -> None:
    """Train, evaluate and compare; see `mallowspo experiment out-of-distribution --help`."""
    set_up_logging()
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    wanted = experiment_words(words)
    one_process("experiment out-of-distribution")
    jobs = jobs_of(wanted)
    check_modes(jobs)
    for _, _, job in jobs:
        check_job(job)
    recipe = _recipe(jobs[0][2])
    inside = wanted.train_on or recipe.dataset.title
    check_places([inside, *wanted.targets])
    if inside.startswith(PREFIX):
        write_rated(inside, wanted.sizes.train_pairs, wanted.sizes.max_chars)
    make_directory(wanted.to, "the report")
    tokenizer = load_tokenizer(model_directory(recipe.model), recipe.model.chat_template)
    sets = prepared_sets(recipe, tokenizer, inside, wanted.targets, wanted.sizes)
    for _, _, job in jobs:
        if job.finished:
            sets.check(job.directory, _recipe(job))
    fill_stores([_recipe(job) for _, _, job in jobs], sets.evaluated)
    done, failed = _train_and_evaluate(jobs, sets, wanted.to)
    _report(wanted, jobs, sets, done, failed)
    if failed:
        raise EvalError(
            f"{len(failed)} of {len(jobs)} runs failed, first {failed[0]['run']}: "
            f"{failed[0]['reason']} The report is of the others; the same command tries again."
        )


def jobs_of(wanted: Wanted) -> list[tuple[Entry, int, Job]]:
    """All runs, seed by seed, so that what was stopped early has all objectives of a seed."""
    data = training_words(wanted.train_on, wanted.sizes) if wanted.train_on else []
    found = []
    for seed in wanted.seeds:
        for entry in wanted.entries:
            name = clean_name(entry.label)
            directory = wanted.to / "runs" / name / f"seed{seed}"
            words = (
                *(f"recipe={wanted.recipe}", f"objective={entry.objective}", *QUIET, *data),
                *(*wanted.overrides, *entry.words, f"seed={seed}", f"name={name}-seed{seed}"),
                f'output_dir="{directory}"',
            )
            loaded = load_recipe(wanted.recipe, list(words[1:]))
            found.append((entry, seed, Job(f"{name}-seed{seed}", words, directory, loaded)))
    return found


def _recipe(job: Job) -> Recipe:
    assert job.loaded is not None
    return job.loaded.recipe


def controls_of(jobs: Sequence[tuple[Entry, int, Job]]) -> dict[str, str | None]:
    """Entries whose recipe puts a control in the place of estimated weights, and for each the entry
    whose recipe is the same with estimated ones; None where there is none.
    """
    loaded = {entry.label: job.loaded for entry, _, job in reversed(jobs) if job.loaded is not None}
    rest = {label: _but_for_mode(recipe) for label, recipe in loaded.items()}
    modes = {
        label: found.recipe.dispersion.mode
        for label, found in loaded.items()
        if found.recipe.objective.needs_dispersion
    }
    treated = [label for label, mode in modes.items() if mode is DispersionMode.estimated]
    return {
        label: next((other for other in treated if rest[other] == rest[label]), None)
        for label in modes
        if label not in treated
    }


def check_modes(jobs: Sequence[tuple[Entry, int, Job]]) -> None:
    """Refuse a control that no entry asks for: all entries would be one, and nothing be claimed.

    Raises:
        RecipeError: the recipe, or a word for all runs, sets dispersion.mode.
    """
    for entry, _, job in jobs:
        recipe = _recipe(job)
        mode = recipe.dispersion.mode
        own = any(word.startswith("dispersion.mode=") for word in entry.words)
        weighted = recipe.objective.needs_dispersion
        if weighted and mode is not DispersionMode.estimated and not own:
            raise RecipeError(
                f"the recipe has dispersion.mode={mode.value} for every objective. Set it back "
                "there, and give it to some: "
                f"objectives=dpo,mallows_theta,mallows_theta+dispersion.mode={mode.value}."
            )


def _but_for_mode(loaded: LoadedRecipe) -> tuple[str, dict[str, Any]]:
    """What a run is but for its seed, its place and its dispersion's mode."""
    tree = {k: v for k, v in loaded.tree.items() if k not in ("name", "output_dir", "seed")}
    dispersion = {key: value for key, value in tree["dispersion"].items() if key != "mode"}
    return objective_name(loaded.recipe.objective), {**tree, "dispersion": dispersion}


def _train_and_evaluate(
    jobs: Sequence[tuple[Entry, int, Job]], sets: DataSets, to: Path
) -> tuple[list[tuple[Entry, int, RunResults]], list[dict[str, str]]]:
    """What each finished run got, and why the others have nothing."""
    done, failed = [], []
    for number, (entry, seed, job) in enumerate(jobs, start=1):
        log.info("run %d of %d: %s, seed %d", number, len(jobs), entry.label, seed)
        try:
            reason = train_job(job, to / "logs" / f"{job.name}.log")
            if reason is None:
                # The data may have changed since this command read it.
                sets.check(job.directory, _recipe(job))
                _tidy(job)
                results = evaluate_run(job.directory, _recipe(job), sets.evaluated)
                done.append((entry, seed, results))
        except StoppedError:
            raise
        except MallowsPOError as error:
            reason = first_line(error)
        if reason is not None:
            log.info("%s failed: %s", job.name, reason)
            failed.append({"run": job.name, "reason": reason})
    if not done:
        first = failed[0]
        raise EvalError(f"no run was finished; {first['run']}: {first['reason']}")
    return done, failed


def _tidy(job: Job) -> None:
    """Remove a finished run's checkpoints, which nothing reads any more, unless the best is asked
    for.
    """
    if _recipe(job).checkpoint.best_by is None:
        shutil.rmtree(job.directory / "checkpoints", ignore_errors=True)


def _report(
    wanted: Wanted,
    jobs: Sequence[tuple[Entry, int, Job]],
    sets: DataSets,
    done: Sequence[tuple[Entry, int, RunResults]],
    failed: list[dict[str, str]],
) -> None:
    entries = [entry.label for entry in wanted.entries]
    scored = [
        Scored(entry.label, seed, found.tables, found.about["reward"])
        for entry, seed, found in done
    ]
    inside, *targets = [data.name for data in sets.evaluated]
    results, claims = analyse(scored, entries, inside, targets, controls_of(jobs))
    results |= {
        "setup": _setup(wanted, _recipe(jobs[0][2]), inside, len(sets.train)),
        "data": {data.name: data.about for data in sets.evaluated},
        "runs": [
            {"entry": entry.label, "seed": seed, **found.about} for entry, seed, found in done
        ],
        "failed": failed,
        "claims": [claim.row() for claim in claims],
    }
    picture = wanted.to / "accuracy.png"
    draw_accuracy(results, picture)
    write_text(wanted.to / "rows.csv", as_csv(results))
    write_json(wanted.to / "results.json", results)
    write_text(wanted.to / "report.md", as_markdown(results, claims, picture.name))
    print_results(results, claims, wanted.to)


def _setup(wanted: Wanted, recipe: Recipe, inside: str, train_pairs: int) -> dict[str, Any]:
    rated = [name for name in (inside, *wanted.targets) if name.startswith(PREFIX)]
    return {
        "command": shlex.join(
            ["mallowspo", "experiment", "out-of-distribution", *words_of(wanted)]
        ),
        "recipe": wanted.recipe,
        "model": recipe.model.source,
        "inside": inside,
        "targets": list(wanted.targets),
        "entries": [entry.label for entry in wanted.entries],
        "seeds": list(wanted.seeds),
        "sizes": asdict(wanted.sizes),
        "train_pairs": train_pairs,
        "meaning": MEANING if rated else None,
        "prompts": {name: prompt_of(name) for name in rated},
    }
