"""What a run directory has to export: its final model, or a checkpoint."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mallowspo_cli.errors import CheckpointError, RecipeError, first_line
from mallowspo_cli.objectives.base import objective_name
from mallowspo_cli.recipe.load import LoadedRecipe, load_recipe
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.training.checkpoint import best_checkpoint, whole_checkpoints
from mallowspo_cli.training.metrics import read_metrics


@dataclass(frozen=True)
class Source:
    """What is exported of a run."""

    run: Path
    step: int
    checkpoint: Path | None
    """None: the model of the finished run."""

    def __str__(self) -> str:
        kind = "the final model," if self.checkpoint is None else "the checkpoint of"
        return f"{kind} step {self.step}"


def run_recipe(directory: Path) -> LoadedRecipe:
    """The recipe that a run was trained with.

    Raises:
        CheckpointError: there is no run.
    """
    if not directory.is_dir():
        raise CheckpointError(
            f"no run directory at {directory}. `ls runs` shows what there is; give one: run=DIR."
        )
    file = directory / "recipe.yaml"
    if not file.is_file():
        raise CheckpointError(
            f"{directory} holds no recipe.yaml, so it is no run. Give the directory that "
            "`mallowspo train` wrote: run=DIR."
        )
    return load_recipe(str(file))


def find_source(directory: Path, wanted: str | None) -> Source:
    """The final model unless a checkpoint is asked for; the newest checkpoint where there is none.

    Args:
        wanted: a step, `best`, `last`, or None.

    Raises:
        CheckpointError: it is not there.
    """
    finished = directory / "results.json"
    if wanted is None and finished.is_file() and (directory / "model" / "config.json").is_file():
        return Source(directory, int(read_json(finished)["steps"]), None)
    found = {int(path.name.removeprefix("step_")): path for path in whole_checkpoints(directory)}
    if not found:
        kind = "whole checkpoint" if wanted else "finished model and no whole checkpoint"
        raise CheckpointError(
            f"{directory} holds no {kind}, so there is nothing to export. Train with "
            "checkpoint.every=N, or let the run end: mallowspo train "
            f"recipe={directory / 'recipe.yaml'} --resume"
        )
    step = _step(directory, wanted or "last", list(found))
    if step not in found:
        raise CheckpointError(
            f"{directory} holds no whole checkpoint of step {step}. Those that are there: "
            f"{', '.join(map(str, found))}."
        )
    return Source(directory, step, found[step])


def _step(directory: Path, wanted: str, steps: list[int]) -> int:
    if wanted == "last":
        return steps[-1]
    if wanted.isdecimal():
        return int(wanted)
    if wanted != "best":
        raise RecipeError(
            f"found checkpoint={wanted}, expected a step, best or last. Those that are there: "
            f"{', '.join(map(str, steps))}."
        )
    best = best_checkpoint(directory)
    if best is None:
        raise CheckpointError(
            f"{directory} names no best checkpoint (checkpoints/best.json): it was trained without "
            "checkpoint.best_by. Give a step, or checkpoint=last."
        )
    return best["step"]


def results_after(recipe: Recipe, lines: Sequence[dict[str, Any]], step: int) -> dict[str, Any]:
    """What the lines of metrics.jsonl up to `step` come to, as results.json has it.

    pairs_per_second is NaN where no line of a step is there.
    """
    known = [line for line in lines if line["step"] <= step]
    evaluations = [line for line in known if "eval/loss" in line]
    rates = [line["pairs_per_second"] for line in known if "pairs_per_second" in line]
    return {
        "name": recipe.name,
        "objective": objective_name(recipe.objective),
        "model_source": recipe.model.source,
        "dataset_path": recipe.dataset.title,
        "steps": step,
        "pairs_seen": step * recipe.train.global_batch_size,
        "pairs_per_second": len(rates) / sum(1 / r for r in rates) if rates else float("nan"),
        "before": next((line for line in evaluations if line["step"] == 0), None),
        "after": next((line for line in evaluations if line["step"] == step), None),
    }


def results_so_far(recipe: Recipe, source: Source) -> dict[str, Any]:
    """What results.json would hold, had the run ended at its checkpoint."""
    lines = read_metrics(source.run / "metrics.jsonl")
    return {**results_after(recipe, lines, source.step), "kl": None}


def read_json(path: Path) -> Any:
    """A JSON file of a run.

    Raises:
        CheckpointError: it is missing or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}: {first_line(error)}. Put it back, or train the run again."
        ) from error
