"""Packing: every pair once, within the budget, as many packs on every rank, of equal costs."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mallowspo_cli.data.tokenize import TokenizedPair
from mallowspo_cli.models.flops import ForwardFlops
from mallowspo_cli.packing.layout import Layout, collate
from mallowspo_cli.packing.packer import lengths_of, pack, size_of

Lengths = list[tuple[int, int, int]]
Problem = tuple[Lengths, int, int]

LAYOUTS = st.sampled_from(Layout)
BUDGETS = st.integers(1, 400)
LENGTHS = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=40
)
LLAMA_3_8B = ForwardFlops(per_token=2 * 6.979e9, per_visible=524_288, per_target=2 * 0.5253e9)
FILES = Path(__file__).parents[2] / "benchmarks" / "lengths"


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Lengths of a multiple of the ranks' number of pairs, a budget, a number of ranks."""
    world_size = draw(st.integers(1, 5))
    pairs = world_size * draw(st.integers(1, 12))
    part = st.integers(1, 30)
    each = st.tuples(part, part, part)
    return draw(st.lists(each, min_size=pairs, max_size=pairs)), draw(BUDGETS), world_size


def flat(ranks: list[list[list[int]]]) -> list[list[int]]:
    return [one for rank in ranks for one in rank]


def sums(ranks: list[list[list[int]]], values: NDArray) -> NDArray:
    """(ranks, packs of each) sums of a value of each pair."""
    return np.array([[values[one].sum() for one in rank] for rank in ranks])


def widths(lengths: Lengths) -> list[int]:
    return [prompt + max(chosen, rejected) for prompt, chosen, rejected in lengths]


def wide(*of: int) -> Lengths:
    """Pairs whose padded rows are this long, and which take a token more in the shared layout."""
    return [(width - 1, 1, 1) for width in of]


@given(problems(), LAYOUTS)
def test_every_pair_lies_in_exactly_one_pack(problem: Problem, layout: Layout) -> None:
    packs = flat(pack(*problem, layout=layout))
    assert sorted(index for one in packs for index in one) == list(range(len(problem[0])))
    assert all(packs)


@given(problems(), LAYOUTS)
def test_no_pack_is_over_the_budget_unless_it_is_a_single_pair(
    problem: Problem, layout: Layout
) -> None:
    lengths, budget, _ = problem
    for one in flat(pack(*problem, layout=layout)):
        members = [lengths[index] for index in one]
        assert size_of(members, layout) <= budget or len(one) == 1


@given(problems(), LAYOUTS)
def test_every_rank_gets_the_same_number_of_packs(problem: Problem, layout: Layout) -> None:
    ranks = pack(*problem, layout=layout)
    assert len(ranks) == problem[2]
    assert len({len(rank) for rank in ranks}) == 1


@given(problems(), LAYOUTS)
def test_packing_is_a_function_of_its_arguments(problem: Problem, layout: Layout) -> None:
    lengths, budget, world_size = problem
    costs = [prompt + 2 * chosen for prompt, chosen, _ in lengths]
    once = pack(lengths, budget, world_size, layout, costs)
    again = pack(np.array(lengths), budget, world_size, layout, np.array(costs, dtype=float))
    assert once == again


@given(problems(), st.randoms(use_true_random=False))
def test_packs_come_costliest_first_and_those_of_a_turn_are_most_alike(problem: Problem, random):
    lengths, budget, world_size = problem
    costs = np.array([random.uniform(0.5, 20) for _ in lengths])
    totals = sums(pack(lengths, budget, world_size, costs=costs), costs)
    # Rank by rank within a turn, then the next turn.
    in_order = totals.T.flatten()
    assert (np.diff(in_order) <= 1e-9).all()


@given(st.integers(1, 3), st.data())
def test_without_a_limit_the_costliest_pack_is_within_a_third_of_the_least_possible(
    world_size: int, data: st.DataObject
) -> None:
    """Graham (1969): longest processing time first is at most 4/3 - 1/(3 m) times the optimum."""
    pairs = world_size * data.draw(st.integers(1, 6 // world_size))
    costs = np.array(
        data.draw(st.lists(st.integers(1, 50), min_size=pairs, max_size=pairs)), dtype=float
    )
    found = sums(pack([(1, 1, 1)] * pairs, 10**6, world_size, costs=costs), costs)
    assert found.shape == (world_size, 1)
    owners = np.array(list(itertools.product(range(world_size), repeat=pairs)))
    loads = np.stack([(owners == rank) @ costs for rank in range(world_size)])
    best = loads.max(axis=0).min()
    assert best <= found.max() <= (4 / 3 - 1 / (3 * world_size)) * best + 1e-9


def test_costs_and_not_tokens_are_made_equal() -> None:
    lengths = [(1, 1, 1), (1, 1, 1), (100, 1, 1), (100, 1, 1)]
    assert pack(lengths, 1000, 2) == [[[2, 0]], [[3, 1]]]
    assert pack(lengths, 1000, 2, costs=[9, 1, 5, 5]) == [[[0, 1]], [[2, 3]]]


def fit(tokens: list[int], costs: list[float], budget: int, count: int) -> bool:
    """Whether pairs, costliest first, each onto the lightest pack with room, fit in `count`."""
    loads, filled = [0.0] * count, [0] * count
    for pair in sorted(range(len(tokens)), key=lambda i: (-costs[i], i)):
        open_ = [i for i in range(count) if not filled[i] or filled[i] + tokens[pair] <= budget]
        if not open_:
            return False
        lightest = min(open_, key=lambda i: (loads[i], i))
        loads[lightest] += costs[pair]
        filled[lightest] += tokens[pair]
    return True


@given(problems(), st.randoms(use_true_random=False))
def test_there_are_no_more_packs_than_these_pairs_need_when_dealt_so(
    problem: Problem, random
) -> None:
    lengths, budget, world_size = problem
    tokens = [sum(each) for each in lengths]
    # No pair is over the budget here: what that does is said below.
    budget = max(budget, *tokens)
    costs = [random.uniform(1, 9) for _ in lengths]
    rounds = len(pack(lengths, budget, world_size, costs=costs)[0])
    assert fit(tokens, costs, budget, rounds * world_size)
    # So few that they could hold the tokens, and yet they do not.
    least = -(-sum(tokens) // (budget * world_size))
    assert rounds >= least
    for fewer in range(least, rounds):
        assert not fit(tokens, costs, budget, fewer * world_size)


def test_a_pack_may_be_full_but_no_token_over() -> None:
    assert pack([(2, 2, 1)] * 3, 10) == [[[0, 2], [1]]]
    assert pack([(2, 2, 1)] * 3, 9) == [[[0], [1], [2]]]
    assert pack(wide(5, 5, 5), 20, layout=Layout.padded) == [[[0, 1], [2]]]
    assert pack(wide(5, 5, 5), 19, layout=Layout.padded) == [[[0], [1], [2]]]


def test_a_pair_over_the_budget_gets_a_pack_of_its_own() -> None:
    for layout in Layout:
        assert flat(pack(wide(3, 50, 3), 12, layout=layout))[0] == [1]
        assert flat(pack(wide(3, 3), 1, layout=layout)) == [[0], [1]]


@pytest.mark.parametrize("layout", Layout)
def test_a_pair_over_the_budget_does_not_part_the_others(layout: Layout) -> None:
    assert flat(pack(wide(3, 50, 3), 12, layout=layout)) == [[1], [0, 2]]


@given(LENGTHS, BUDGETS)
def test_padded_pairs_lie_longest_first_and_ties_keep_their_order(
    lengths: Lengths, budget: int
) -> None:
    (packs,) = pack(lengths, budget, layout=Layout.padded)
    order = [index for one in packs for index in one]
    rows = widths(lengths)
    assert order == sorted(range(len(rows)), key=lambda index: (-rows[index], index))


@given(LENGTHS, BUDGETS)
def test_one_rank_never_opens_a_padded_pack_that_the_last_one_had_room_for(
    lengths: Lengths, budget: int
) -> None:
    (packs,) = pack(lengths, budget, layout=Layout.padded)
    rows = widths(lengths)
    for one in packs[:-1]:
        assert 2 * rows[one[0]] * (len(one) + 1) > budget


def test_padded_pairs_of_like_length_share_a_pack() -> None:
    # 2 rows of 10 take 20 of 40 tokens; rows of 4 take 8.
    assert pack(wide(4, 10, 4, 10, 4), 40, layout=Layout.padded) == [[[1, 3], [0, 2, 4]]]


def test_a_padded_pack_is_split_where_the_ranks_would_be_uneven() -> None:
    lengths = wide(5, 5, 5, 5)
    for ranks, expected in (
        (1, [[[0, 1, 2, 3]]]),
        (2, [[[0, 1]], [[2, 3]]]),
        (4, [[[0]], [[1]], [[2]], [[3]]]),
    ):
        assert pack(lengths, 40, ranks, Layout.padded) == expected


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(("pairs", "ranks"), [(0, 1), (1, 2), (3, 2), (9, 4)])
def test_pairs_that_cannot_be_dealt_evenly_are_refused(
    pairs: int, ranks: int, layout: Layout
) -> None:
    with pytest.raises(ValueError, match=f"{pairs} pairs cannot be dealt evenly to {ranks} ranks"):
        pack([(2, 2, 1)] * pairs, 100, ranks, layout)


@given(LENGTHS, LAYOUTS)
def test_the_size_of_a_pack_is_the_number_of_its_tokens(lengths: Lengths, layout: Layout) -> None:
    pairs = [
        TokenizedPair("a", *(np.zeros(count, dtype=np.int32) for count in each)) for each in lengths
    ]
    assert lengths_of(pairs).tolist() == [list(each) for each in lengths]
    assert size_of(lengths_of(pairs), layout) == collate(pairs, layout).input_ids.numel()


def test_no_pairs_have_no_lengths() -> None:
    assert lengths_of([]).shape == (0, 3)


def real(name: str, max_length: int) -> NDArray[np.int64]:
    """(N, 3) lengths of a data set's pairs that fit whole."""
    text = (FILES / f"lengths_{name}.json").read_text(encoding="utf-8")
    lengths = np.array(json.loads(text)["lengths"])
    return lengths[lengths[:, 0] + lengths[:, 1:].max(axis=1) <= max_length]


def balance(
    lengths: NDArray[np.int64], step_pairs: int, pack_tokens: int, ranks: int = 8, seeds: int = 10
) -> tuple[float, float]:
    """Means over the steps of shuffled epochs: time over that of equal ranks, and fill.

    Ranks wait for each other in every micro-step, which takes as long as its costliest pack. Fill
    is a step's tokens over those that its packs would hold if all were as long as the longest.
    """
    costs, slowness, fill = LLAMA_3_8B.of_pairs(lengths), [], []
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(lengths))
        for start in range(0, len(order) - step_pairs + 1, step_pairs):
            step = order[start : start + step_pairs]
            dealt = pack(lengths[step], pack_tokens, ranks, costs=costs[step])
            cost, tokens = sums(dealt, costs[step]), sums(dealt, lengths[step].sum(axis=1))
            slowness.append(cost.max(axis=0).sum() / cost.mean(axis=0).sum())
            fill.append(tokens.sum() / (tokens.size * tokens.max()))
    return float(np.mean(slowness)), float(np.mean(fill))


@pytest.mark.parametrize("pack_tokens", [4096, 8192])
@pytest.mark.parametrize("step_pairs", [64, 128])
@pytest.mark.parametrize("max_length", [1024, 2048])
@pytest.mark.parametrize("name", ["dpo_en_demo", "hh_harmless_test"])
def test_eight_ranks_wait_for_each_other_less_than_a_fiftieth_of_the_time(
    name: str, max_length: int, step_pairs: int, pack_tokens: int
) -> None:
    slowness, fill = balance(real(name, max_length), step_pairs, pack_tokens)
    print(f"max/mean cost {slowness:.4f}, fill {fill:.4f}")
    assert 1 <= slowness <= 1.02
    assert 0.95 <= fill <= 1


def test_pairs_dealt_in_turn_would_miss_that_by_far() -> None:
    """The gate can fail: as many pairs on each rank, in the order they come."""
    lengths = real("dpo_en_demo", 2048)[:128]
    each = LLAMA_3_8B.of_pairs(lengths).reshape(16, 8).sum(axis=0)
    assert each.max() / each.mean() > 1.15
