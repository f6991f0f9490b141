"""Parsers of rankings and of JSON; see `verdicts`."""

import ast
import json
import re
import warnings
from dataclasses import dataclass
from typing import Any

from mallowspo_cli.evaluation.judges.replies import Reply, Unreadable, quoted, whole_text
from mallowspo_cli.evaluation.outputs import BASE_WINS, MODEL_WINS

OTHER_NAMES = {"model_1": "model_2", "m": "M"}
"""How AlpacaEval's prompts call the second answer where they call the first one so."""
OBJECT = r"\{[^][{}]*\}"
RANKING = re.compile(rf"\[\s*{OBJECT}(?:\s*,\s*{OBJECT})*(?:\s*,)?\s*\]")
"""A list of flat objects. Written so that no text makes the search slower than its length."""


@dataclass(frozen=True)
class Ranking:
    """A list of two objects with the keys `model` and `rank`, the better one with rank 1.

    AlpacaEval's ranking_parser, but stricter (both models, ranks 1 and 2) and with other text
    around the list allowed, as long as it holds no second one.
    """

    first: str = "model_1"
    """Name of the first answer."""
    second: str | None = "model_2"
    """Name of the second; None takes any other."""

    def __call__(self, reply: Reply) -> float:
        return self.read(whole_text(reply))

    def read(self, value: Any) -> float:
        """The preference in a text or in the list itself."""
        return self._ranked(_listed(value) if isinstance(value, str) else value)

    def _ranked(self, rows: Any) -> float:
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise Unreadable("the ranking is no list of objects")
        ranks = {row.get("model"): row.get("rank") for row in rows if _name(row.get("model"))}
        others = [name for name in ranks if name != self.first]
        both = len(rows) == 2 and self.first in ranks and len(others) == 1
        if not both or self.second not in (None, others[0]):
            # Names are decoded: the key in escapes would be the key itself here.
            second = "another" if self.second is None else repr(self.second)
            raise Unreadable(
                f"the ranking has other names; expected both answers, {self.first!r} and {second}"
            )
        first, second = ranks[self.first], ranks[others[0]]
        if not (_rank(first) and _rank(second)) or first == second:
            raise Unreadable("the ranks are not 1 and 2")
        return BASE_WINS if first == 1 else MODEL_WINS


@dataclass(frozen=True)
class Field:
    """A value in a JSON object, of the text or of a function call's arguments, read further.

    AlpacaEval's pipeline_meta_parser of json_parser and one more.
    """

    key: str | None
    """Of the value; None takes the whole."""
    then: "Ranking | Choice"
    """Reads the value."""

    def __call__(self, reply: Reply) -> float:
        text = whole_text(reply)
        if (fenced := re.search(r"```json(.*?)```", text, re.DOTALL)) is not None:
            text = fenced.group(1)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"{quoted(text)} is no JSON") from error
        if self.key is None:
            return self.then.read(value)
        if not isinstance(value, dict) or self.key not in value:
            raise Unreadable(f"{quoted(text)} has no {self.key!r}")
        return self.then.read(value[self.key])


@dataclass(frozen=True)
class Choice:
    """A value that stands for a preference (AlpacaEval's replace_parser)."""

    values: tuple[tuple[Any, float], ...]

    def read(self, value: Any) -> float:
        """The preference of a value."""
        for name, preference in self.values:
            # True is not 1 here.
            if type(name) is type(value) and name == value:
                return preference
        raise Unreadable(f"the value is none of {', '.join(repr(name) for name, _ in self.values)}")


def _listed(text: str) -> Any:
    """The only list of objects in a text, in the spelling of JSON or of Python."""
    found = RANKING.findall(text)
    if len(found) != 1:
        raise Unreadable(f"{len(found) or 'no'} rankings are in {quoted(text)}")
    try:
        return json.loads(found[0])
    except ValueError:
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.literal_eval(found[0])
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise Unreadable(f"{quoted(found[0])} is no list") from error


def _name(value: Any) -> bool:
    return isinstance(value, str)


def _rank(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and value in (1, 2)
