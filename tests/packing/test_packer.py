"""Packing: every pair once, within the budget, as many packs on every rank, always the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mallowspo_cli.data.tokenize import TokenizedPair
from mallowspo_cli.packing.packer import pack, padded_length

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=40)
RANKS = st.integers(1, 5)
BUDGETS = st.integers(1, 400)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Lengths of a multiple of the ranks' number of pairs, a budget, a number of ranks."""
    world_size = draw(RANKS)
    pairs = world_size * draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(2, 60), min_size=pairs, max_size=pairs))
    return lengths, draw(BUDGETS), world_size


@given(problems())
def test_every_pair_lies_in_exactly_one_pack(problem: tuple[list[int], int, int]) -> None:
    packs = [one for rank in pack(*problem) for one in rank]
    assert sorted(index for one in packs for index in one) == list(range(len(problem[0])))
    assert all(packs)


@given(problems())
def test_no_pack_is_over_the_budget_unless_it_is_a_single_pair(
    problem: tuple[list[int], int, int],
) -> None:
    lengths, budget, _ = problem
    for one in (one for rank in pack(*problem) for one in rank):
        padded = 2 * len(one) * max(lengths[index] for index in one)
        assert padded <= budget or len(one) == 1


@given(problems())
def test_every_rank_gets_the_same_number_of_packs(problem: tuple[list[int], int, int]) -> None:
    ranks = pack(*problem)
    assert len(ranks) == problem[2]
    assert len({len(rank) for rank in ranks}) == 1


@given(problems())
def test_packing_is_a_function_of_its_arguments(problem: tuple[list[int], int, int]) -> None:
    lengths, budget, world_size = problem
    assert pack(*problem) == pack(tuple(lengths), budget, world_size)


@given(LENGTHS, BUDGETS)
def test_longest_pairs_come_first_and_ties_keep_their_order(
    lengths: list[int], budget: int
) -> None:
    (packs,) = pack(lengths, budget)
    order = [index for one in packs for index in one]
    assert order == sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


@given(LENGTHS, BUDGETS)
def test_one_rank_never_opens_a_pack_that_the_last_one_had_room_for(
    lengths: list[int], budget: int
) -> None:
    (packs,) = pack(lengths, budget)
    for one in packs[:-1]:
        assert 2 * lengths[one[0]] * (len(one) + 1) > budget


def test_pairs_of_like_length_share_a_pack() -> None:
    # 2 rows of 10 take 20 of 40 tokens; rows of 4 take 8.
    assert pack([4, 10, 4, 10, 4], 40) == [[[1, 3], [0, 2, 4]]]


def test_a_pair_over_the_budget_gets_a_pack_of_its_own() -> None:
    assert pack([3, 50, 3], 12) == [[[1], [0, 2]]]
    assert pack([3, 3], 1) == [[[0], [1]]]


def test_a_pack_is_split_where_the_ranks_would_be_uneven() -> None:
    assert pack([5, 5, 5, 5], 40, world_size=1) == [[[0, 1, 2, 3]]]
    assert pack([5, 5, 5, 5], 40, world_size=2) == [[[0, 1]], [[2, 3]]]
    assert pack([5, 5, 5, 5], 40, world_size=4) == [[[0]], [[1]], [[2]], [[3]]]


@pytest.mark.parametrize(("pairs", "ranks"), [(0, 1), (1, 2), (3, 2), (9, 4)])
def test_pairs_that_cannot_be_dealt_evenly_are_refused(pairs: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"{pairs} pairs cannot be dealt evenly to {ranks} ranks"):
        pack([5] * pairs, 100, ranks)


def test_padded_length_is_that_of_the_longer_row() -> None:
    def ids(count: int) -> np.ndarray:
        return np.zeros(count, dtype=np.int32)

    assert padded_length(TokenizedPair("a", ids(4), ids(3), ids(7))) == 11
    assert padded_length(TokenizedPair("a", ids(4), ids(7), ids(3))) == 11
