"""The order of the pairs is a value: every pair once an epoch, the same on every machine."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mallowspo_cli.recipe.choices import Order
from mallowspo_cli.training.order import PairOrder, epoch_order


def weights_of(count: int) -> list[float]:
    """Distinct values in no order."""
    return [(index * 7919 % 1009) / 1009 + index * 1e-6 for index in range(count)]


def step_indices(
    step: int, batch_size: int, num_pairs: int, seed: int, order: Order = Order.shuffle
) -> list[int]:
    return PairOrder(num_pairs, batch_size, seed, order, weights_of(num_pairs)).step(step)


@settings(max_examples=60)
@given(
    batch_size=st.integers(1, 40),
    num_pairs=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
    epochs=st.integers(1, 4),
    order=st.sampled_from(list(Order)),
)
def test_every_pair_comes_exactly_once_an_epoch(
    batch_size: int, num_pairs: int, seed: int, epochs: int, order: Order
) -> None:
    steps = -(-epochs * num_pairs // batch_size)
    batches = [step_indices(step, batch_size, num_pairs, seed, order) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in batches)
    stream = [index for batch in batches for index in batch]
    for epoch in range(epochs):
        once = stream[epoch * num_pairs : (epoch + 1) * num_pairs]
        assert sorted(once) == list(range(num_pairs))


def test_a_step_takes_the_end_of_one_epoch_and_the_beginning_of_the_next() -> None:
    first, second = (epoch_order(epoch, 5, 0, Order.shuffle) for epoch in (0, 1))
    assert step_indices(1, 4, 5, 0) == [first[4], *second[:3]]


def test_a_batch_may_be_larger_than_the_data() -> None:
    assert step_indices(0, 7, 3, 0, Order.sequential) == [0, 1, 2, 0, 1, 2, 0]


def test_the_order_depends_on_its_arguments_alone() -> None:
    expected = step_indices(3, 8, 50, seed=1)
    torch.manual_seed(99)
    random.seed(99)
    state = torch.get_rng_state()
    assert step_indices(3, 8, 50, seed=1) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_the_order_of_today_is_that_of_tomorrow() -> None:
    # A resumed run must go on in the order that an older version began.
    assert epoch_order(0, 8, 0, Order.shuffle).tolist() == [4, 0, 7, 3, 2, 5, 1, 6]


def test_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(epoch_order(epoch, 50, seed, Order.shuffle))
        for epoch in range(4)
        for seed in range(4)
    }
    assert len(orders) == 16


@pytest.mark.parametrize("epoch", [0, 3])
def test_sequential_is_the_order_of_the_data(epoch: int) -> None:
    assert epoch_order(epoch, 6, 5, Order.sequential).tolist() == [0, 1, 2, 3, 4, 5]


def test_splitting_a_batch_does_not_change_what_a_run_sees() -> None:
    whole = step_indices(2, 12, 31, seed=4)
    parts = [index for step in range(6, 9) for index in step_indices(step, 4, 31, seed=4)]
    assert parts == whole


@pytest.mark.parametrize("epoch", [0, 1])
def test_easy_and_hard_first_go_by_weight(epoch: int) -> None:
    weights = weights_of(40)
    ranked = sorted(range(40), key=lambda index: -weights[index])
    assert epoch_order(epoch, 40, 3, Order.easy_first, weights).tolist() == ranked
    assert epoch_order(epoch, 40, 3, Order.hard_first, weights).tolist() == ranked[::-1]


@pytest.mark.parametrize("order", [Order.easy_first, Order.hard_first])
def test_equal_weights_lie_in_another_order_each_epoch(order: Order) -> None:
    weights = [1.0, 2.0] * 20
    orders = [epoch_order(epoch, 40, 3, order, weights).tolist() for epoch in range(3)]
    assert len({tuple(o) for o in orders}) == 3
    first = {o % 2 for o in orders[0][:20]}
    assert first == ({1} if order is Order.easy_first else {0})


@settings(max_examples=40)
@given(
    batch_size=st.integers(1, 16),
    steps=st.integers(1, 12),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 3),
)
def test_each_stratified_step_has_about_one_pair_of_each_range(
    batch_size: int, steps: int, seed: int, epoch: int
) -> None:
    count = batch_size * steps
    weights = weights_of(count)
    ranked = sorted(range(count), key=lambda index: -weights[index])
    stratum = {pair: place // steps for place, pair in enumerate(ranked)}
    order = epoch_order(epoch, count, seed, Order.stratified, weights, batch_size)
    for step in range(1, steps + 1):
        seen = [stratum[int(pair)] for pair in order[: step * batch_size]]
        counts = [seen.count(index) for index in range(batch_size)]
        # After any number of steps no range is ahead or behind by more than one pair.
        assert max(abs(c - step) for c in counts) <= 1


def test_stratified_steps_have_the_mean_weight_of_the_data() -> None:
    weights = weights_of(640)
    mean = sum(weights) / 640

    def spread(order: Order) -> float:
        pairs = PairOrder(640, 32, 0, order, weights)
        means = [sum(weights[i] for i in pairs.step(step)) / 32 for step in range(20)]
        return max(abs(value - mean) for value in means)

    assert spread(Order.stratified) < spread(Order.shuffle) / 3
