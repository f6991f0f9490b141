"""Layouts of preference data: one function turns a raw row into a PreferencePair."""

import difflib
from collections.abc import Callable
from typing import Any

from mallowspo_cli.data.pairs import Message, PreferencePair, messages
from mallowspo_cli.errors import DataError

Row = dict[str, Any]
Format = Callable[[Row, str], PreferencePair]
_FORMATS: dict[str, Format] = {}
_DETECTORS: dict[str, Callable[[Row], bool]] = {}


def register_format(name: str, detect: Callable[[Row], bool]) -> Callable[[Format], Format]:
    """Register a layout under `dataset.format=NAME`; `detect` tells it from a row's columns."""

    def keep(function: Format) -> Format:
        if name in _FORMATS:
            raise ValueError(f"two formats are named {name!r}")
        _FORMATS[name], _DETECTORS[name] = function, detect
        return function

    return keep


def format_names() -> list[str]:
    """Names that `dataset.format` takes."""
    return ["auto", *sorted(_FORMATS)]


def choose_format(name: str, row: Row, where: str) -> Format:
    """The layout named, or told from a first row.

    Raises:
        DataError: unknown name, or no layout has these columns.
    """
    if name != "auto":
        if name not in _FORMATS:
            raise DataError(
                f"dataset.format={name} is not known.{_nearest(name)} "
                f"Choices: {', '.join(format_names())}."
            )
        return _FORMATS[name]
    for key, detect in _DETECTORS.items():
        if detect(row):
            return _FORMATS[key]
    raise DataError(
        f"{where}: cannot tell the layout from the columns {', '.join(sorted(row))}. "
        "Expected prompt, chosen and rejected; name it with dataset.format=..."
    )


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, format_names(), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


@register_format("trl", lambda row: {"chosen", "rejected"} <= set(row))
def trl(row: Row, where: str) -> PreferencePair:
    """Columns prompt, chosen, rejected: strings, or lists of messages.

    Without a prompt (or where the responses repeat it) chosen and rejected are whole conversations
    that agree but for their last turn.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    for column, value in (("chosen", chosen), ("rejected", rejected)):
        if value is None or value == "" or value == []:
            raise DataError(f"{where}: the pair has no {column} response.")
        if not isinstance(value, str | list):
            raise DataError(
                f"{where}: {column} is a {type(value).__name__}; expected text or messages."
            )
    history = _history(row.get("prompt"), where)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not history:
            raise DataError(f"{where}: there is no prompt; text responses need one.")
        return _pair(history, Message("assistant", chosen), Message("assistant", rejected), where)
    good, bad = messages(chosen, where, "chosen"), messages(rejected, where, "rejected")
    if not history or max(len(good), len(bad)) > 1:
        if good[:-1] != bad[:-1]:
            raise DataError(f"{where}: chosen and rejected do not continue the same conversation.")
        repeated = [(m.role, m.content.strip()) for m in good[:-1]]
        turns = [(m.role, m.content.strip()) for m in history]
        if len(turns) > len(repeated) and turns[len(turns) - len(repeated) :] == repeated:
            # The prompt has more, such as a system turn.
            return _pair(history, good[-1], bad[-1], where)
        if turns and repeated[len(repeated) - len(turns) :] != turns:
            raise DataError(
                f"{where}: chosen and rejected hold {len(good)} messages, but not the prompt. "
                "Put every turn but the last into the prompt, or leave the prompt out."
            )
        return _pair(good[:-1], good[-1], bad[-1], where)
    return _pair(history, good[-1], bad[-1], where)


def _history(prompt: Any, where: str) -> tuple[Message, ...]:
    """The turns before the response; none where the prompt column is missing or empty."""
    if prompt is None or prompt == "":
        return ()
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    return messages(prompt, where, "prompt")


def _pair(
    prompt: tuple[Message, ...], chosen: Message, rejected: Message, where: str
) -> PreferencePair:
    if not prompt:
        raise DataError(f"{where}: the prompt is empty.")
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.content.strip():
            raise DataError(f"{where}: the pair has no {name} response.")
        if response.role != "assistant":
            raise DataError(
                f"{where}: {name} ends in a turn of role {response.role!r}, expected 'assistant'."
            )
    if chosen == rejected:
        raise DataError(
            f"{where}: chosen and rejected are equal, so the pair says nothing. Remove the row."
        )
    return PreferencePair(prompt, chosen, rejected, where)
