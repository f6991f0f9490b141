"""Hydra's sweep grammar over recipes: words with several values become one composed job each."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, Quote, QuotedString, Transformer, ValueType

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.objectives.base import objective_name
from mallowspo_cli.recipe.find import find_recipe, option_names, recipe_files
from mallowspo_cli.recipe.load import LoadedRecipe, load_recipe, parse_word
from mallowspo_cli.recipe.sweep_names import CHOSEN, Value, job_names, labels_of, safe

PLACE = re.compile(r"[\w.-]+(/[\w.-]+)*")
"""Names of a sweep: they become directories, and words that need no quotes."""


@dataclass(frozen=True)
class SweptJob:
    """One choice of values, composed."""

    name: str
    """Readable, safe as a file name, and no other job's of the sweep."""
    values: dict[str, Value]
    """The swept keys' values; a list or a mapping as its text."""
    words: tuple[str, ...]
    """All words of `mallowspo train`."""
    loaded: LoadedRecipe

    @property
    def directory(self) -> Path:
        """Where it writes."""
        return Path(self.loaded.recipe.output_dir)


@dataclass(frozen=True)
class Sweep:
    """All jobs of a sweep: the product of the values, the last key's the fastest."""

    name: str
    directory: Path
    keys: tuple[str, ...]
    """The swept keys, in the order of the words."""
    fixed: tuple[str, ...]
    """The words that all jobs have."""
    jobs: tuple[SweptJob, ...]
    joined: tuple[tuple[str, str], ...]
    """(job left out, job that is the same run)."""


def expand(recipe: str, words: Sequence[str]) -> Sweep:
    """Compose and check every job of a sweep.

    Args:
        recipe: what stands behind `recipe=`: a name, a path, or several in Hydra's grammar.
        words: the other words; `name=` and `output_dir=` are the sweep's own.

    Raises:
        RecipeError: a word that cannot be read, nothing to sweep, or what `load_recipe` refuses.
    """
    axes = [read_axis(f"recipe={recipe}"), *map(read_axis, words)]
    _check_repeated(axes)
    place = {axis.key: axis for axis in axes if axis.key in ("name", "output_dir")}
    swept = [axis for axis in axes if axis.swept and axis.key not in place]
    fixed = [axis.words[0] for axis in axes if not axis.swept and axis.key not in place]
    if not swept:
        raise RecipeError(
            "no key has several values, so there is nothing to sweep. Example: mallowspo sweep "
            "recipe=quickstart objective=dpo,mallows_theta seed=0,1"
        )
    labels = labels_of([axis.key for axis in swept])
    name = _place(place, "name") or _default_name(axes[0], labels)
    directory = _place(place, "output_dir")
    choices = list(itertools.product(*(zip(a.words, a.values, strict=True) for a in swept)))
    chosen = [{a.key: v for a, (_, v) in zip(swept, c, strict=True)} for c in choices]
    names = job_names(chosen, labels)
    jobs: dict[str, SweptJob] = {}
    joined = []
    for choice, values, job_name in zip(choices, chosen, names, strict=True):
        all_words = [*fixed, *(word for word, _ in choice), f"name={name}/{job_name}"]
        if directory:
            all_words.append(f"output_dir={_quoted(f'{directory}/{job_name}')}")
        job = _job(job_name, values, all_words, f"{directory or f'runs/{name}'}/{job_name}")
        same = jobs.setdefault(_identity(job.loaded), job)
        if same is not job:
            joined.append((job_name, same.name))
    return Sweep(
        name=name,
        directory=Path(directory or f"runs/{name}"),
        keys=tuple(axis.key for axis in swept),
        fixed=tuple(fixed),
        jobs=tuple(jobs.values()),
        joined=tuple(joined),
    )


@dataclass(frozen=True)
class Axis:
    """A word's key, and the word with each of its values."""

    key: str
    words: tuple[str, ...]
    values: tuple[Value, ...]
    swept: bool


def read_axis(word: str) -> Axis:
    """A word in Hydra's grammar, with one value or several.

    Raises:
        RecipeError: it cannot be read, or its values cannot be told one by one.
    """
    key, equals, text = word.partition("=")
    if key == "recipe" and not re.search(r"[,(]", text):
        # A path may hold what Hydra's grammar has no place for.
        return Axis(key, (word,), (text,), swept=False)
    override = parse_word(word)
    if not equals or not override.is_sweep_override():
        value = None if override.is_delete() else _plain(override.value())
        return Axis(override.key_or_group, (word,), (value,), swept=False)
    values = _values(word, override)
    texts = [Transformer.str(value) for value in values]
    if repeated := [text for text in texts if texts.count(text) > 1]:
        raise RecipeError(f"{word!r} names {repeated[0]} twice. Name each value once.")
    if key == "recipe":
        names = tuple(str(_plain(value)) for value in values)
        return Axis(key, tuple(f"recipe={name}" for name in names), names, swept=True)
    words = (f"{override.get_key_element()}={text}" for text in texts)
    return Axis(override.key_or_group, tuple(words), tuple(map(_plain, values)), swept=True)


def _values(word: str, override: Override) -> list[Any]:
    if override.is_interval_sweep():
        raise RecipeError(
            f"{word!r} is an interval, of which a sweep cannot try every value. Name some: "
            f"{override.key_or_group}=range(LOW,HIGH,STEP), or several with commas between."
        )
    if override.value_type is not ValueType.GLOB_CHOICE_SWEEP:
        return list(override.sweep_iterator())
    key = override.key_or_group
    if key not in CHOSEN:
        raise RecipeError(
            f"{word!r}: glob() chooses among names, and {key} has none. It takes "
            f"{', '.join(CHOSEN)}."
        )
    names = list(recipe_files()) if key == "recipe" else option_names(key)
    glob: Any = override.value()
    if not (found := glob.filter(names)):
        raise RecipeError(f"{word!r} fits no name. There are: {', '.join(names)}.")
    return found


def _plain(value: Any) -> Value:
    if isinstance(value, QuotedString):
        return value.text
    return Transformer.str(value) if isinstance(value, list | dict) else value


def _check_repeated(axes: Sequence[Axis]) -> None:
    seen: set[str] = set()
    for axis in axes:
        if axis.key in seen:
            raise RecipeError(f"{axis.key} is given twice. Put its values into one word.")
        seen.add(axis.key)
        if axis.key in ("name", "output_dir") and axis.swept:
            raise RecipeError(
                f"{axis.key} is the sweep's own, so it takes one value; each job gets its place "
                "below it."
            )


def _place(place: dict[str, Axis], key: str) -> str | None:
    if key not in place:
        return None
    text = str(place[key].values[0]).rstrip("/")
    if key == "name" and not (PLACE.fullmatch(text) and ".." not in text):
        raise RecipeError(f"name={text} cannot name a directory. Use letters, digits, _, - and .")
    return text


def _default_name(recipe: Axis, labels: dict[str, str]) -> str:
    """The recipe and the swept keys: quickstart-objective-seed."""
    parts = [label for key, label in labels.items() if key != "recipe"]
    if recipe.swept:
        return "-".join(["recipes", *parts])
    return "-".join([safe(Path(str(recipe.values[0])).stem), *parts])


def _quoted(text: str) -> str:
    return text if PLACE.fullmatch(text) else QuotedString(text, Quote.single).with_quotes()


def _job(name: str, values: dict[str, Value], words: Sequence[str], directory: str) -> SweptJob:
    (recipe,) = [w.removeprefix("recipe=") for w in words if w.startswith("recipe=")]
    others = [word for word in words if not word.startswith("recipe=")]
    loaded = load_recipe(recipe, others)
    if Path(loaded.recipe.output_dir) != Path(directory):
        raise RecipeError(
            f"{find_recipe(recipe).name} sets output_dir={loaded.recipe.output_dir} itself, which "
            "every job would write. Give the sweep a place of its own: output_dir=DIR."
        )
    return SweptJob(name, values, (f"recipe={recipe}", *others), loaded)


def _identity(loaded: LoadedRecipe) -> str:
    """What two jobs have in common that are the same run."""
    tree = {k: v for k, v in loaded.tree.items() if k not in ("name", "output_dir")}
    return json.dumps([objective_name(loaded.recipe.objective), tree], sort_keys=True)
