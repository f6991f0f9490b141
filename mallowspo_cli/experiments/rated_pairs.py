"""Pairs of rated texts, from consensus to disagreement."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mallowspo_cli.experiments.correlations import rank_matrix
from mallowspo_cli.experiments.rated_texts import Floats, RatedTexts

STRATA: Final = 5
"""Equal parts of [0, 1] from which pairs are drawn in turn, by phi_human."""


LENGTH_RATIO: Final = 1.1
"""The longer text of a pair has at most so many times the characters of the shorter."""


@dataclass(frozen=True)
class RatedPairs:
    """Pairs of texts, each text in at most one pair."""

    better: NDArray[np.int64]
    """(P,): index of the text that raters prefer; where p is 1/2, either."""
    worse: NDArray[np.int64]
    phi: Floats
    """(P,): phi_human."""
    strata: list[int]
    """Pairs of each stratum, from consensus to disagreement."""


def probability_above(first: Floats, second: Floats) -> Floats:
    """(N,): probability that a random rating of `first` is above one of `second`, ties half.

    `first` and `second` are counts or shares of each rating, (N, 9); one of them may be (1, 9).
    """
    share = first / first.sum(axis=1, keepdims=True)
    other = second / second.sum(axis=1, keepdims=True)
    # Of `other`, what lies below each rating, and half of what is equal.
    return (share * (other.cumsum(axis=1) - other / 2)).sum(axis=1)


def human_phi(probability: Floats) -> Floats:
    """Mallows phi of two responses: min(p, 1 - p) / max(p, 1 - p); 0 is consensus, 1 chance."""
    return np.minimum(probability, 1 - probability) / np.maximum(probability, 1 - probability)


def draw_pairs(corpus: RatedTexts, num_pairs: int, seed: int) -> RatedPairs:
    """Pairs of texts of like length, spread evenly over phi_human, each text at most once.

    The strata take turns. For its turn a stratum goes through the texts in an order of its own, and
    joins the first that has partners (unused, of like length, with a phi of the stratum) to one of
    them at random. A stratum without any leaves its turns to the others.
    """
    generator = np.random.default_rng(seed)
    lengths = np.asarray([len(text) for text in corpus.texts], dtype=np.float64)
    unused = np.ones(len(lengths), dtype=bool)
    queues = {s: iter(generator.permutation(len(lengths))) for s in range(STRATA)}
    better, worse, phis, strata = [], [], [], [0] * STRATA
    while queues and len(phis) < num_pairs:
        for stratum in list(queues):
            found = _next_pair(corpus, lengths, unused, queues[stratum], stratum, generator)
            if found is None:
                del queues[stratum]
                continue
            first, second, probability = found
            unused[[first, second]] = False
            better.append(first if probability >= 0.5 else second)
            worse.append(second if probability >= 0.5 else first)
            phis.append(float(human_phi(np.asarray(probability))))
            strata[stratum] += 1
            if len(phis) == num_pairs:
                break
    return RatedPairs(np.asarray(better), np.asarray(worse), np.asarray(phis), strata)


def _next_pair(
    corpus: RatedTexts,
    lengths: Floats,
    unused: NDArray[np.bool_],
    queue: Iterator[int],
    stratum: int,
    generator: np.random.Generator,
) -> tuple[int, int, float] | None:
    """(first, second, p) of the next pair of a stratum."""
    for first in queue:
        if not unused[first]:
            continue
        like = (lengths <= lengths[first] * LENGTH_RATIO) & (
            lengths * LENGTH_RATIO >= lengths[first]
        )
        like &= unused
        like[first] = False
        others = np.flatnonzero(like)
        probability = probability_above(corpus.counts[[first]], corpus.counts[others])
        fitting = np.flatnonzero(_stratum(human_phi(probability)) == stratum)
        if len(fitting):
            chosen = int(generator.choice(fitting))
            return int(first), int(others[chosen]), float(probability[chosen])
    return None


def _stratum(phi: Floats) -> NDArray[np.int64]:
    return np.minimum((phi * STRATA).astype(np.int64), STRATA - 1)


def reliability(corpus: RatedTexts, pairs: RatedPairs, seed: int) -> float:
    """How well another set of as many raters would repeat the ranks of phi_human, 0 to 1.

    Spearman correlation of phi between two random halves of each text's raters, stepped up by
    Spearman and Brown's formula. No estimate can be expected to correlate with phi_human by more
    than the square root of it.
    """
    generator = np.random.default_rng(seed)
    whole = corpus.counts.astype(np.int64)
    drawn = [generator.multivariate_hypergeometric(row, int(row.sum()) // 2) for row in whole]
    half = np.asarray(drawn, dtype=np.float64)
    columns = [
        human_phi(probability_above(part[pairs.better], part[pairs.worse]))
        for part in (half, corpus.counts - half)
    ]
    r = float(rank_matrix([np.stack(columns, axis=1)])[0, 1])
    return 2 * r / (1 + r)
