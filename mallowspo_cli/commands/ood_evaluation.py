"""A finished run scored on several data sets, the model loaded once; what is there stays."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mallowspo_cli.commands.eval_preferences import policy_scorer
from mallowspo_cli.commands.ood_datasets import Evaluated
from mallowspo_cli.commands.prepare import default_device
from mallowspo_cli.commands.subject import clean_name
from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.preference import ScoredPairs
from mallowspo_cli.experiments.ood_samples import Table, read_table
from mallowspo_cli.files import make_directory, write_json
from mallowspo_cli.models.load import model_directory
from mallowspo_cli.objectives.base import Objective, objective_name
from mallowspo_cli.recipe.choices import DispersionSource
from mallowspo_cli.recipe.schema import DispersionConfig, ModelConfig, Recipe
from mallowspo_cli.reference.build import complete_store, open_store, out_of_memory
from mallowspo_cli.reference.store import ReferenceStore
from mallowspo_cli.reference.terms import Reference


@dataclass(frozen=True)
class RunResults:
    """What a run left and what it got, as plain values, and its tables by data set."""

    about: dict[str, Any]
    tables: dict[str, Table]


def fill_stores(recipes: Iterable[Recipe], sets: Sequence[Evaluated]) -> None:
    """Score all sets with the recipes' references, each once: before anything is trained, so that
    what fails here costs no training, and alone on the device.

    Raises:
        ModelError: a reference that does not load, or gives scores that are not finite.
    """
    filled = []
    for recipe in recipes:
        made_by = (recipe.model, recipe.reference, recipe.train.precision)
        if made_by not in filled:
            _filled(recipe, sets, default_device())
            filled.append(made_by)
    _leave_device()


def evaluate_run(run: Path, recipe: Recipe, sets: Sequence[Evaluated]) -> RunResults:
    """Score the run on what it was not scored on yet; files are those of `eval preferences`.

    Args:
        recipe: the run's; of `reference` what the words say now.

    Raises:
        EvalError: a reward is not finite, or memory runs out.
        ModelError: a model that cannot be loaded.
    """
    places = {data.name: _place(run, data.name) for data in sets}
    missing = [data for data in sets if not _done(places[data.name], data)]
    if missing:
        make_directory(run / "evaluations", "the evaluation")
        _score_or_tell(run, recipe, missing, places)
    beta = asdict(recipe.objective).get("beta")
    tables = {
        name: read_table(place.with_suffix(".parquet"), beta) for name, place in places.items()
    }
    summaries = {name: json.loads(place.read_text()) for name, place in places.items()}
    return RunResults(_about(run, recipe, summaries), tables)


def reward_of(objective: Objective) -> tuple[str, bool]:
    """What a margin over beta is a difference of, and whether it is 0 for the reference itself.

    Only margins of one kind are compared. Without a reference in it, accuracy does not begin at
    1/2: the reference itself ranks better or worse than chance.
    """
    knobs = asdict(objective)
    # Without the knob, an objective that reads no reference (ORPO, SFT) takes means.
    by_token = knobs.get("length_normalised", not objective.needs_reference)
    mixing = float(knobs.get("mixing", 1)) if objective.needs_reference else 0.0
    kinds = {0.0: "log-prob", 1.0: "log-ratio"}
    kind = kinds.get(mixing, f"log-prob less {mixing:g} of the reference's")
    return f"{kind}, {'per token' if by_token else 'summed'}", mixing == 1


def _score_or_tell(
    run: Path, recipe: Recipe, missing: Sequence[Evaluated], places: dict[str, Path]
) -> None:
    try:
        _score(run, recipe, missing, places)
        return
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    finally:
        # The next run trains in a process of its own, on the same device.
        _leave_device()
    # Outside the handler, which keeps what did not fit alive.
    raise EvalError(
        f"out of memory while {run} was evaluated. Lower reference.pack_tokens (now "
        f"{recipe.reference.pack_tokens}), which does not change the result; the run itself stays."
    )


def _score(
    run: Path, recipe: Recipe, missing: Sequence[Evaluated], places: dict[str, Path]
) -> None:
    device = default_device()
    store = _filled(recipe, missing, device)
    file = run / "dispersion.json"
    scale = float(json.loads(file.read_text())["scale"]) if file.is_file() else None
    model = recipe.model
    policy = ModelConfig(source=str(run / "model"), dtype=model.dtype, attention=model.attention)
    score = policy_scorer(recipe, policy, _results(run).get("running", {}), device)
    for data in missing:
        reference = _reference(recipe, store, data, scale)
        start = time.perf_counter()
        scored = score(data.pairs, reference)
        seconds = time.perf_counter() - start
        if data.documents is not None:
            scored = replace(scored, prompts=data.documents)
        _write(places[data.name], run, recipe, data, scored, seconds)


def _filled(recipe: Recipe, sets: Sequence[Evaluated], device: torch.device) -> ReferenceStore:
    """The reference's store with all pairs of the sets."""
    model, precision = recipe.model, recipe.train.precision
    directory = model_directory(model)
    store = open_store(directory, model, recipe.reference, precision)
    for data in sets:
        # By data set, as they are scored: what is packed together gives the same numbers.
        complete_store(
            store, data.pairs, directory, model, precision, recipe.reference.pack_tokens, device
        )
    return store


def _leave_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reference(
    recipe: Recipe, store: ReferenceStore, data: Evaluated, scale: float | None
) -> Reference:
    """The reference's scores of the pairs; strata are by its entropies, whatever the run used."""
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
    summary = scored.summary().as_dict()
    # By weights that are not always the run's own.
    summary.pop("loss")
    scored.write(place.with_suffix(".parquet"))
    results = {
        "model": str(run),
        "reference": recipe.model.source,
        "dataset": data.name,
        "objective": objective_name(recipe.objective),
        "pairs_digest": data.digest,
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
    return json.loads(place.read_text()).get("pairs_digest") == data.digest


def _about(run: Path, recipe: Recipe, summaries: dict[str, Any]) -> dict[str, Any]:
    results = _results(run)
    file = run / "dispersion.json"
    dispersion = json.loads(file.read_text()) if file.is_file() else {}
    knobs = {
        key: value if isinstance(value, int | float | str) or value is None else value.value
        for key, value in asdict(recipe.objective).items()
    }
    reward, begins_at_chance = reward_of(recipe.objective)
    return {
        "directory": str(run),
        "objective": objective_name(recipe.objective),
        "knobs": knobs,
        "reward": reward,
        "begins_at_chance": begins_at_chance,
        "weighted": recipe.objective.needs_dispersion,
        "dispersion": {
            name: dispersion.get(name) for name in ("source", "mode", "scale", "weight_mean")
        },
        "precision": recipe.train.precision.value,
        "learning_rate": recipe.train.learning_rate,
        "global_batch_size": recipe.train.global_batch_size,
        "train_pairs": json.loads((run / "data.json").read_text())["train_pairs"],
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
