"""Parsers: from a judge's reply to a preference between the two answers as they were shown.

A preference is in [1, 2]: 1 where the first answer is better, 2 where the second is. Whatever is
not clearly a verdict raises `Unreadable`, and so counts for neither answer.
"""

import math
import re
from dataclasses import dataclass
from typing import Protocol

from mallowspo_cli.evaluation.judges.replies import (
    NoLogprobs,
    Reply,
    Unreadable,
    quoted,
    whole_text,
)
from mallowspo_cli.evaluation.outputs import BASE_WINS, DRAW, MODEL_WINS

ABSENT = -9999.0
"""What servers write as the log-prob of a token that is not among the most probable ones."""


class Parser(Protocol):
    """Reads the preference from a reply."""

    def __call__(self, reply: Reply) -> float: ...


@dataclass(frozen=True)
class Weighted:
    """The judge's probability: p(first) / sum of p(tokens), among the most probable tokens.

    AlpacaEval's logprob_parser, but for a draw where `binary` finds both equally probable.
    """

    first: str
    """Token that says that the first answer is better."""
    tokens: tuple[str, ...]
    """All tokens that are a verdict, `first` among them."""
    position: int = 0
    """Of the token that is the verdict; -1 is the last."""
    binary: bool = False
    """Whether to take the most probable verdict whole."""
    stripped: bool = False
    """Whether spaces around a token do not matter."""
    letter: bool = False
    """Whether the written token is the verdict where the server gives no log-probs."""

    def __call__(self, reply: Reply) -> float:
        if not reply.logprobs:
            return self._written(reply)
        if self.position != 0 and reply.cut:
            raise Unreadable("the answer was cut off before its verdict (max_tokens)")
        if not -len(reply.logprobs) <= self.position < len(reply.logprobs):
            raise Unreadable(f"there are log-probs of {len(reply.logprobs)} tokens only")
        found = self._found(reply.logprobs[self.position])
        if not found:
            raise Unreadable(
                f"none of {', '.join(map(repr, self.tokens))} is among the most probable tokens of "
                f"{quoted(reply.text)}"
            )
        highest = max(found.values())
        weights = {token: math.exp(value - highest) for token, value in found.items()}
        share = weights.get(self.first, 0.0) / sum(weights.values())
        if not self.binary:
            return MODEL_WINS - share
        others = max((w for token, w in weights.items() if token != self.first), default=0.0)
        return _sign(weights.get(self.first, 0.0), others)

    def _found(self, top: tuple[tuple[str, float], ...]) -> dict[str, float]:
        """Log-prob of each verdict that is there; that of several spellings is their sum."""
        found: dict[str, list[float]] = {}
        for token, value in top:
            name = token.strip() if self.stripped else token
            if name not in self.tokens or value <= ABSENT:
                continue
            if not math.isfinite(value) or value > 1e-6:
                raise Unreadable(f"the log-prob of {quoted(token)} is {value}; expected at most 0")
            found.setdefault(name, []).append(value)
        return {name: _log_sum(values) for name, values in found.items()}

    def _written(self, reply: Reply) -> float:
        if not self.letter:
            raise NoLogprobs("the server gives no log-probs")
        token = reply.text.strip()
        if token not in self.tokens:
            raise Unreadable(f"{quoted(reply.text)} is no verdict")
        return BASE_WINS if token == self.first else MODEL_WINS


@dataclass(frozen=True)
class Pattern:
    """A regular expression for each verdict, of which just one may match, and once.

    AlpacaEval's regex_parser for one question at a time.
    """

    patterns: tuple[tuple[float, str], ...]
    """(preference, regular expression)."""
    last_line: bool = False
    """Whether to look at the last line alone, which has to match from its beginning to its end."""

    def __call__(self, reply: Reply) -> float:
        text = whole_text(reply)
        if self.last_line:
            if reply.cut:
                raise Unreadable("the answer was cut off before its verdict (max_tokens)")
            lines = [line.strip() for line in text.split("\n") if line.strip()]
            last = lines[-1] if lines else ""
            found = [value for value, pattern in self.patterns if re.fullmatch(pattern, last)]
        else:
            found = self._in_turn(text)
        if len(found) != 1:
            count = "no verdict is" if not found else f"{len(found)} verdicts are"
            raise Unreadable(f"{count} in {quoted(text[-60:])}")
        return found[0]

    def _in_turn(self, text: str) -> list[float]:
        """The verdicts in the order of their place; what one has matched is not read again."""
        found: list[float] = []
        while len(found) < 2:
            matches = [(re.search(pattern, text), value) for value, pattern in self.patterns]
            places = [(m.start(), m.end(), value) for m, value in matches if m is not None]
            if not places:
                break
            _, end, value = min(places, key=lambda place: place[0])
            found.append(value)
            # A beginning of the text (^) is also where the last match has ended.
            text = text[max(end, 1) :]
        return found


@dataclass(frozen=True)
class Scores:
    """Two numbers on the first line, the higher for the better answer (AlpacaEval's lmsys_parser).

    Equal numbers are a draw.
    """

    def __call__(self, reply: Reply) -> float:
        line = whole_text(reply).split("\n")[0]
        parts = line.replace(",", " ").split()
        try:
            first, second = (float(part) for part in parts)
        except ValueError as error:
            raise Unreadable(f"{quoted(line)} is no pair of scores") from error
        if not math.isfinite(first) or not math.isfinite(second):
            raise Unreadable(f"{quoted(line)} is no pair of scores")
        return _sign(first, second)


def _sign(first: float, second: float) -> float:
    return DRAW if first == second else BASE_WINS if first > second else MODEL_WINS


def _log_sum(values: list[float]) -> float:
    highest = max(values)
    return highest + math.log(sum(math.exp(value - highest) for value in values))
