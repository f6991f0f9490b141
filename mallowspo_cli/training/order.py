"""The order of the training pairs: a value, not a state."""

from functools import lru_cache

import torch

from mallowspo_cli.recipe.schema import Order


def step_indices(
    step: int, batch_size: int, num_pairs: int, seed: int, order: Order = Order.shuffle
) -> list[int]:
    """Indices of the pairs of optimizer step `step` (counted from 0).

    Epochs follow one another without a gap: a step may take the last pairs of one and the first of
    the next, so that every step has `batch_size` pairs.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [
        epoch_order(position // num_pairs, num_pairs, seed, order)[position % num_pairs]
        for position in positions
    ]


@lru_cache(maxsize=4)
def epoch_order(epoch: int, num_pairs: int, seed: int, order: Order) -> tuple[int, ...]:
    """The permutation of an epoch, a pure function of its arguments."""
    if order is Order.sequential:
        return tuple(range(num_pairs))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(num_pairs, generator=generator).tolist())
