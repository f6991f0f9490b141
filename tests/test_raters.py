"""Raters' scores to Mallows theta: known truths, brute force, ties, missing scores, invariances."""

import math
import random
from itertools import combinations, permutations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mallowspo_cli.errors import DataError
from mallowspo_cli.raters import (
    EXACT_ITEMS,
    HIGHEST_THETA,
    consensus,
    discordance,
    expected_kendall_distance,
    mean_distance,
    neg_log_phi,
)

SCORE = st.one_of(st.none(), st.just(math.nan), st.integers(-4, 4).map(float))


@st.composite
def score_tables(draw: st.DrawFn, most_items: int = 5) -> list[list[float | None]]:
    """Up to 6 raters and `most_items` responses, with ties and gaps."""
    num_items = draw(st.integers(2, most_items))
    row = st.lists(SCORE, min_size=num_items, max_size=num_items)
    return draw(st.lists(row, min_size=1, max_size=6))


def mallows_scores(theta: float, num_items: int, generator: random.Random) -> list[float | None]:
    """One rater's scores of items 0..K-1, whose central order is 0, 1, ... (repeated insertion)."""
    order: list[int] = []
    for item in range(num_items):
        # Each place further from the end is one inversion more.
        weights = [math.exp(-theta * inversions) for inversions in range(item + 1)]
        (inversions,) = generator.choices(range(item + 1), weights)
        order.insert(item - inversions, item)
    return [float(-order.index(item)) for item in range(num_items)]


def kendall(ranking: tuple[int, ...], central: tuple[int, ...]) -> int:
    place = {item: index for index, item in enumerate(ranking)}
    return sum(place[i] > place[j] for i, j in combinations(central, 2))


def scores_of(ranking: tuple[int, ...]) -> list[float | None]:
    return [float(-ranking.index(item)) for item in range(len(ranking))]


@pytest.mark.parametrize("theta", [0.05, 0.5, 1.2, 3.0])
@pytest.mark.parametrize("num_items", [2, 3, 5])
def test_theta_is_recovered_within_its_statistical_error(theta: float, num_items: int) -> None:
    generator, raters = random.Random(7), 4000
    found = neg_log_phi([mallows_scores(theta, num_items, generator) for _ in range(raters)])
    # The Fisher information of theta is the variance of d, which is -dE[d]/dtheta.
    step = 1e-4
    variance = (
        expected_kendall_distance(theta - step, num_items)
        - expected_kendall_distance(theta + step, num_items)
    ) / (2 * step)
    assert found == pytest.approx(theta, abs=4 / math.sqrt(raters * variance))


@pytest.mark.parametrize("num_items", [2, 3, 4, 6])
@pytest.mark.parametrize("theta", [0.0, 1e-9, 0.01, 0.024, 0.026, 0.5, 2.0, 13.8])
def test_the_expected_distance_is_that_of_all_permutations(theta: float, num_items: int) -> None:
    central = tuple(range(num_items))
    distances = [kendall(p, central) for p in permutations(central)]
    weights = [math.exp(-theta * d) for d in distances]
    brute = sum(d * w for d, w in zip(distances, weights, strict=True)) / sum(weights)
    assert expected_kendall_distance(theta, num_items) == pytest.approx(brute, rel=1e-10)


@pytest.mark.parametrize("num_items", [2, 5, 50, 200])
def test_the_expected_distance_is_smooth_across_its_series(num_items: int) -> None:
    thetas = [10 ** (exponent / 20) for exponent in range(-240, 21)]
    values = [expected_kendall_distance(theta, num_items) for theta in thetas]
    assert values == sorted(values, reverse=True)
    # Near 0 it is K(K-1)/4 - theta Var[d], with Var[d] = K(K-1)(2K+5)/72 at theta = 0.
    top = num_items * (num_items - 1) / 4
    variance = num_items * (num_items - 1) * (2 * num_items + 5) / 72
    assert expected_kendall_distance(0, num_items) == pytest.approx(top, rel=1e-14)
    slope = (top - expected_kendall_distance(1e-6, num_items)) / 1e-6
    assert slope == pytest.approx(variance, rel=1e-4)
    assert expected_kendall_distance(1000.0, num_items) == 0


def test_the_expected_distance_has_no_negative_theta() -> None:
    with pytest.raises(ValueError, match="theta >= 0"):
        expected_kendall_distance(-0.1, 3)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_maximum_of_the_likelihood_over_orders_and_a_grid(seed: int) -> None:
    generator = random.Random(seed)
    every = list(permutations(range(4)))
    rankings = [generator.choice(every[: 4 + 6 * seed]) for _ in range(9)]

    def log_likelihood(theta: float, total: int) -> float:
        normaliser = sum(math.exp(-theta * kendall(p, every[0])) for p in every)
        return -theta * total - len(rankings) * math.log(normaliser)

    grid = [0.01 * step for step in range(600)]
    totals = {sum(kendall(ranking, central) for ranking in rankings) for central in every}
    best = max(((theta, d) for theta in grid for d in totals), key=lambda x: log_likelihood(*x))
    scores = [scores_of(ranking) for ranking in rankings]
    found = neg_log_phi(scores)
    rates = discordance(scores)
    total = mean_distance(rates, consensus(rates)) * len(rankings)
    assert total == pytest.approx(best[1]) == pytest.approx(min(totals))
    assert found == pytest.approx(best[0], abs=0.0051)
    assert log_likelihood(found, min(totals)) >= log_likelihood(*best)


@given(better=st.integers(0, 20), worse=st.integers(0, 20), tied=st.integers(0, 20))
def test_two_responses_have_a_closed_form_with_ties_half(
    better: int, worse: int, tied: int
) -> None:
    assume(better + worse + tied >= 2)
    rows: list[list[float | None]] = [[2, 1]] * better + [[1, 2]] * worse + [[3, 3]] * tied
    least = min(better, worse) + tied / 2
    most = max(better, worse) + tied / 2
    expected = min(HIGHEST_THETA, math.log(most / least)) if least else HIGHEST_THETA
    assert neg_log_phi(rows) == pytest.approx(expected, abs=1e-12)


def test_raters_who_tie_everything_are_at_chance() -> None:
    assert neg_log_phi([[1.0, 1.0, 1.0]] * 5) == 0


def test_raters_in_balance_are_at_chance() -> None:
    assert neg_log_phi([scores_of(p) for p in permutations(range(3))]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("num_items", [2, 5, 8, 11])
def test_consensus_is_clamped(num_items: int) -> None:
    assert neg_log_phi([list(range(num_items))] * 3) == HIGHEST_THETA


@given(scores=score_tables(), randomness=st.randoms(use_true_random=False))
def test_relabelling_and_rescaling_change_nothing(
    scores: list[list[float | None]], randomness: random.Random
) -> None:
    order = list(range(len(scores[0])))
    randomness.shuffle(order)

    def stretched(row: list[float | None]) -> list[float | None]:
        slope, shift = randomness.uniform(0.5, 3), randomness.uniform(-5, 5)
        return [None if row[i] is None else shift + slope * row[i] ** 3 for i in order]  # type: ignore[operator]

    changed = [stretched(row) for row in scores]
    randomness.shuffle(changed)
    expected = neg_log_phi(scores)
    assert neg_log_phi(changed) == pytest.approx(expected, abs=1e-9, nan_ok=True)


@given(scores=score_tables(most_items=6))
def test_the_consensus_has_the_least_distance_of_all_orders(
    scores: list[list[float | None]],
) -> None:
    rates = discordance(scores)
    order = consensus(rates)
    assert sorted(order) == list(range(len(rates)))
    distance = mean_distance(rates, order)
    assume(not math.isnan(distance))
    least = min(mean_distance(rates, p) for p in permutations(range(len(rates))))
    assert distance == pytest.approx(least, abs=1e-9)


def test_many_responses_have_an_order_that_no_single_move_improves() -> None:
    generator, num_items = random.Random(3), EXACT_ITEMS + 4
    scores = [mallows_scores(0.3, num_items, generator) for _ in range(7)]
    rates = discordance(scores)
    order = consensus(rates)
    distance = mean_distance(rates, order)
    assert sorted(order) == list(range(num_items))
    assert distance <= mean_distance(rates, list(range(num_items)))
    for item in range(num_items):
        rest = [i for i in order if i != item]
        for place in range(num_items):
            moved = [*rest[:place], item, *rest[place:]]
            assert distance <= mean_distance(rates, moved) + 1e-9


def test_many_responses_recover_theta() -> None:
    generator = random.Random(5)
    found = neg_log_phi([mallows_scores(0.4, 12, generator) for _ in range(500)])
    assert found == pytest.approx(0.4, abs=0.05)


def test_a_missing_score_takes_out_its_pairs_alone() -> None:
    # Pair rates: (0, 1) is 1/4, (0, 2) is 0 of 2, (1, 2) is 1/2.
    scores = [[3, 2, 1], [3, 1, 2], [2, 1, None], [1, 2, math.nan]]
    rates = discordance(scores)
    assert [rates[0][1], rates[0][2], rates[1][2]] == [0.25, 0.0, 0.5]
    assert [rates[1][0], rates[2][0], rates[2][1]] == [0.75, 1.0, 0.5]
    theta = neg_log_phi(scores)
    assert expected_kendall_distance(theta, 3) == pytest.approx(0.75)


def test_a_pair_that_nobody_scored_counts_as_the_others() -> None:
    # (1, 2) has no rater: two pairs at rate 1/4 stand for three.
    scores = [[3, 1, None]] * 3 + [[1, 3, None]] + [[3, None, 1]] * 3 + [[1, None, 3]]
    theta = neg_log_phi(scores)
    assert math.isnan(discordance(scores)[1][2])
    assert expected_kendall_distance(theta, 3) == pytest.approx(0.75)


@pytest.mark.parametrize(
    "scores",
    [
        [],
        [[]],
        [[1.0], [2.0]],
        [[1.0, 2.0]],
        [[1.0, 2.0], [None, 2.0]],
        [[1.0, 2.0], [math.nan, None]],
        [[1.0, 2.0, None], [None, 1.0, 2.0]],
    ],
)
def test_too_few_raters_or_responses_are_nan(scores: list[list[float | None]]) -> None:
    assert math.isnan(neg_log_phi(scores))


def test_raters_with_different_numbers_of_scores_are_refused() -> None:
    with pytest.raises(DataError, match="rater 1 gives 2 scores and rater 0 3"):
        neg_log_phi([[1, 2, 3], [1, 2]])
