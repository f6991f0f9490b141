"""The Mallows ranking model itself: exact samples and exact pair marginals.

P(ranking) is proportional to phi^d(ranking, central ranking), d Kendall's tau (inversions) or
Spearman's rho (summed squares of rank differences). Items are numbered by the central ranking:
item 0 is the best one. Dispersion goes in as theta = -log phi >= 0; theta = 0 is the uniform law.
Source: the method notes of this project, 1.1 and 1.2.
"""

from functools import cache
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.objectives.links import kendall_log_link
from mallowspo_cli.recipe.nearest import nearest

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DISTANCES = ("kendall", "spearman")
MOST_ENUMERATED = 7
"""Items of a Spearman model: all n! rankings are listed (5,040 of seven)."""


def sample_rankings(
    distance: str, theta: float, num_items: int, size: int, generator: np.random.Generator
) -> Ints:
    """(size, num_items) ranks of each item, 0 the best, drawn exactly.

    Kendall by repeated insertion, Spearman from the list of all rankings. Takes `size` times
    `num_items` uniform numbers from the generator, a row for a ranking, under either distance and
    any theta: the first rows of a larger sample are the smaller sample.

    Raises:
        RecipeError: an unknown distance, or more items than a Spearman model lists.
    """
    check_model(distance, num_items)
    uniform = generator.random((size, num_items))
    if distance == "kendall":
        return _by_insertion(theta, uniform)
    ranks, probabilities = spearman_rankings(theta, num_items)
    ends = np.cumsum(probabilities)
    ends[-1] = 1.0
    return ranks[np.searchsorted(ends, uniform[:, 0], side="right")]


def _by_insertion(theta: float, uniform: Floats) -> Ints:
    """Item i goes in v places above the last one, with probability proportional to phi^v.

    v is the number of better items that it overtakes, so the inversions add up to d.
    """
    ranks = np.zeros(uniform.shape, dtype=np.int64)
    for item in range(1, uniform.shape[1]):
        ends = np.cumsum(np.exp(-theta * np.arange(item + 1)))
        overtaken = np.searchsorted(ends / ends[-1], uniform[:, item], side="right")
        place = item - np.minimum(overtaken, item)
        ranks[:, :item] += ranks[:, :item] >= place[:, None]
        ranks[:, item] = place
    return ranks


def check_model(distance: str, num_items: int) -> None:
    """Raise RecipeError for an unknown distance, or for more items than Spearman's can list."""
    if distance not in DISTANCES:
        raise RecipeError(
            f"no distance named '{distance}'.{nearest(distance, DISTANCES)} Choices: "
            f"{', '.join(DISTANCES)}."
        )
    if distance == "spearman" and num_items > MOST_ENUMERATED:
        raise RecipeError(
            f"found arms={num_items} with Spearman's distance, which is drawn from the list of all "
            f"rankings: take arms={MOST_ENUMERATED} at most, or distances=kendall."
        )


def spearman_rankings(theta: float, num_items: int) -> tuple[Ints, Floats]:
    """All rankings, (n!, n) ranks of each item, and their probabilities, (n!,)."""
    ranks = _all_rankings(num_items)
    distances = ((ranks - np.arange(num_items)) ** 2).sum(axis=1)
    odds = np.exp(-theta * distances)
    return ranks, odds / odds.sum()


@cache
def _all_rankings(num_items: int) -> Ints:
    return np.asarray(list(permutations(range(num_items))), dtype=np.int64)


def pair_marginals(distance: str, theta: float, num_items: int) -> Floats:
    """(n, n) probability that item i stands before item j; 0 on the diagonal.

    Kendall: (m + 1) / (1 - phi^(m + 1)) - m / (1 - phi^m) of the gap m = j - i, whatever n (it is
    the Mallows-phi link at s = m). Spearman: summed over all rankings; for n > 2 it is *not* the
    Mallows-theta link, the probability of one comparison that no transitivity binds.

    Raises:
        RecipeError: as `sample_rankings`.
    """
    check_model(distance, num_items)
    if distance == "kendall":
        gaps = np.arange(num_items)[None] - np.arange(num_items)[:, None]
        gap = torch.from_numpy(gaps).double()
        marginals = kendall_log_link(gap, torch.full_like(gap, theta)).exp().numpy()
    else:
        ranks, probabilities = spearman_rankings(theta, num_items)
        before = ranks[:, :, None] < ranks[:, None, :]
        marginals = np.einsum("r,rij->ij", probabilities, before.astype(np.float64))
    np.fill_diagonal(marginals, 0.0)
    return marginals


def preference_counts(
    distance: str, theta: float, num_items: int, sizes: tuple[int, ...], seed: tuple[int, ...]
) -> Floats:
    """(len(sizes), n, n): how often item i was preferred to j among the first `size` pairs.

    Each pair is of two items drawn alike and has a ranking, that is a rater, of its own. Samples
    are nested in size, and under one seed all dispersions read the same random numbers.

    Raises:
        RecipeError: as `sample_rankings`.
    """
    most = max(sizes)
    rankings, choices = (np.random.default_rng([*seed, stream]) for stream in (0, 1))
    ranks = sample_rankings(distance, theta, num_items, most, rankings)
    first, second = np.triu_indices(num_items, 1)
    drawn = np.floor(choices.random(most) * len(first)).astype(np.int64)
    one, other = first[drawn], second[drawn]
    rows = np.arange(most)
    ahead = ranks[rows, one] < ranks[rows, other]
    winner, loser = np.where(ahead, one, other), np.where(ahead, other, one)
    counts = np.zeros((len(sizes), num_items, num_items))
    for index, size in enumerate(sizes):
        np.add.at(counts[index], (winner[:size], loser[:size]), 1.0)
    return counts
