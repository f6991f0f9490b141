"""Pairs of answers, the order in which a judge sees them, and how a judgement is found again."""

import hashlib
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mallowspo_cli.evaluation.judges.options import JudgeOptions
from mallowspo_cli.evaluation.outputs import BASE_WINS, MODEL_WINS, Output, printable


@dataclass(frozen=True)
class Pair:
    """Two answers to an instruction: the baseline's and the model's."""

    instruction: str
    output_1: str
    generator_1: str
    output_2: str
    generator_2: str
    dataset: str = ""


def pair_of(baseline: Output, model: Output) -> Pair:
    """Both answers to an instruction."""
    return Pair(
        model.instruction,
        baseline.output,
        baseline.generator,
        model.output,
        model.generator,
        model.dataset or baseline.dataset,
    )


@dataclass(frozen=True)
class Question:
    """A pair in the order in which it is shown."""

    pair: Pair
    switched: bool
    """Whether the second answer is shown first."""

    @property
    def key(self) -> str:
        """Names the texts and their order."""
        pair = self.pair
        text = json.dumps([pair.instruction, pair.output_1, pair.output_2, self.switched])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def shown(self) -> tuple[str, str]:
        """The answers, first and second as the judge sees them."""
        pair = self.pair
        return (pair.output_2, pair.output_1) if self.switched else (pair.output_1, pair.output_2)

    @property
    def order(self) -> str:
        """For people."""
        return "model first" if self.switched else "baseline first"


def questions_of(pair: Pair, options: JudgeOptions) -> list[Question]:
    """What is asked about a pair: one question, two with swap=both, none about equal answers."""
    if pair.output_1 == pair.output_2:
        return []
    if options.swap == "both":
        return [Question(pair, switched) for switched in (False, True)]
    return [Question(pair, is_switched(pair.instruction, options.seed))]


def all_questions(pairs: Sequence[Pair], options: JudgeOptions) -> dict[str, Question]:
    """The questions of all pairs by their key, in order, each once."""
    asked = (question for pair in pairs for question in questions_of(pair, options))
    return {question.key: question for question in asked}


def is_switched(instruction: str, seed: int) -> bool:
    """Whether the second answer is shown first: alpaca-eval's draw, so that its order is ours.

    That package seeds the draw with the instruction and its annotator's seed, 0 if nobody sets it.
    """
    draw = random.Random(f"is_switched_outputs{printable(instruction)}{seed}")
    return draw.choices([False, True], k=1)[0]


def answered(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The lines of a journal that hold a judgement, by key; the last of each."""
    return {str(line.get("key")): line for line in lines if _is_preference(line.get("preference"))}


def _is_preference(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and BASE_WINS <= value <= MODEL_WINS
