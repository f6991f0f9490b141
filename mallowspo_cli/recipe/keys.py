"""Every recipe key with its default and its meaning, read from the schema's own source."""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

import omegaconf

from mallowspo_cli.objectives.base import registered
from mallowspo_cli.recipe.schema import Recipe


def explained_keys() -> Iterator[tuple[str, str, str]]:
    """(key, default, meaning) of every recipe key, in the recipe's order; objectives come last."""
    yield from explained_fields(Recipe, "")
    for name, cls in registered().items():
        for key, default, meaning in explained_fields(cls, "objective."):
            yield key, default, f"({name}) {meaning}"


def explained_fields(cls: type, prefix: str) -> Iterator[tuple[str, str, str]]:
    """(key, default, meaning) of a dataclass's fields and of those within them."""
    meanings = field_docs(cls)
    for f in fields(cls):
        inner = f.default_factory if f.default_factory is not MISSING else None
        if isinstance(inner, type) and is_dataclass(inner):
            yield from explained_fields(inner, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", _default(f), meanings.get(f.name, "")


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, its bases' included, in one line."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if is_dataclass(owner):
            found |= _own_field_docs(owner)
    return found


def _own_field_docs(cls: type) -> dict[str, str]:
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            found[statement.target.id] = " ".join(str(following.value.value).split())
    return found


def _default(field: "Field[Any]") -> str:
    value = field.default
    if value is MISSING or value == omegaconf.MISSING:
        return "(choose)"
    return "null" if value is None else str(getattr(value, "value", value))
