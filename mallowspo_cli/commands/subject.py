"""What an evaluation's `model=` stands for."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from mallowspo_cli.errors import EvalError
from mallowspo_cli.recipe.find import option_names
from mallowspo_cli.recipe.load import load_base, load_recipe
from mallowspo_cli.recipe.schema import ModelConfig, Recipe


@dataclass(frozen=True)
class Evaluated:
    """A model to evaluate."""

    name: str
    """Of directories and of `generator` in files."""
    model: ModelConfig
    """Where its weights lie and how they are loaded."""
    run: Path | None
    """The run directory, where it is a run's model."""
    recipe: Recipe | None
    """The run's recipe; its `model` is the reference."""

    def reference(self, named: str | None) -> ModelConfig | None:
        """The model of reference=, else the one that the run began from."""
        if named is not None:
            return bare_model(named)
        return self.recipe.model if self.recipe is not None else None

    def directory(self, evaluation: str) -> Path:
        """Where an evaluation's files go unless output_dir= says otherwise."""
        if self.run is not None:
            return self.run / "evaluations" / evaluation
        return Path("reports") / f"{evaluation}-{self.name}"


def find_model(model: str, words: list[str] | None = None) -> Evaluated:
    """A run directory, a model directory, a name in recipes/model/ or a hub id, in that order.

    Args:
        words: `model.KEY=VALUE` words, for a bare model.

    Raises:
        EvalError: a run that is not there or not finished.
        RecipeError: words that cannot be used.
    """
    words = words or []
    directory = Path(model).expanduser()
    if is_run(directory):
        if words:
            raise EvalError(f"{model} is a run, which has its own model; leave {words[0]} out.")
        check_finished(directory)
        recipe = load_recipe(str(directory / "recipe.yaml")).recipe
        config = ModelConfig(source=str(directory / "model"), dtype=recipe.model.dtype)
        return Evaluated(run_name(directory), config, directory, recipe)
    check_named(model, directory)
    return Evaluated(clean_name(model), bare_model(model, words), None, None)


def run_name(directory: Path) -> str:
    """Its directory's name; with that of the configuration where it is one of several seeds."""
    place = directory.resolve()
    return f"{place.parent.name}-{place.name}" if place.name.startswith("seed") else place.name


def is_run(directory: Path) -> bool:
    """Whether `mallowspo train` wrote it."""
    return (directory / "recipe.yaml").is_file()


def check_finished(run: Path) -> None:
    """Refuse a run that has no final model.

    Raises:
        EvalError: says how to go on.
    """
    if not (run / "results.json").is_file():
        raise EvalError(
            f"the run in {run} is not finished. Go on with it: mallowspo train "
            f"recipe={run / 'recipe.yaml'} --resume"
        )


def check_named(model: str, directory: Path) -> None:
    """Refuse what can only mean a run that is not there.

    Raises:
        EvalError: says how to look.
    """
    if model.startswith("runs/") and not directory.is_dir():
        raise EvalError(f"no run directory at {model}. `ls runs` shows what there is.")


def bare_model(model: str, words: list[str] | None = None) -> ModelConfig:
    """The model node of a model directory, a name in recipes/model/, or a hub id."""
    # A recipe cannot be without dataset and objective; these are not looked at.
    fixed = ["dataset=quickstart_pairs", "objective=dpo"]
    return load_base([*model_words(model), *(words or []), *fixed]).recipe.model


def model_words(model: str) -> list[str]:
    """Recipe words that choose a model directory, a name in recipes/model/, or a hub id."""
    if not Path(model).expanduser().is_dir() and model in option_names("model"):
        return [f"model={model}"]
    return [f"model.source={json.dumps(model)}"]


def clean_name(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._") or "model"
