"""Pure: several raters' scores of K responses to one prompt -> theta = -log phi of the prompt.

The maximum-likelihood Mallows model under the Kendall tau distance: its central order is the Kemeny
consensus (the order of the least mean distance), and its phi gives that mean distance as the
expected one (the first-order condition of the exponential family; derived).

A rater's scores give a weak order. Where it is no ranking of all K responses:

- A pair that a rater ties is half discordant with either order: its expected distance when ties are
  broken at random.
- A pair that a rater did not score on both sides is left out of that pair's mean. The mean distance
  is the sum over pairs of each pair's own discordance rate, so no pair counts more for being scored
  more often; a pair that nobody scored counts as the mean of the others. With every score present
  this is the mean distance itself. Otherwise it is unbiased, for a given order, where scores are
  missing independently of what they would have been.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from typing import Final

from mallowspo_cli.errors import DataError

HIGHEST_THETA: Final = -math.log(1e-6)
"""theta where all raters agree: phi is not taken to be below 1e-6."""
EXACT_ITEMS: Final = 8
"""Most responses whose consensus is found exactly."""

Scores = Sequence[Sequence[float | None]]
Rates = list[list[float]]


def neg_log_phi(scores: Scores) -> float:
    """theta = -log phi of one prompt, in [0, HIGHEST_THETA]; 0 is chance, high is consensus.

    Rows of `scores` are raters, columns the K responses; None or NaN where a rater gave no score.
    Only the order of a rater's scores counts. NaN where no two raters have two responses in common,
    so with fewer than two raters or two responses.

    Raises:
        DataError: raters with different numbers of scores.
    """
    rates = discordance(scores)
    pairs = combinations(range(len(rates)), 2)
    if not any(len(_of_both(scores, i, j)) >= 2 for i, j in pairs):
        return math.nan
    return _solve(mean_distance(rates, consensus(rates)), len(rates))


def discordance(scores: Scores) -> Rates:
    """(K, K): share of the raters of both i and j who contradict "i is better than j", ties half.

    The diagonal is 0; NaN where no rater scored both.
    """
    num_items = len(scores[0]) if scores else 0
    for number, row in enumerate(scores):
        if len(row) != num_items:
            raise DataError(
                f"rater {number} gives {len(row)} scores and rater 0 {num_items}; expected one for "
                "each response, null where there is none."
            )
    rates = [[0.0] * num_items for _ in range(num_items)]
    for i, j in combinations(range(num_items), 2):
        both = _of_both(scores, i, j)
        against = sum((a < b) + (a == b) / 2 for a, b in both)
        rates[i][j] = against / len(both) if both else math.nan
        rates[j][i] = 1 - rates[i][j]
    return rates


def consensus(rates: Rates) -> list[int]:
    """The central order, best first: items 0 to K - 1 at the least `mean_distance` (Kemeny).

    Exact for K <= EXACT_ITEMS, by dynamic programming over the sets of items still to place; of
    equally good orders the lexicographically first. Above that, a local optimum: Borda's order,
    improved by moving one item at a time to its best place until none moves. The distance may then
    be too high, and theta too low.
    """
    costs = [[0.0 if math.isnan(rate) else rate for rate in row] for row in rates]
    return _exact(costs) if len(costs) <= EXACT_ITEMS else _local(costs)


def mean_distance(rates: Rates, order: Sequence[int]) -> float:
    """Mean Kendall distance of the raters to `order`, in pairs, between 0 and K(K-1)/2.

    NaN where no pair was scored.
    """
    found = [rates[i][j] for i, j in combinations(order, 2) if not math.isnan(rates[i][j])]
    num_pairs = len(order) * (len(order) - 1) / 2
    return math.fsum(found) / len(found) * num_pairs if found else math.nan


def expected_kendall_distance(theta: float, num_items: int) -> float:
    """E[d] of a Mallows model with phi = exp(-theta), theta >= 0: K(K-1)/4 at 0, falling to 0.

    E[d] = K phi / (1 - phi) - sum_j j phi^j / (1 - phi^j), j = 1..K (Fligner and Verducci 1986),
    summed as differences that stay precise near phi = 1.
    """
    if theta < 0:
        raise ValueError(f"expected theta >= 0, found {theta}")
    return math.fsum(_insertion_distance(theta, j) for j in range(2, num_items + 1))


def _insertion_distance(theta: float, j: int) -> float:
    """E of a geometric variable with ratio exp(-theta), cut to 0..j-1."""
    if j * theta < 0.1:
        # x / expm1(x) = 1 - x/2 + x^2/12 - x^4/720 + x^6/30240 - ..., at theta and at j theta.
        terms = ((1, 1 / 12), (3, -1 / 720), (5, 1 / 30240))
        return (j - 1) / 2 - sum(c * theta**n * (j ** (n + 1) - 1) for n, c in terms)
    return _inverse_expm1(theta) - j * _inverse_expm1(j * theta)


def _inverse_expm1(x: float) -> float:
    # Of -x, because exp(x) may overflow.
    return math.exp(-x) / -math.expm1(-x)


def _solve(distance: float, num_items: int) -> float:
    """theta whose expected distance is `distance`, clamped to [0, HIGHEST_THETA]; bisection."""
    if distance >= num_items * (num_items - 1) / 4:
        return 0.0
    if distance <= expected_kendall_distance(HIGHEST_THETA, num_items):
        return HIGHEST_THETA
    low, high = 0.0, HIGHEST_THETA
    while low < (middle := (low + high) / 2) < high:
        if expected_kendall_distance(middle, num_items) > distance:
            low = middle
        else:
            high = middle
    return middle


def _exact(costs: Rates) -> list[int]:
    @cache
    def best(remaining: int) -> tuple[float, tuple[int, ...]]:
        """The least cost of ordering the items whose bits are set, and that order."""
        items = [i for i in range(len(costs)) if remaining >> i & 1]
        if not items:
            return 0.0, ()
        options = []
        for i in items:
            cost, order = best(remaining & ~(1 << i))
            options.append((sum(costs[i][j] for j in items) + cost, (i, *order)))
        return min(options)

    return list(best((1 << len(costs)) - 1)[1])


def _local(costs: Rates) -> list[int]:
    order = sorted(range(len(costs)), key=lambda i: sum(costs[i]))
    moved = True
    while moved:
        moved = False
        for item in order:
            others = [i for i in order if i != item]
            here = order.index(item)
            # Cost of `item` before others[0], before others[1], ..., behind all.
            places = [sum(costs[item][i] for i in others)]
            for i in others:
                places.append(places[-1] - costs[item][i] + costs[i][item])
            there = min(range(len(places)), key=places.__getitem__)
            # A gain above rounding, or two equal places would change for ever.
            if places[there] < places[here] - 1e-9:
                order, moved = [*others[:there], item, *others[there:]], True
    return order


def _of_both(scores: Scores, i: int, j: int) -> list[tuple[float, float]]:
    """The scores of i and j by the raters who gave both."""
    pairs = ((row[i], row[j]) for row in scores)
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return [(a, b) for a, b in known if not (math.isnan(a) or math.isnan(b))]
