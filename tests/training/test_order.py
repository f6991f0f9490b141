"""The order of the pairs is a value: every pair once an epoch, the same on every machine."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mallowspo_cli.recipe.schema import Order
from mallowspo_cli.training.order import epoch_order, step_indices


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
    epoch_order.cache_clear()
    assert step_indices(3, 8, 50, seed=1) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_the_order_of_today_is_that_of_tomorrow() -> None:
    # A resumed run must go on in the order that an older version began.
    assert epoch_order(0, 8, 0, Order.shuffle) == (4, 0, 7, 3, 2, 5, 1, 6)


def test_epochs_and_seeds_differ() -> None:
    orders = {
        epoch_order(epoch, 50, seed, Order.shuffle) for epoch in range(4) for seed in range(4)
    }
    assert len(orders) == 16


@pytest.mark.parametrize("epoch", [0, 3])
def test_sequential_is_the_order_of_the_data(epoch: int) -> None:
    assert epoch_order(epoch, 6, 5, Order.sequential) == (0, 1, 2, 3, 4, 5)


def test_splitting_a_batch_does_not_change_what_a_run_sees() -> None:
    whole = step_indices(2, 12, 31, seed=4)
    parts = [index for step in range(6, 9) for index in step_indices(step, 4, 31, seed=4)]
    assert parts == whole
