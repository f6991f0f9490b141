"""What a journal of judgements says of some pairs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mallowspo_cli.evaluation.judges.cost import column_sum, line_cost
from mallowspo_cli.evaluation.judges.options import JudgeOptions
from mallowspo_cli.evaluation.judges.pairwise import Pair, Question, answered, questions_of
from mallowspo_cli.evaluation.outputs import DRAW, Annotation

UNKNOWN = "it was not answered"


@dataclass(frozen=True)
class Failure:
    """A question without a readable answer."""

    instruction: str
    order: str
    reason: str


@dataclass(frozen=True)
class Judged:
    """What a judge has found."""

    annotations: list[Annotation]
    """One a pair, in the order of the pairs; a failed one has NaN as its preference."""
    failures: list[Failure]
    asked: int
    """Questions asked this time; the others had been answered before."""
    order_agreement: float | None
    """With swap=both: share of pairs of which both orders name the same winner."""
    first_shown_wins: float | None
    """Share of answers for the one that was shown first, draws half; 0.5 without position bias."""
    broken_spellings: int
    """Spellings of special tokens in instructions and answers that were broken with a space."""
    input_tokens: int
    """As the server counts them, over all lines of the journal about these questions: also those
    that failed and were asked again."""
    output_tokens: int
    cost: float | None
    """US dollars for these tokens; None where the price is not known."""

    @property
    def failed_share(self) -> float:
        """Share of pairs without a preference, for judge.max_failures."""
        failed = sum(math.isnan(row.preference) for row in self.annotations)
        return failed / max(len(self.annotations), 1)


def together(
    pairs: Sequence[Pair],
    questions: dict[str, Question],
    lines: Sequence[dict[str, Any]],
    options: JudgeOptions,
    annotator: str,
    price: tuple[float, float] | None,
    asked: int,
    broken: int,
) -> Judged:
    """All that the journal knows of these pairs."""
    done = answered(lines)
    rows = {str(line.get("key")): {**line, "preference": math.nan} for line in lines} | done
    unknown = {"preference": math.nan, "failure": UNKNOWN}
    by_question = {key: rows.get(key, unknown) for key in questions}
    annotations, agreements = [], []
    for pair in pairs:
        found = [by_question[question.key] for question in questions_of(pair, options)]
        preferences = [row["preference"] for row in found] or [DRAW]
        mean = sum(preferences) / len(preferences)
        if len(found) == 2 and not math.isnan(mean):
            agreements.append(_side(preferences[0]) == _side(preferences[1]))
        annotations.append(
            Annotation(
                **vars(pair),
                annotator=annotator,
                preference=mean,
                raw_completion=_raw(found),
                price_per_example=line_cost(found, price),
                time_per_example=column_sum(found, "seconds"),
            )
        )
    paid = [line for line in lines if str(line.get("key")) in questions]
    failed = {key: question for key, question in questions.items() if key not in done}
    firsts = [_first_wins(row) for key, row in by_question.items() if key in done]
    return Judged(
        annotations=annotations,
        failures=[
            Failure(
                question.pair.instruction, question.order, by_question[key].get("failure", UNKNOWN)
            )
            for key, question in failed.items()
        ],
        asked=asked,
        order_agreement=_mean(agreements),
        first_shown_wins=_mean(firsts),
        broken_spellings=broken,
        input_tokens=int(column_sum(paid, "input_tokens") or 0),
        output_tokens=int(column_sum(paid, "output_tokens") or 0),
        cost=line_cost(paid, price),
    )


def _raw(rows: Sequence[dict[str, Any]]) -> Any:
    """What the judge wrote; a list where it was asked twice."""
    raw = [row.get("raw") for row in rows]
    return raw if len(raw) > 1 else next(iter(raw), None)


def _side(preference: float) -> int:
    return (preference > DRAW) - (preference < DRAW)


def _first_wins(row: dict[str, Any]) -> float:
    """1 where the answer that was shown first won, 0 where it lost, 1/2 for a draw."""
    side = _side(row["preference"])
    return (1 + (side if row.get("switched") else -side)) / 2


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
