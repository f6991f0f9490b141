"""`mallowspo experiment human-dispersion`: token entropy against the disagreement of raters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers.utils.logging

from mallowspo_cli.commands.prepare import default_device
from mallowspo_cli.commands.subject import model_words
from mallowspo_cli.distributed import console, set_up_logging
from mallowspo_cli.errors import RecipeError
from mallowspo_cli.experiments.human_dispersion import CORPORA, run_experiment
from mallowspo_cli.files import make_directory, write_json, write_text
from mallowspo_cli.recipe.load import load_base
from mallowspo_cli.recipe.nearest import nearest
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.report.human_dispersion import as_markdown, draw_correlations, print_results

FEWEST_PAIRS = 10


@dataclass(frozen=True)
class HumanDispersion:
    """The words of `mallowspo experiment human-dispersion`, checked."""

    model: str = "smollm2_135m"
    pairs: int = 500
    corpora: tuple[str, ...] = tuple(CORPORA)
    seed: int = 0
    to: Path = Path("reports/human-dispersion")


def run(words: list[str]) -> None:
    """Correlate token entropy and raters' disagreement; see `--help`."""
    set_up_logging()
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    wanted = human_dispersion_words(words)
    recipe = _recipe(wanted)
    make_directory(wanted.to, "the report")
    results = run_experiment(wanted.corpora, wanted.pairs, recipe, default_device(), wanted.seed)
    picture = wanted.to / "correlations.png"
    draw_correlations(results, picture)
    write_json(wanted.to / "results.json", results)
    write_text(wanted.to / "report.md", as_markdown(results, picture.name))
    print_results(results, wanted.to)


def human_dispersion_words(words: list[str]) -> HumanDispersion:
    """KEY=VALUE words, checked.

    Raises:
        RecipeError: an unknown key or corpus, or a number out of range.
    """
    keys = tuple(HumanDispersion.__dataclass_fields__)
    given: dict[str, Any] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if key not in keys or not separator:
            raise RecipeError(
                f"{word!r} is no word of this experiment (it takes: "
                f"{', '.join(f'{k}=...' for k in keys)}).{nearest(key, keys)}"
            )
        if not value:
            raise RecipeError(f"{key} is empty. Give a value: {key}=...")
        given[key] = value
    if "pairs" in given:
        given["pairs"] = _whole(given, "pairs", FEWEST_PAIRS)
    if "seed" in given:
        given["seed"] = _whole(given, "seed", 0)
    if "to" in given:
        given["to"] = Path(given["to"]).expanduser()
    if "corpora" in given:
        given["corpora"] = _corpora(given["corpora"])
    return HumanDispersion(**given)


def _whole(given: dict[str, Any], key: str, least: int) -> int:
    text = given[key]
    if not text.isdecimal() or int(text) < least:
        raise RecipeError(f"{key}={text} is not a whole number of at least {least}.")
    return int(text)


def _corpora(text: str) -> tuple[str, ...]:
    if text == "all":
        return tuple(CORPORA)
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in CORPORA:
            raise RecipeError(
                f"no corpus named '{name}'.{nearest(name, CORPORA)} Choices: all, or some of "
                f"{','.join(CORPORA)}."
            )
    return names


def _recipe(wanted: HumanDispersion) -> Recipe:
    """The defaults with the model chosen: a directory, a name in recipes/model/ or a hub id."""
    # The data set is not read; a recipe cannot be without one. Short texts fill small passes, which
    # two cores run a third faster (450 against 330 tokens/s).
    fixed = ["dataset=quickstart_pairs", "train.precision=fp32", "reference.pack_tokens=1024"]
    return load_base([*model_words(wanted.model), *fixed, "objective=dpo"]).recipe
