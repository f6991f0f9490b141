"""The words of `mallowspo experiment out-of-distribution`, checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mallowspo_cli.commands.ood_datasets import Sizes, check_name
from mallowspo_cli.commands.subject import clean_name
from mallowspo_cli.commands.words import own_words, whole_number
from mallowspo_cli.errors import RecipeError

OWN = (
    *("recipe", "train_on", "targets", "objectives", "seeds", "to"),
    *("train_pairs", "eval.limit", "max_chars"),
)
OF_JOBS = {
    "objective": "Name them in objectives=A,B.",
    "seed": "seeds=N trains with seeds 0 to N - 1.",
    "name": "Each run has one of its own.",
    "output_dir": "All runs are in to=DIR.",
}
"""Recipe keys that this command gives to each run."""
ENTRY_KEYS = ("objective.", "dispersion.", "train.")
"""Beginnings of what an entry may set: all entries have one model and the same pairs."""
OF_ENTRIES = ("objective.", "dispersion.mode")
"""What cannot be set for all: a beta would leave each entry's own, a mode makes controls."""
DEFAULT_OBJECTIVES = "dpo,mallows_theta,mallows_phi+objective.beta=0.3"
"""Equal steps at first: w has mean 1, and the phi link's slope at 0 is a third of the others'."""


@dataclass(frozen=True)
class Entry:
    """An objective with words of its own: NAME+KEY=VALUE+KEY=VALUE."""

    label: str
    objective: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """The command's words, checked."""

    recipe: str
    train_on: str | None
    targets: tuple[str, ...]
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...]
    sizes: Sizes
    to: Path
    overrides: tuple[str, ...]


def experiment_words(words: list[str]) -> Wanted:
    """KEY=VALUE words, checked but for what the recipe itself checks.

    Raises:
        RecipeError: an unknown or a missing word, or a value that cannot be used.
    """
    own, overrides = own_words(words, OWN)
    for word in overrides:
        key = word.partition("=")[0].lstrip("+")
        if key in OF_JOBS:
            raise RecipeError(f"{word!r} is no word of this command. {OF_JOBS[key]}")
        if key.startswith(OF_ENTRIES):
            raise RecipeError(
                f"{word!r} would hold for every objective. Give it to some: "
                f"objectives=dpo,mallows_theta+{word.lstrip('+')}."
            )
        if "train_on" in own and key in ("dataset", "dataset.path"):
            raise RecipeError(f"train_on={own['train_on']} and {word} name two data sets.")
    if "targets" not in own:
        raise RecipeError(
            "found no targets=. Example: mallowspo experiment out-of-distribution "
            "recipe=hh_pythia_dpo targets=shp,stack_exchange objectives=hh_dpo,hh_theta,hh_phi"
        )
    targets = _distinct("targets", own["targets"])
    for name in [*targets, *([own["train_on"]] if "train_on" in own else [])]:
        check_name(name)
    if own.get("train_on") in targets:
        raise RecipeError(f"targets holds {own['train_on']}, which is what is trained on.")
    sizes = Sizes(
        train_pairs=whole_number(own, "train_pairs", Sizes.train_pairs),
        limit=whole_number(own, "eval.limit", Sizes.limit, 2),
        max_chars=whole_number(own, "max_chars", 0) if "max_chars" in own else None,
    )
    return Wanted(
        recipe=own.get("recipe", "quickstart"),
        train_on=own.get("train_on"),
        targets=targets,
        entries=_entries(own.get("objectives", DEFAULT_OBJECTIVES)),
        seeds=tuple(range(whole_number(own, "seeds", 3))),
        sizes=sizes,
        to=Path(own.get("to", "reports/out-of-distribution")).expanduser(),
        overrides=tuple(overrides),
    )


def check_places(names: Sequence[str]) -> None:
    """Refuse data sets whose evaluations would be one file.

    Raises:
        RecipeError: names the two.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(clean_name(name), name)
        if other != name:
            raise RecipeError(
                f"{other} and {name} would have the same files. Give one of them another name."
            )


def _distinct(key: str, text: str) -> tuple[str, ...]:
    parts = text.split(",")
    if not all(parts) or len(set(parts)) < len(parts):
        raise RecipeError(f"{key}={text}: expected different names, with commas between them.")
    return tuple(parts)


def _entries(text: str) -> tuple[Entry, ...]:
    entries = []
    for label in _distinct("objectives", text):
        objective, *words = label.split("+")
        for word in words:
            if not word.startswith(ENTRY_KEYS) or "=" not in word:
                raise RecipeError(
                    f"objectives: {word!r} in {label!r} is not one of "
                    f"{', '.join(f'{key}KEY=VALUE' for key in ENTRY_KEYS)} (write 1e5 for 1e+5)."
                )
        entries.append(Entry(label, objective, tuple(words)))
    names = [clean_name(entry.label) for entry in entries]
    if len(set(names)) < len(names):
        raise RecipeError(f"objectives={text}: two entries would have the same directory.")
    return tuple(entries)


def words_of(wanted: Wanted) -> list[str]:
    """The words again, defaults written out."""
    sizes = wanted.sizes
    found = [f"recipe={wanted.recipe}"]
    if wanted.train_on is not None:
        found.append(f"train_on={wanted.train_on}")
    found += [
        f"targets={','.join(wanted.targets)}",
        f"objectives={','.join(entry.label for entry in wanted.entries)}",
        f"seeds={len(wanted.seeds)}",
        f"eval.limit={sizes.limit}",
        f"train_pairs={sizes.train_pairs}",
    ]
    if sizes.max_chars is not None:
        found.append(f"max_chars={sizes.max_chars}")
    return [*found, *wanted.overrides, f"to={wanted.to}"]
