"""Many ranks, simulated: equal packs for all, no pair scored twice, a file a block."""

import itertools

import numpy as np
import pytest

from mallowspo_cli.reference.build import LONGEST_PAUSE
from tests.test_benchmarks import load

simulate = load("simulate_ranks")


@pytest.mark.parametrize("name", ["dpo", "hh"])
@pytest.mark.parametrize(
    ("ranks", "pairs", "pack_tokens", "limit"),
    [
        # From eight pairs a rank on, whatever the number of ranks.
        (8, 64, 16384, 1.02),
        (8, 256, 4096, 1.02),
        (64, 512, 16384, 1.02),
        (64, 1024, 4096, 1.02),
        (512, 4096, 16384, 1.02),
        # Four pairs a rank leave less to choose from.
        (64, 256, 8192, 1.04),
    ],
)
def test_ranks_wait_for_each_other_little(
    name: str, ranks: int, pairs: int, pack_tokens: int, limit: float
) -> None:
    found = simulate.balance(name, ranks, pairs, pack_tokens, draws=3)
    assert found["same_number"]
    assert 1 <= found["least_possible"] <= found["slowest_over_mean"] <= limit
    # Packs of a turn are dealt heaviest first, so the first rank has the heaviest of each.
    assert found["step_over_mean"] == pytest.approx(found["slowest_over_mean"])


@pytest.mark.parametrize("name", ["dpo", "hh"])
def test_at_two_pairs_a_rank_nothing_could_deal_better(name: str) -> None:
    found = simulate.balance(name, 512, 1024, 8192, draws=3)
    assert found["same_number"]
    # The longest pair alone is longer than what a rank has on average: pairs are not split.
    assert found["least_possible"] > 1.1
    assert found["slowest_over_mean"] == pytest.approx(found["least_possible"])


def test_no_dealing_is_better_than_the_bound() -> None:
    draw = np.random.default_rng(0)
    for _ in range(30):
        costs, ranks = draw.integers(1, 30, 6).astype(float), int(draw.integers(2, 4))
        owners = itertools.product(range(ranks), repeat=len(costs))
        busiest = [max(costs[np.array(o) == r].sum() for r in range(ranks)) for o in owners]
        best = min(busiest) / (costs.sum() / ranks)
        assert 1 <= simulate.least_possible(costs, ranks) <= best + 1e-12


@pytest.mark.parametrize("ranks", [8, 64])
def test_the_reference_pass_of_many_ranks_scores_every_pair_once(ranks: int) -> None:
    rows = simulate.known("hh")
    data = simulate.fabricated(rows[:2000])
    assert len(set(data.pair_ids)) == 2000
    found = simulate.reference_pass(ranks, data, 1024)
    # That as many rows were scored as there are pairs is asserted in the simulation.
    assert found["files"] == found["blocks"] > 64
    assert found["left_over_claims"] == 0
    assert found["idle_ranks"] == 0
    assert found["kib"] < 2000 * 200 / 1024
    # In the end some wait for the others' last blocks, and look at ever longer distances.
    assert found["ideal_s"] <= found["simulated_s"] < 1.1 * found["ideal_s"] + LONGEST_PAUSE / 2
    # Every rank tries every block at most once in each of its turns.
    assert found["claims_tried"] >= found["blocks"]


def test_one_file_a_rank_and_two_more_are_a_checkpoint() -> None:
    for ranks in (8, 64, 512):
        found = simulate.checkpoint(ranks)
        assert found["files"] == ranks + 2
        # Float32 weights and two moments: 12 bytes a parameter.
        assert found["gib"] == pytest.approx(12 * 8.03e9 / 2**30, rel=1e-3)


def test_a_ranks_start_and_step_are_timed() -> None:
    data = simulate.fabricated(simulate.known("hh")[:600])
    found = simulate.start(data, 64, 256)
    names = {name for name in found if name.endswith("_s")}
    assert {"read_prepared_s", "dealing_s", "all_lengths_s", "own_tokens_s"} <= names
    assert all(0 <= found[name] < 10 for name in names)


def test_the_clock_lets_the_rank_run_that_is_furthest_behind() -> None:
    clock, seen = simulate.Clock(), []

    def work(rank: int) -> None:
        for _ in range(3):
            seen.append((clock.monotonic(), rank))
            clock.sleep(1.0 + rank)

    ends = clock.run([lambda rank=rank: work(rank) for rank in range(3)])
    assert ends == [3, 6, 9]
    # What a rank does lies behind all that others did before.
    assert seen == sorted(seen)


def test_an_error_in_a_rank_is_not_lost() -> None:
    def fails() -> None:
        raise ValueError("in a rank")

    with pytest.raises(ValueError, match="in a rank"):
        simulate.Clock().run([lambda: None, fails])
