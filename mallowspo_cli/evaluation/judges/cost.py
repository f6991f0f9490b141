"""What judging will take: requests, tokens, US dollars, time."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.judges.annotators import Annotator
from mallowspo_cli.evaluation.judges.options import JudgeOptions, prices
from mallowspo_cli.evaluation.judges.pairwise import Pair, all_questions

LIST_PRICES = {
    "gpt-4-1106-preview": (10.0, 30.0),
    "gpt-4-turbo": (10.0, 30.0),
    "gpt-4o": (2.5, 10.0),
    "gpt-4o-mini": (0.15, 0.6),
    "gpt-4.1": (2.0, 8.0),
    "gpt-4.1-mini": (0.4, 1.6),
}
"""US dollars a million tokens in and out: list prices as of 2025, override with judge.price."""
CHARACTERS_PER_TOKEN = 4
"""Of English; other scripts have fewer, so that their cost is underestimated."""
SECONDS_PER_REQUEST, SECONDS_PER_TOKEN = 1.0, 0.02
"""Of a server of today, very roughly."""


@dataclass(frozen=True)
class Estimate:
    """What is still to be asked, before it is asked."""

    requests: int
    input_tokens: int
    """Characters / 4."""
    output_tokens: int
    """At most: the annotator's limit for each answer."""
    cost: float | None
    """US dollars; 0 for a judge on this machine, None where the price is not known."""
    seconds: float | None
    """Rough; None for a judge in this process."""


def estimate(
    pairs: Sequence[Pair], annotator: Annotator, options: JudgeOptions, done: Collection[str] = ()
) -> Estimate:
    """What judging these pairs would take.

    Args:
        done: keys of the questions that are answered already (`answered`).

    Raises:
        EvalError: it would cost more than judge.max_cost, or nobody knows what it would cost.
    """
    left = [q for key, q in all_questions(pairs, options).items() if key not in done]
    characters = 0
    for question in left:
        messages, _ = annotator.ask(question.pair.instruction, *question.shown)
        characters += sum(len(message["content"]) for message in messages)
    incoming = math.ceil(characters / CHARACTERS_PER_TOKEN)
    outgoing = len(left) * _longest_answer(annotator)
    model = options.model or annotator.model or ""
    cost = cost_of(incoming, outgoing, price_of(model, options))
    if options.max_cost is not None:
        _check(cost, options.max_cost, model, len(left))
    return Estimate(len(left), incoming, outgoing, cost, _seconds(len(left), outgoing, options))


def price_of(model: str, options: JudgeOptions) -> tuple[float, float] | None:
    """US dollars a million tokens in and out; None where they are not known."""
    if options.price is not None:
        return prices(options.price)
    if options.local:
        return 0.0, 0.0
    # gpt-4o-mini-2024-07-18 is a gpt-4o-mini, and no gpt-4o.
    known = [name for name in LIST_PRICES if model == name or model.startswith(f"{name}-")]
    return LIST_PRICES[max(known, key=len)] if known else None


def cost_of(incoming: int, outgoing: int, price: tuple[float, float] | None) -> float | None:
    """US dollars for so many tokens."""
    return None if price is None else (incoming * price[0] + outgoing * price[1]) / 1e6


def column_sum(rows: Iterable[dict[str, Any]], key: str) -> float | None:
    """The sum of a column; None where nobody knows any of it."""
    known = [value for row in rows if isinstance(value := row.get(key), int | float)]
    return sum(known) if known else None


def line_cost(rows: Iterable[dict[str, Any]], price: tuple[float, float] | None) -> float | None:
    """US dollars for the tokens of some lines of a journal."""
    rows = list(rows)
    incoming, outgoing = column_sum(rows, "input_tokens"), column_sum(rows, "output_tokens")
    return cost_of(int(incoming or 0), int(outgoing or 0), price)


def _longest_answer(annotator: Annotator) -> int:
    request = annotator.request
    return int(request.get("max_completion_tokens") or request.get("max_tokens") or 256)


def _seconds(requests: int, outgoing: int, options: JudgeOptions) -> float | None:
    if options.engine != "endpoint":
        return None
    each = SECONDS_PER_REQUEST + SECONDS_PER_TOKEN * outgoing / max(requests, 1)
    by_speed = requests * each / options.concurrency
    by_rate = requests * 60 / options.requests_per_minute if options.requests_per_minute else 0.0
    return max(by_speed, by_rate)


def _check(cost: float | None, most: float, model: str, requests: int) -> None:
    if cost is None:
        raise EvalError(
            f"judge.max_cost={most:g}, but the price of {model} is not known. Add "
            "judge.price=IN,OUT (US dollars a million tokens), or leave judge.max_cost out."
        )
    if cost > most:
        raise EvalError(
            f"{requests:,} questions would cost about {cost:.2f} US dollars, above "
            f"judge.max_cost={most:g}. Raise it, or judge fewer (eval.limit)."
        )
