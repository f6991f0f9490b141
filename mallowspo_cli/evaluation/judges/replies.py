"""What a judge says, read from the body of its answer. Nothing in it is trusted."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mallowspo_cli.evaluation.outputs import printable

Messages = list[dict[str, str]]
"""A question to a judge: messages with `role` and `content`."""
TopLogprobs = tuple[tuple[str, float], ...]
"""The most probable tokens of one position: (text, log-prob in nats), NaN where it is no number."""
MAX_CHARACTERS = 20_000
"""A longer text is no verdict."""
MAX_TOKENS = 10**9
"""A count of tokens above this is no count."""


class Unreadable(Exception):  # noqa: N818 - what a judgement is, not an error of this program
    """No preference can be read from what the judge answered; the text says why."""

    input_tokens: int | None = None
    """What it has cost all the same, where the server says so."""
    output_tokens: int | None = None


class NoLogprobs(Unreadable):
    """The answer lacks the log-probs that the annotator reads."""


@dataclass(frozen=True)
class Reply:
    """A judge's answer to one question."""

    text: str
    """What it wrote; empty where it only called a function."""
    arguments: str | None = None
    """The JSON text of the function call, where there is one."""
    logprobs: tuple[TopLogprobs, ...] = ()
    """For each token that it wrote; empty where the server gives none."""
    cut: bool = False
    """Whether it was ended by the limit on its length."""
    input_tokens: int | None = None
    output_tokens: int | None = None
    seconds: float | None = None

    @property
    def content(self) -> str:
        """The function call's arguments, else the text."""
        return self.text if self.arguments is None else self.arguments


OnReply = Callable[[int, Reply | Unreadable], None]
"""Is called with the number of a question and its answer, as soon as it is there."""


def read_reply(body: bytes, clean: Callable[[str], str] = str) -> Reply:
    """The reply in the body of a chat completion.

    Args:
        clean: is applied to each text from the body.

    Raises:
        Unreadable: it is no chat completion, or an empty one.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"the answer is no JSON ({len(body):,} bytes)") from error
    usage = value.get("usage") if isinstance(value, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    incoming, outgoing = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    try:
        return replace(_read(value, clean), input_tokens=incoming, output_tokens=outgoing)
    except Unreadable as error:
        error.input_tokens, error.output_tokens = incoming, outgoing
        raise


def whole_text(reply: Reply) -> str:
    """What the judge wrote, unless it is empty or too long to be a verdict."""
    text = reply.content
    if not text.strip():
        raise Unreadable("the answer is empty")
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"the answer has {len(text):,} characters; at most {MAX_CHARACTERS:,}")
    return text


def quoted(text: str, limit: int = 60) -> str:
    """The beginning of a text in quotes, on one line, without control characters."""
    return repr(text if len(text) <= limit else text[:limit] + "...")


def _read(value: Any, clean: Callable[[str], str]) -> Reply:
    choice = _first(value, "choices")
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Unreadable("the answer has no message")
    text, arguments = message.get("content"), _arguments(message)
    if not isinstance(text, str) and (text is not None or arguments is None):
        raise Unreadable(f"the message's content is {_kind(text)}; expected a text")
    return Reply(
        text=clean(printable(text or "")),
        arguments=None if arguments is None else clean(printable(arguments)),
        logprobs=_logprobs(choice),
        cut=choice.get("finish_reason") == "length",
    )


def _first(value: Any, name: str) -> dict[str, Any]:
    listed = value.get(name) if isinstance(value, dict) else None
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict):
        raise Unreadable(f"the answer has no {name}")
    return listed[0]


def _arguments(message: dict[str, Any]) -> str | None:
    if not message.get("tool_calls"):
        return None
    function = _first(message, "tool_calls").get("function")
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str):
        raise Unreadable(f"the function call's arguments are {_kind(arguments)}; expected a text")
    return arguments


def _logprobs(choice: dict[str, Any]) -> tuple[TopLogprobs, ...]:
    """Top log-probs by position, as far as they have the form that the protocol gives them."""
    logprobs = choice.get("logprobs")
    positions = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(positions, list):
        return ()
    tops = [p.get("top_logprobs") if isinstance(p, dict) else None for p in positions]
    if not any(isinstance(top, list) and top for top in tops):
        return ()
    return tuple(
        tuple(
            (item["token"], _number(item.get("logprob")))
            for item in (top if isinstance(top, list) else ())
            if isinstance(item, dict) and isinstance(item.get("token"), str)
        )
        for top in tops
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    # A whole number of JSON can be too large for a float.
    return float(value) if abs(value) < MAX_TOKENS else math.nan


def _count(value: Any) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value < MAX_TOKENS else None


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
