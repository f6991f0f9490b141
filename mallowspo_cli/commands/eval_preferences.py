"""`mallowspo eval preferences`: how a model ranks held-out pairs."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mallowspo_cli.commands.prepare import (
    Prepared,
    complete,
    default_device,
    one_process,
    prepare,
)
from mallowspo_cli.commands.show import print_preferences
from mallowspo_cli.commands.subject import check_finished, check_named, is_run, model_words
from mallowspo_cli.commands.words import own_words, whole_number
from mallowspo_cli.data.table import TokenizedPair
from mallowspo_cli.distributed import log, set_up_logging
from mallowspo_cli.errors import EvalError, RecipeError
from mallowspo_cli.evaluation.preference import ScoredPairs, score_pairs
from mallowspo_cli.files import make_directory, write_json
from mallowspo_cli.models.load import TORCH_DTYPES, load_model, model_directory
from mallowspo_cli.objectives.base import PairScores, objective_name
from mallowspo_cli.packing.layout import PairBatch
from mallowspo_cli.recipe.choices import Precision
from mallowspo_cli.recipe.load import load_base, load_recipe
from mallowspo_cli.recipe.schema import ModelConfig, Recipe
from mallowspo_cli.reference.terms import Reference, numbers_of
from mallowspo_cli.scoring import PairScorer, scorer_for

OWN_KEYS = ("model", "reference", "eval.limit", "eval.output")


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and against what."""

    recipe: Recipe
    """Its `model` is the reference."""
    policy: ModelConfig
    run: Path | None
    scale: float | None
    """The run's dispersion scale; None finds it from the recipe."""
    running: dict[str, float]
    """The objective's running statistics after the run's last step; empty for a bare model."""


def run(words: list[str]) -> None:
    """Evaluate on held-out pairs; see `mallowspo eval preferences --help`."""
    set_up_logging()
    own, overrides = own_words(words, OWN_KEYS)
    if any(word.startswith("recipe=") for word in overrides):
        raise RecipeError("a run brings its recipe: give model=RUN_OR_MODEL, not recipe=.")
    if "model" not in own:
        raise EvalError(
            "found no model=. Example: mallowspo eval preferences model=runs/quickstart"
        )
    limit = whole_number(own, "eval.limit", 0) if "eval.limit" in own else None
    subject = _subject(own["model"], own.get("reference"), overrides)
    one_process("eval preferences")
    prepared = prepare(subject.recipe)
    if prepared.held_out is None:
        raise EvalError(
            f"{subject.recipe.dataset.title} has no held-out pairs. Name a split "
            "(dataset.eval_split=NAME), or take some out (dataset.eval_size=100)."
        )
    places = _outputs(subject, own.get("eval.output"))
    found, scored = evaluate(subject, prepared, limit)
    results = {"overrides": overrides, "limit": limit, **found}
    print_preferences(results)
    for place in places:
        scored.write(_table(place))
        write_json(place, results)
        log.info("wrote %s", place)


def evaluate(
    subject: Subject, prepared: Prepared, limit: int | None
) -> tuple[dict[str, object], ScoredPairs]:
    """Score the held-out pairs of `prepared`; returns the report as plain values, and the pairs."""
    recipe, device = subject.recipe, default_device()
    assert prepared.held_out is not None
    pairs = prepared.held_out[:limit]
    reference = _reference(subject, prepared, device)
    scored = policy_scorer(recipe, subject.policy, subject.running, device)(pairs, reference)
    results = {
        "model": str(subject.run or subject.policy.source),
        "reference": recipe.model.source if reference is not None else None,
        "dataset": recipe.dataset.title,
        "objective": objective_name(recipe.objective),
        "dispersion_scale": reference.scale if reference is not None else None,
        **scored.summary().as_dict(),
    }
    return results, scored


def policy_scorer(
    recipe: Recipe, policy: ModelConfig, running: Mapping[str, float], device: torch.device
) -> Callable[[Sequence[TokenizedPair], Reference | None], ScoredPairs]:
    """Load a model; returns what scores pairs with it, under the recipe's objective and precision.

    Args:
        running: the objective's running statistics after the model's last step.
    """
    scorer = PairScorer(
        load_model(model_directory(policy), TORCH_DTYPES[policy.dtype], policy.attention)
    )
    score = in_precision(scorer.to(device).eval(), recipe.train.precision, device)
    objective = recipe.objective.at_step(running)

    def scored(pairs: Sequence[TokenizedPair], reference: Reference | None) -> ScoredPairs:
        return score_pairs(
            scorer_for(objective, score),
            pairs,
            objective,
            reference,
            recipe.reference.pack_tokens,
            device,
            scorer.layout,
        )

    return scored


def _subject(model: str, reference: str | None, overrides: list[str]) -> Subject:
    """A run directory, a model directory, a model's recipe name, or a hub id: in that order."""
    directory = Path(model).expanduser()
    if is_run(directory):
        if reference is not None:
            raise EvalError(f"{model} is a run, which has its own reference; leave reference= out.")
        return _run_subject(directory, overrides)
    check_named(model, directory)
    return _model_subject(model, reference, overrides)


def _run_subject(directory: Path, overrides: list[str]) -> Subject:
    check_finished(directory)
    if any(word.startswith("dispersion.scale=") for word in overrides):
        raise EvalError(f"{directory} is a run, which has its own dispersion.scale; leave it out.")
    data = [word for word in overrides if re.match(r"\+{0,2}dataset[=.]", word)]
    fresh = any(word.partition("=")[0].endswith("dataset") for word in data)
    kept = [word for word in overrides if not (fresh and word in data)]
    recipe = load_recipe(str(directory / "recipe.yaml"), kept).recipe
    if fresh:
        # A new dataset starts from its own file: nothing of the run's dataset node stays.
        source = json.dumps(recipe.model.source)
        base = load_base([f"model.source={source}", "objective=dpo", *data]).recipe
        recipe = replace(recipe, dataset=base.dataset)
    file = directory / "dispersion.json"
    scale = float(json.loads(file.read_text())["scale"]) if file.is_file() else None
    policy = ModelConfig(source=str(directory / "model"), attention=recipe.model.attention)
    results = json.loads((directory / "results.json").read_text())
    return Subject(recipe, policy, directory, scale, results.get("running", {}))


def _model_subject(model: str, reference: str | None, overrides: list[str]) -> Subject:
    chosen = [word.partition("=")[0] for word in overrides]
    words = list(overrides)
    if "dataset" not in chosen:
        raise EvalError(f"{model} is no run, so it brings no data. Add dataset=NAME.")
    if "objective" not in chosen:
        words.append("objective=dpo")
    policy = _model_config(model, words)
    recipe = load_base([*model_words(reference or model), *words]).recipe
    needs = recipe.objective.needs_reference or recipe.objective.needs_dispersion
    if needs and reference is None:
        raise EvalError(
            f"{type(recipe.objective).__name__} compares a model with its reference, and {model} "
            "is no run. Add reference=MODEL (what it was trained from), or objective=simpo."
        )
    return Subject(recipe, policy, None, None, {})


def _model_config(model: str, words: list[str]) -> ModelConfig:
    return load_base([*model_words(model), *words]).recipe.model


def _reference(subject: Subject, prepared: Prepared, device: torch.device) -> Reference | None:
    recipe = subject.recipe
    objective = recipe.objective
    if not (objective.needs_reference or objective.needs_dispersion):
        return None
    assert prepared.held_out is not None
    fit_scale = (
        objective.needs_dispersion and subject.scale is None and recipe.dispersion.scale == "auto"
    )
    fitted = prepared.train if fit_scale else prepared.held_out
    held_out, config = prepared.held_out, recipe.dispersion
    store, _ = complete(recipe, prepared, [*held_out, *fitted], device)
    numbers = numbers_of(config, fitted)
    reference = Reference(store, config, fitted.pair_ids, recipe.seed, subject.scale, numbers)
    if fit_scale:
        reference.add_split(held_out)
    return reference


def _outputs(subject: Subject, named: str | None) -> list[Path]:
    places = []
    if subject.run is not None:
        data = re.sub(r"[^A-Za-z0-9._-]+", "_", subject.recipe.dataset.title).strip("_")
        directory = make_directory(subject.run / "evaluations", "the evaluation")
        places.append(directory / f"preferences_{data}.json")
    if named is not None:
        if Path(named).is_dir():
            raise EvalError(f"eval.output={named} is a directory; expected a file's name.")
        if Path(named).suffix == ".parquet":
            raise EvalError(
                f"eval.output={named}: the numbers are JSON, and the table of pairs is written "
                "beside them. Name a .json."
            )
        make_directory(Path(named).parent, "the evaluation")
        places.append(Path(named))
    return places


def _table(place: Path) -> Path:
    """Where the values of single pairs go: beside the numbers, for `mallowspo eval compare`."""
    return place.with_name(f"{place.name.removesuffix('.json')}.parquet")


def in_precision(
    scorer: PairScorer, precision: Precision, device: torch.device
) -> Callable[..., PairScores]:
    """The scorer under the compute type that its run trained with."""

    def score(batch: PairBatch, details: bool = False) -> PairScores:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision is Precision.bf16):
            return scorer(batch, details=details)

    return score
