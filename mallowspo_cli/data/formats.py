"""Layouts of preference data: one function turns a raw row into a PreferencePair."""

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
                f"dataset.format={name} is not known. Choices: {', '.join(format_names())}."
            )
        return _FORMATS[name]
    for key, detect in _DETECTORS.items():
        if detect(row):
            return _FORMATS[key]
    raise DataError(
        f"{where}: cannot tell the layout from the columns {', '.join(sorted(row))}. "
        "Expected prompt, chosen and rejected; name it with dataset.format=..."
    )


@register_format("trl", lambda row: {"chosen", "rejected"} <= set(row))
def trl(row: Row, where: str) -> PreferencePair:
    """Columns prompt, chosen, rejected: strings, or lists of messages.

    Without a prompt (or where the responses repeat it) chosen and rejected are whole conversations
    that agree but for their last turn.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    for column, value in (("chosen", chosen), ("rejected", rejected)):
        if value is None or len(value) == 0:
            raise DataError(f"{where}: the pair has no {column} response.")
    prompt = row.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            raise DataError(f"{where}: there is no prompt; text responses need one.")
        history = (Message("user", prompt),) if isinstance(prompt, str) else None
        history = history or messages(prompt, where, "prompt")
        return _pair(history, Message("assistant", chosen), Message("assistant", rejected), where)
    good, bad = messages(chosen, where, "chosen"), messages(rejected, where, "rejected")
    if prompt is None or len(good) > 1:
        if good[:-1] != bad[:-1]:
            raise DataError(f"{where}: chosen and rejected do not continue the same conversation.")
        return _pair(good[:-1], good[-1], bad[-1], where)
    history = (Message("user", prompt),) if isinstance(prompt, str) else None
    return _pair(history or messages(prompt, where, "prompt"), good[-1], bad[-1], where)


def _pair(
    prompt: tuple[Message, ...], chosen: Message, rejected: Message, where: str
) -> PreferencePair:
    if not prompt:
        raise DataError(f"{where}: the prompt is empty.")
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.content.strip():
            raise DataError(f"{where}: the pair has no {name} response.")
    if chosen == rejected:
        raise DataError(
            f"{where}: chosen and rejected are equal, so the pair says nothing. Remove the row."
        )
    return PreferencePair(prompt, chosen, rejected, where)
