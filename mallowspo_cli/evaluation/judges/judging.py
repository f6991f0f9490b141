"""The judge stage: pairs of answers in, preferences out, one journal line for each answer."""

from collections.abc import Sequence
from typing import Any, Protocol

from mallowspo_cli.distributed import log, progress
from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.journal import Journal
from mallowspo_cli.evaluation.judges.annotators import Annotator, find_annotator
from mallowspo_cli.evaluation.judges.cost import Estimate, estimate, line_cost, price_of
from mallowspo_cli.evaluation.judges.endpoint import Endpoint
from mallowspo_cli.evaluation.judges.judged import Failure, Judged, together
from mallowspo_cli.evaluation.judges.options import JudgeOptions, settings
from mallowspo_cli.evaluation.judges.pairwise import Pair, Question, all_questions, answered
from mallowspo_cli.evaluation.judges.replies import Messages, NoLogprobs, OnReply, Reply, Unreadable

__all__ = [
    "Endpoint",
    "Estimate",
    "Failure",
    "Judge",
    "JudgeOptions",
    "Judged",
    "Pair",
    "answered",
    "estimate",
    "find_annotator",
    "judge_pairs",
    "settings",
]

MAX_RAW = 4_000
"""So many characters of an answer are kept."""
MAX_WITHOUT_LOGPROBS = 16
"""So many answers in a row without log-probs show that the server gives none."""


class Judge(Protocol):
    """`Endpoint` or `LocalJudge`."""

    name: str
    """Of its model."""

    def ask(self, questions: Sequence[Messages], pending: Sequence[int], on_reply: OnReply) -> None:
        """Ask those of `questions` that are in `pending`, handing each answer on at once."""

    def redact(self, text: str) -> str:
        """The text without what may be stored nowhere (the key)."""
        ...


def judge_pairs(
    pairs: Sequence[Pair],
    annotator: Annotator,
    judge: Judge,
    options: JudgeOptions,
    journal: Journal,
) -> Judged:
    """Ask what the journal does not know yet, and put all answers together.

    The result depends on the answers alone, not on the order in which they came. A failed question
    is asked again the next time. Equal answers are a draw that nobody is asked about.

    Args:
        journal: opened with `settings`.

    Raises:
        EvalError: the judge cannot go on, gives no log-probs where they are needed, or has cost
            more than judge.max_cost, with what earlier runs wrote into the journal. What was
            answered is in the journal.
    """
    questions = all_questions(pairs, options)
    asked = [annotator.ask(q.pair.instruction, *q.shown) for q in questions.values()]
    done = answered(journal.lines)
    pending = [number for number, key in enumerate(questions) if key not in done]
    price = price_of(judge.name, options)
    with progress("judging", len(pending), "answers") as advance:
        notes = _Notes(list(questions.values()), annotator, judge, options, journal, price)
        if pending:
            notes.check_cost()

        def on_reply(number: int, answer: Reply | Unreadable) -> None:
            notes.take(number, answer)
            advance(1)

        judge.ask([messages for messages, _ in asked], pending, on_reply)
    broken = sum(count for _, count in asked)
    if broken:
        log.info("broke %d spellings of special tokens in instructions and answers", broken)
    name = annotator.name
    if judge.name != annotator.model:
        name += f"@{judge.name}"
    return together(pairs, questions, journal.lines, options, name, price, len(pending), broken)


class _Notes:
    """Writes each answer into the journal, and stops what leads nowhere."""

    def __init__(
        self,
        questions: Sequence[Question],
        annotator: Annotator,
        judge: Judge,
        options: JudgeOptions,
        journal: Journal,
        price: tuple[float, float] | None,
    ):
        self.questions, self.annotator, self.judge = questions, annotator, judge
        self.options = options
        self.journal, self.price = journal, price
        self.without_logprobs = 0
        """In a row."""
        self.cost = line_cost(journal.lines, price) or 0.0
        """US dollars, of all lines, those of earlier runs and of failures among them."""

    def take(self, number: int, answer: Reply | Unreadable) -> None:
        """Read an answer and write its line.

        Raises:
            EvalError: see `judge_pairs`.
        """
        question = self.questions[number]
        line: dict[str, Any] = {"key": question.key, "switched": question.switched}
        try:
            line |= {"input_tokens": answer.input_tokens, "output_tokens": answer.output_tokens}
            if isinstance(answer, Unreadable):
                raise answer
            line |= {"raw": answer.content[:MAX_RAW], "seconds": answer.seconds}
            shown = self.annotator.parse(answer)
            line["preference"] = 3 - shown if question.switched else shown
            self.without_logprobs = 0
        except Unreadable as error:
            line["failure"] = self.judge.redact(str(error))
            self.without_logprobs += isinstance(error, NoLogprobs)
        self.journal.append(line)
        self._check(line)

    def _check(self, line: dict[str, Any]) -> None:
        if self.without_logprobs >= MAX_WITHOUT_LOGPROBS:
            raise EvalError(
                f"the judge's server gives no log-probs, which the annotator {self.annotator.name} "
                "reads. Take one that does not: judge.annotator=pairwise_ranking, say."
            )
        self.cost += line_cost([line], self.price) or 0.0
        self.check_cost()

    def check_cost(self) -> None:
        """Stop where more is spent than may be.

        Raises:
            EvalError: it is.
        """
        most = self.options.max_cost
        if most is not None and self.cost > most:
            raise EvalError(
                f"the judge has cost {self.cost:.2f} US dollars, above judge.max_cost={most:g}. "
                "Answers so far are kept: with a higher one the same command goes on."
            )
