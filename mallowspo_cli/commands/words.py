"""The words of a command: its own, told apart from those of the recipe."""

from collections.abc import Sequence
from dataclasses import fields

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.recipe.find import nearest
from mallowspo_cli.recipe.schema import Recipe

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
