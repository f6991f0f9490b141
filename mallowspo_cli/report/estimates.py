"""Means with their intervals, as text."""

from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, its first column to the left."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash where it is not known."""
    return "-" if value is None or value != value else f"{value:.{digits}f}"


def interval(entry: Mapping[str, Any], digits: int = 3) -> str:
    """The ends of an estimate's interval; a dash where it has none, as of a single prompt."""
    low, high = (number(entry[end], digits) for end in ("low", "high"))
    return "-" if "-" in (low, high) else f"[{low}, {high}]"


def with_interval(entry: Mapping[str, Any] | float | None, digits: int = 3) -> str:
    """A number, and its interval where it is an estimate that has one."""
    if not isinstance(entry, Mapping):
        return number(entry, digits)
    value, ends = number(entry["value"], digits), interval(entry, digits)
    return value if "-" in (value, ends) else f"{value} {ends}"
