"""The words of a command: its own, told apart from those of the recipe."""

import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.recipe.nearest import nearest
from mallowspo_cli.recipe.schema import Recipe

T = TypeVar("T")
KEYS = {"recipe", *(field.name for field in fields(Recipe))}
"""Words without a dot that a recipe takes."""


def own_words(words: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The NAME=VALUE words that are the command's own, by name, and the others.

    Raises:
        RecipeError: one of its own without a value, or twice.
    """
    own: dict[str, str] = {}
    others = []
    for word in words:
        name, equals, value = word.partition("=")
        if name not in names or not equals:
            if "." not in name and name not in KEYS and (hint := nearest(name, names)):
                raise RecipeError(f"{word!r} is no word of this command.{hint}")
            others.append(word)
        elif not value:
            raise RecipeError(f"{name} is empty. Give a value: {name}=...")
        elif name in own:
            raise RecipeError(f"{name} is given twice: {own[name]} and {value}.")
        else:
            own[name] = value
    return own, others


def whole_number(own: dict[str, str], name: str, default: int, least: int = 1) -> int:
    """A count among a command's own words.

    Raises:
        RecipeError: no whole number, or too small.
    """
    text = own.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise RecipeError(f"{name}={text} is not a whole number of at least {least}.")
    return int(text)


def only_words(
    words: Sequence[str],
    names: Sequence[str],
    groups: Mapping[str, type] | None = None,
    through: Sequence[str] = (),
) -> tuple[dict[str, str], list[str]]:
    """NAME=VALUE words of a command that takes no recipe: by name, and those to hand on.

    Args:
        names: its plain words.
        groups: for each NODE the dataclass whose fields are its words, as NODE.FIELD.
        through: beginnings of recipe words that are handed on, such as `model.`.

    Raises:
        RecipeError: a word that is none of them, without a value, or twice.
    """
    grouped = [f"{node}.{f.name}" for node, cls in (groups or {}).items() for f in fields(cls)]
    own, others = own_words(words, [*names, *grouped])
    for word in others:
        if not word.startswith(tuple(through)):
            name = word.partition("=")[0]
            known = [*names, *grouped, *(f"{beginning.rstrip('.=')}" for beginning in through)]
            raise RecipeError(
                f"{word!r} is no word of this command.{nearest(name, known)} `--help` explains all."
            )
    return own, others


def typed(cls: type[T], node: str, own: Mapping[str, str]) -> T:
    """The dataclass of the words NODE.FIELD=VALUE, each read as its field's type.

    Raises:
        RecipeError: a value of another type; or what the dataclass itself refuses.
    """
    hints = typing.get_type_hints(cls)
    values = {
        name: _value(own[key], hint, key)
        for name, hint in hints.items()
        if (key := f"{node}.{name}") in own
    }
    return cls(**values)


def _value(text: str, hint: Any, key: str) -> Any:
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in choices and text in ("null", "none", "None"):
        return None
    (kind,) = [choice for choice in choices if choice is not type(None)]
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise RecipeError(f"{key}={text} is neither true nor false.")
        return text.lower() == "true"
    try:
        value = kind(text)
    except ValueError as error:
        what = "whole number" if kind is int else "number"
        raise RecipeError(f"{key}={text} is no {what}.") from error
    if kind is float and not math.isfinite(value):
        raise RecipeError(f"{key}={text} is no finite number.")
    return value
