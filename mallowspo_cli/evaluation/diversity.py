"""How diverse sampled answers are: within an answer, and between the answers to one prompt.

A word is a run of letters and digits, or a single other mark, in lower case. All values are of one
prompt first, means over its answers; models are compared by means over prompts.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

from mallowspo_cli.errors import EvalError, first_line
from mallowspo_cli.evaluation.strata import mean_known

Floats = NDArray[np.float64]
WORD = re.compile(r"\w+|[^\w\s]")
ORDERS = (1, 2, 3)
"""n of distinct-n."""
FIRST_WORDS = 50
"""Distinct-n falls with length: over as many words of every answer it can be compared."""
BLEU_ORDERS = 4
REPEATED = 4
"""Length in words of what counts as repeated."""
LOOP_TIMES, LOOP_WORDS, LONGEST_PERIOD = 3, 12, 100
"""An answer ends in a loop when its last words are at least so many times the same, and at least so
many; a longer period is not looked for."""


@dataclass(frozen=True)
class Answer:
    """One sample of a model."""

    text: str
    tokens: int
    cut: bool
    """Whether it reached its longest length instead of its end."""


def read_answers(path: Path) -> tuple[dict[str, Any], dict[str, list[Answer]]]:
    """Settings and answers, by instruction, of a generations.jsonl; a last line cut short is none.

    Raises:
        EvalError: it cannot be read, or holds no answer.
    """
    try:
        content = path.read_bytes()
        settings, *rows = [
            json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()
        ]
        found: dict[str, list[Answer]] = {}
        for row in sorted(rows, key=lambda row: (row["index"], row["sample"])):
            answer = Answer(str(row["output"]), int(row["tokens"]), row["finish"] == "length")
            found.setdefault(str(row["instruction"]), []).append(answer)
    except OSError as error:
        raise EvalError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise EvalError(
            f"{path} does not hold generations ({type(error).__name__}: {first_line(error)}). "
            "Expected what `mallowspo eval alpacaeval` writes."
        ) from error
    if not found:
        raise EvalError(f"{path} holds no answer yet. Let its evaluation go on.")
    return settings, found


def words_of(text: str) -> list[str]:
    """The words of a text, as the module's docstring says."""
    return WORD.findall(text.lower())


def distinct(answers: Iterable[Sequence[str]], order: int) -> float:
    """Distinct-n (Li et al. 2016): different n-grams as a share of all, over the answers together.

    No n-gram spans two answers. NaN where there is none.
    """
    counts = Counter(gram for words in answers for gram in _grams(words, order))
    return len(counts) / counts.total() if counts else math.nan


def ends_in_loop(words: Sequence[str]) -> bool:
    """Whether the last words are one passage again and again; see LOOP_TIMES."""
    for period in range(1, min(len(words) // LOOP_TIMES, LONGEST_PERIOD) + 1):
        equal = 0
        while equal + period < len(words) and words[-1 - equal] == words[-1 - equal - period]:
            equal += 1
        if equal >= (LOOP_TIMES - 1) * period and equal + period >= LOOP_WORDS:
            return True
    return False


def self_bleu(answers: Sequence[Sequence[str]]) -> float:
    """Mean BLEU-4 of each answer with the others as its references (Zhu et al. 2018); 1: all alike.

    Orders above 1 are smoothed by adding 1 to matches and total (Lin and Och 2004); an answer of
    fewer than four words has that many orders. NaN with fewer than two answers.
    """
    if len(answers) < 2:
        return math.nan
    grams = [[Counter(_grams(a, n)) for n in range(1, BLEU_ORDERS + 1)] for a in answers]
    return mean_known(
        _bleu(len(words), grams[i], [g for j, g in enumerate(grams) if j != i])
        for i, words in enumerate(answers)
    )


def _bleu(
    length: int, own: Sequence[Counter[Hashable]], others: Sequence[Sequence[Counter[Hashable]]]
) -> float:
    """BLEU of an answer of `length` words by its n-grams and its references', order by order."""
    lengths = [reference[0].total() for reference in others]
    if length == 0:
        return float(0 in lengths)
    orders = min(BLEU_ORDERS, length)
    total = 0.0
    for order in range(orders):
        matched = sum(
            min(count, max(reference[order][gram] for reference in others))
            for gram, count in own[order].items()
        )
        added = int(order > 0)
        if matched + added == 0:
            return 0.0
        total += math.log((matched + added) / (length - order + added))
    closest = min(lengths, key=lambda other: (abs(other - length), other))
    return math.exp(total / orders + min(0.0, 1 - closest / length))


def tfidf_diversity(prompts: Sequence[Sequence[str]]) -> list[float]:
    """1 - mean cosine of the TF-IDF vectors of two answers to a prompt; 0: all alike.

    Weights of words come from all answers together, so values are comparable within one call, and
    only about so between models. NaN with fewer than two answers, or where none has a word.
    """
    texts = [text for answers in prompts for text in answers]
    if not any(map(words_of, texts)):
        return [math.nan] * len(prompts)
    rows: Any = TfidfVectorizer(analyzer=words_of).fit_transform(texts)  # type: ignore[arg-type]
    found, start = [], 0
    for answers in prompts:
        part = rows[start : start + len(answers)]
        start += len(answers)
        cosines = (part @ part.T).toarray()
        found.append(mean_known(1 - cosines[i, j] for i, j in combinations(range(len(answers)), 2)))
    return found


def prompt_values(prompts: Sequence[Sequence[Answer]]) -> dict[str, Floats]:
    """(N,) for each metric: its value of each prompt, NaN where it is not defined."""
    columns: dict[str, list[float]] = {}
    for answers in prompts:
        for name, value in _values(answers).items():
            columns.setdefault(name, []).append(value)
    columns["tfidf_diversity"] = tfidf_diversity([[a.text for a in group] for group in prompts])
    return {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}


def _values(answers: Sequence[Answer]) -> dict[str, float]:
    words = [words_of(answer.text) for answer in answers]
    # Shorter ones are left out: they would have less room to repeat themselves.
    starts = [one[:FIRST_WORDS] for one in words if len(one) >= FIRST_WORDS]
    values = {
        "tokens": mean_known(answer.tokens for answer in answers),
        "words": mean_known(map(len, words)),
        "cut": mean_known(answer.cut for answer in answers),
        "repeated": mean_known(1 - distinct([one], REPEATED) for one in words),
        "ends_in_loop": mean_known(map(ends_in_loop, words)),
    }
    several = len(answers) > 1
    for order in ORDERS:
        values[f"distinct_{order}"] = mean_known(distinct([one], order) for one in words)
        values[f"distinct_{order}_start"] = mean_known(distinct([one], order) for one in starts)
        between = distinct(words, order) if several else math.nan
        # Of fewer answers it would be larger.
        whole = several and len(starts) == len(words)
        values[f"between_{order}"] = between
        values[f"between_{order}_start"] = distinct(starts, order) if whole else math.nan
    return values | {"self_bleu": self_bleu(words)}


def _grams(words: Sequence[str], order: int) -> Iterable[Hashable]:
    return zip(*(words[start:] for start in range(order)), strict=False)
