"""The order of the training pairs: a value, not a state."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from mallowspo_cli.recipe.choices import Order


@dataclass
class PairOrder:
    """Which pairs an optimizer step takes: a pure function of these fields and the step."""

    num_pairs: int
    batch_size: int
    seed: int
    order: Order = Order.shuffle
    weights: Sequence[float] | None = None
    """w of each pair, for the orders by dispersion."""
    _epochs: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def step(self, step: int) -> list[int]:
        """Indices of the pairs of optimizer step `step` (counted from 0).

        Epochs follow one another without a gap: a step may take the last pairs of one and the first
        of the next, so that every step has `batch_size` pairs.
        """
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(self._epoch(p // self.num_pairs)[p % self.num_pairs]) for p in positions]

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = epoch_order(
                epoch, self.num_pairs, self.seed, self.order, self.weights, self.batch_size
            )
        return self._epochs[epoch]


def epoch_order(
    epoch: int,
    num_pairs: int,
    seed: int,
    order: Order,
    weights: Sequence[float] | None = None,
    batch_size: int = 1,
) -> NDArray[np.int64]:
    """The permutation of an epoch, (N,), a pure function of its arguments.

    By dispersion: easy_first takes pairs of high w first (the reference is sure of itself),
    hard_first those of low w; equal weights lie in the epoch's shuffled order. stratified spreads
    every range of w evenly over the epoch: of `batch_size` ranges that hold as many pairs, each
    step takes about one pair.
    """
    if order is Order.sequential:
        return np.arange(num_pairs)
    shuffled = _shuffled(epoch, num_pairs, seed)
    if not order.by_dispersion:
        return shuffled
    assert weights is not None
    values = np.asarray(weights)[shuffled]
    if order is Order.hard_first:
        return shuffled[np.argsort(values, kind="stable")]
    easiest_first = shuffled[np.argsort(-values, kind="stable")]
    if order is Order.easy_first:
        return easiest_first
    return _spread(easiest_first, batch_size, np.random.default_rng([seed, epoch]))


def _shuffled(epoch: int, num_pairs: int, seed: int) -> NDArray[np.int64]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_pairs, generator=generator).numpy()


def _spread(
    ranked: NDArray[np.int64], strata: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Each of `strata` ranges of the ranking at even distances, in an order of its own."""
    places = []
    for stratum in np.array_split(np.arange(len(ranked)), min(strata, len(ranked))):
        offsets = (generator.permutation(len(stratum)) + generator.random()) / len(stratum)
        places.append(offsets)
    return ranked[np.argsort(np.concatenate(places), kind="stable")]
