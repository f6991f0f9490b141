"""A finished run scored on several data sets, the model loaded once; what is there stays."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mallowspo_cli.commands.eval_preferences import in_precision
from mallowspo_cli.commands.ood_datasets import Evaluated
from mallowspo_cli.commands.prepare import default_device
from mallowspo_cli.commands.subject import clean_name
from mallowspo_cli.evaluation.preference import ScoredPairs, score_pairs
from mallowspo_cli.experiments.ood_samples import Table, read_table
from mallowspo_cli.files import make_directory, write_json
from mallowspo_cli.models.load import TORCH_DTYPES, load_model, model_directory
from mallowspo_cli.objectives.base import objective_name
from mallowspo_cli.recipe.choices import DispersionSource
from mallowspo_cli.recipe.load import load_recipe
from mallowspo_cli.recipe.schema import DispersionConfig, Recipe
from mallowspo_cli.reference.build import complete_store, open_store
from mallowspo_cli.reference.terms import Reference
from mallowspo_cli.scoring import PairScorer, scorer_for


@dataclass(frozen=True)
class RunResults:
    """What a run left and what it got, as plain values, and its tables by data set."""

    about: dict[str, Any]
    tables: dict[str, Table]


def evaluate_run(run: Path, sets: Sequence[Evaluated]) -> RunResults:
    """Score the run on what it was not scored on yet; files are those of `eval preferences`.

    Raises:
        EvalError: a reward is not finite.
        ModelError: a model that cannot be loaded.
    """
    recipe = load_recipe(str(run / "recipe.yaml")).recipe
    places = {data.name: _place(run, data.name) for data in sets}
    missing = [data for data in sets if not _done(places[data.name], data)]
    if missing:
        make_directory(run / "evaluations", "the evaluation")
        _score(run, recipe, missing, places)
        if torch.cuda.is_available():
            # The next run trains in a process of its own, on the same device.
            torch.cuda.empty_cache()
    beta = asdict(recipe.objective).get("beta")
    tables = {
        name: read_table(place.with_suffix(".parquet"), beta) for name, place in places.items()
    }
    summaries = {name: json.loads(place.read_text()) for name, place in places.items()}
    return RunResults(_about(run, recipe, summaries), tables)


def digest_of(data: Evaluated) -> str:
    """Names the pairs that an evaluation is of."""
    ids = "".join(data.pairs.pair_ids).encode()
    return hashlib.blake2b(ids, digest_size=16).hexdigest()


def _score(
    run: Path, recipe: Recipe, missing: Sequence[Evaluated], places: dict[str, Path]
) -> None:
    device, precision = default_device(), recipe.train.precision
    file = run / "dispersion.json"
    scale = float(json.loads(file.read_text())["scale"]) if file.is_file() else None
    dtype = TORCH_DTYPES[recipe.model.dtype]
    policy = PairScorer(load_model(run / "model", dtype, recipe.model.attention))
    score = in_precision(policy.to(device).eval(), precision, device)
    objective = recipe.objective.at_step(_results(run).get("running", {}))
    for data in missing:
        reference = _reference(recipe, data, scale, device)
        start = time.perf_counter()
        scored = score_pairs(
            scorer_for(objective, score),
            data.pairs,
            objective,
            reference,
            recipe.reference.pack_tokens,
            device,
            policy.layout,
        )
        seconds = time.perf_counter() - start
        _write(places[data.name], run, recipe, data, scored, seconds)


def _reference(
    recipe: Recipe, data: Evaluated, scale: float | None, device: torch.device
) -> Reference:
    """The reference's scores of the pairs; strata are by its entropies, whatever the run used."""
    model, precision, pack_tokens = (
        recipe.model,
        recipe.train.precision,
        recipe.reference.pack_tokens,
    )
    directory = model_directory(model)
    store = open_store(directory, model, recipe.reference, precision)
    complete_store(store, data.pairs, directory, model, precision, pack_tokens, device)
    config, own = _by_entropy(recipe.dispersion), scale
    if recipe.dispersion.source is not DispersionSource.entropy:
        own = None
    return Reference(store, config, data.pairs.pair_ids, recipe.seed, own)


def _by_entropy(config: DispersionConfig) -> DispersionConfig:
    if config.source is DispersionSource.entropy:
        return config
    return replace(config, source=DispersionSource.entropy, column=None, scale="auto")


def _write(
    place: Path,
    run: Path,
    recipe: Recipe,
    data: Evaluated,
    scored: ScoredPairs,
    seconds: float,
) -> None:
    if data.one_prompt:
        # All pairs of one prompt would be one unit, of which there is no interval.
        scored = replace(scored, prompts=scored.pair_ids)
    summary = scored.summary().as_dict()
    # By weights that are not always the run's own.
    summary.pop("loss")
    scored.write(place.with_suffix(".parquet"))
    results = {
        "model": str(run),
        "reference": recipe.model.source,
        "dataset": data.name,
        "objective": objective_name(recipe.objective),
        "pairs_digest": digest_of(data),
        "pairs_per_second": len(data.pairs) / seconds,
        **summary,
    }
    # Last: this file says that the evaluation is whole.
    write_json(place, results)


def _place(run: Path, name: str) -> Path:
    return run / "evaluations" / f"preferences_ood_{clean_name(name)}.json"


def _done(place: Path, data: Evaluated) -> bool:
    if not place.is_file() or not place.with_suffix(".parquet").is_file():
        return False
    return json.loads(place.read_text()).get("pairs_digest") == digest_of(data)


def _about(run: Path, recipe: Recipe, summaries: dict[str, Any]) -> dict[str, Any]:
    results = _results(run)
    file = run / "dispersion.json"
    dispersion = json.loads(file.read_text()) if file.is_file() else {}
    knobs = {
        key: value if isinstance(value, int | float | str) or value is None else value.value
        for key, value in asdict(recipe.objective).items()
    }
    return {
        "directory": str(run),
        "objective": objective_name(recipe.objective),
        "knobs": knobs,
        "weighted": recipe.objective.needs_dispersion,
        "dispersion": {
            name: dispersion.get(name) for name in ("source", "mode", "scale", "weight_mean")
        },
        "steps": results["steps"],
        "pairs_seen": results["pairs_seen"],
        "training_seconds": results["training_seconds"],
        "training_pairs_per_second": results["pairs_per_second"],
        "evaluation_pairs_per_second": {
            name: summary["pairs_per_second"] for name, summary in summaries.items()
        },
        "displacement": {name: summary["displacement"] for name, summary in summaries.items()},
        "reward_margin": {name: summary["margin"] for name, summary in summaries.items()},
    }


def _results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())
