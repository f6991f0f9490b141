"""What every layout becomes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mallowspo_cli.errors import DataError


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form that chat templates take."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt and two responses, of which the first is preferred."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    row: str
    """Where it came from, for messages to the user: `FILE row 7` (counted from 0)."""
    rater_neg_log_phi: float = math.nan
    """-log phi of the prompt by its raters' scores, where the data has several raters."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row, or a pair of it, that a layout's filter leaves out; `cause` is counted."""

    cause: str
    row: str


def messages(value: Any, row: str, column: str) -> tuple[Message, ...]:
    """Messages from a list of {"role", "content"} objects.

    Raises:
        DataError: another shape.
    """
    if not isinstance(value, Iterable) or isinstance(value, str | dict):
        raise DataError(f"{row}: {column} is {_kind(value)}; expected a list of messages.")
    found = []
    for item in value:
        keys = ("role", "content")
        if not isinstance(item, dict) or not all(isinstance(item.get(k), str) for k in keys):
            raise DataError(
                f"{row}: {column} holds {_kind(item)}; expected objects whose 'role' and 'content' "
                "are texts."
            )
        found.append(Message(item["role"], item["content"]))
    return tuple(found)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
