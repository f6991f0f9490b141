"""What the reference gives an objective: stored log-probs, and the dispersion derived from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mallowspo_cli import dispersion
from mallowspo_cli.data.table import TokenizedPairs
from mallowspo_cli.distributed import log
from mallowspo_cli.errors import DataError
from mallowspo_cli.objectives.base import ReferenceScores
from mallowspo_cli.raters import HIGHEST_THETA
from mallowspo_cli.recipe.choices import ColumnKind, DispersionMode, DispersionSource, Pooling, Span
from mallowspo_cli.recipe.schema import DispersionConfig
from mallowspo_cli.reference.store import ReferenceRows, ReferenceStore

Numbers = NDArray[Any] | None
"""(N,) what the data says of each pair's dispersion; None where the reference's entropy does."""


@dataclass(frozen=True)
class DispersionSummary:
    """What the dispersion did to the training split, for the run's files and the log."""

    source: str
    mode: str
    scale: float
    """w = scale * raw, where raw is -ln of the mean normalised entropy, or what the data says."""
    vocab_size: int
    pairs: int
    """Training pairs."""
    weight_mean: float
    weight_min: float
    weight_max: float
    clamped: int
    """Pairs whose value sits on a bound."""
    empty: int
    """Pairs of which nothing is known; their weight is 1."""


class Reference:
    """The reference's scores of pairs that it has been shown.

    `scale=auto` is fitted on the training pairs and then stays: pairs of other splits are weighted
    with it, also after training (`scale` of the run).
    """

    def __init__(
        self,
        store: ReferenceStore,
        config: DispersionConfig,
        train_ids: Sequence[str],
        seed: int,
        scale: float | None = None,
        numbers: Numbers = None,
    ):
        self.store, self.config, self.seed = store, config, seed
        raw = self._raw(train_ids, numbers)
        if scale is None:
            auto = config.scale == "auto"
            scale = dispersion.unit_mean_scale(raw) if auto else float(config.scale)
        self.scale = scale
        low, high = config.clamp or (0.0, math.inf)
        self.bounds = (low, high)
        self._weights: dict[str, float] = {}
        self._estimates: dict[str, float] = {}
        weights = self.add(train_ids, numbers)
        self.summary = DispersionSummary(
            source=config.source.value,
            mode=config.mode.value,
            scale=scale,
            vocab_size=store.vocab_size,
            pairs=len(train_ids),
            weight_mean=float(weights.double().mean()),
            weight_min=float(weights.min()),
            weight_max=float(weights.max()),
            clamped=self._clamped(raw, train_ids),
            empty=dispersion.empty_count(raw),
        )

    def add(self, pair_ids: Sequence[str], numbers: Numbers = None) -> Tensor:
        """Weigh the pairs of a split; returns w, (N,). `shuffled` permutes within the split.

        A pair that appears twice, or was weighed with an earlier split, keeps its first weight.
        """
        first = {pair: index for index, pair in reversed(list(enumerate(pair_ids)))}
        places = sorted(index for pair, index in first.items() if pair not in self._weights)
        new = [pair_ids[index] for index in places]
        kept = None if numbers is None else numbers[places]
        weights = dispersion.weight(self._raw(new, kept), self.scale, self.bounds)
        inverse = self.config.mode is DispersionMode.inverse
        estimates = weights.reciprocal() if inverse else weights
        self._estimates.update(zip(new, estimates.tolist(), strict=True))
        if self.config.mode is DispersionMode.constant:
            weights = dispersion.constant(weights)
        elif self.config.mode is DispersionMode.shuffled:
            weights = dispersion.shuffled(weights, self.seed)
        self._weights.update(zip(new, weights.tolist(), strict=True))
        return self.weights(pair_ids)

    def add_split(self, pairs: TokenizedPairs) -> Tensor:
        """`add` with what the data says of the pairs."""
        return self.add(pairs.pair_ids, numbers_of(self.config, pairs))

    def _raw(self, pair_ids: Sequence[str], numbers: Numbers) -> Tensor:
        """w of N pairs before its scale, (N,), in the inverse control the wrong way round."""
        raw = raw_weights(self.store, self.config, pair_ids, numbers)
        return dispersion.inverse(raw) if self.config.mode is DispersionMode.inverse else raw

    def _clamped(self, raw: Tensor, pair_ids: Sequence[str]) -> int:
        low, high = self.bounds
        outside = (self.scale * raw < low) | (self.scale * raw > high)
        if self.config.source is DispersionSource.entropy:
            entropy = normalised_entropy(self.store, self.config, pair_ids)
            outside |= (entropy <= dispersion.LOWEST) | (entropy >= dispersion.HIGHEST)
        elif self.config.source is DispersionSource.raters:
            # Raters who all agree, or among whom nothing is agreed.
            outside |= (raw <= 0) | (raw >= 2 * HIGHEST_THETA)
        return int(outside.sum())

    def weights(self, pair_ids: Sequence[str]) -> Tensor:
        """w of B pairs, (B,) float32."""
        return torch.tensor([self._weights[p] for p in pair_ids])

    def estimates(self, pair_ids: Sequence[str]) -> Tensor:
        """w of B pairs as estimated, (B,) float32, whatever the mode: strata for comparisons."""
        return torch.tensor([self._estimates[p] for p in pair_ids])

    def __call__(self, pair_ids: Sequence[str], device: torch.device) -> ReferenceScores:
        """Log-probs, token counts and theta = w / 2 of B pairs."""
        rows = self.store.lookup(pair_ids, device)
        return ReferenceScores(
            rows.chosen_logp,
            rows.rejected_logp,
            rows.chosen_tokens,
            rows.rejected_tokens,
            dispersion.neg_log_phi(self.weights(pair_ids)).to(device),
        )


def fit_reference(
    store: ReferenceStore,
    config: DispersionConfig,
    pairs: TokenizedPairs,
    seed: int,
    scale: float | None = None,
) -> tuple[TokenizedPairs, Reference]:
    """The training pairs that `dispersion.keep` leaves, and the reference fitted on them."""
    if config.keep is not None:
        pairs = kept_pairs(store, config, pairs)
    numbers = numbers_of(config, pairs)
    return pairs, Reference(store, config, pairs.pair_ids, seed, scale, numbers)


def numbers_of(config: DispersionConfig, pairs: TokenizedPairs) -> Numbers:
    """What the data itself says of the pairs' dispersion, where the recipe asks for that."""
    if config.source is DispersionSource.column:
        return pairs.values("column")
    return pairs.values("rater_neg_log_phi") if config.source is DispersionSource.raters else None


def kept_pairs(
    store: ReferenceStore | None, config: DispersionConfig, pairs: TokenizedPairs
) -> TokenizedPairs:
    """The pairs between the quantiles of `dispersion.keep`; says how many are left out."""
    assert config.keep is not None
    raw = raw_weights(store, config, pairs.pair_ids, numbers_of(config, pairs))
    inside = dispersion.within_quantiles(raw, *config.keep).numpy()
    kept = pairs.take(np.flatnonzero(inside))
    log.info(
        "dispersion.keep: %d of %d training pairs lie between the quantiles %g and %g of w",
        *(len(kept), len(pairs), *config.keep),
    )
    return kept


def raw_weights(
    store: ReferenceStore | None,
    config: DispersionConfig,
    pair_ids: Sequence[str],
    numbers: Numbers,
) -> Tensor:
    """w of N pairs before its scale, (N,) float64; NaN where nothing is known.

    Only the reference's entropies need its store.

    Raises:
        DataError: a number of the data that cannot be a weight.
    """
    if config.source is DispersionSource.entropy:
        assert store is not None
        return dispersion.raw_weight(normalised_entropy(store, config, pair_ids))
    assert numbers is not None
    if (numbers < 0).any():
        index = int(np.flatnonzero(numbers < 0)[0])
        raise DataError(
            f"dispersion.column={config.column} holds {numbers[index]:g} for pair "
            f"{pair_ids[index]}; w and -log phi are at least 0."
        )
    is_weight = config.source is DispersionSource.column and config.column_is is ColumnKind.weight
    return torch.as_tensor(numbers * (1 if is_weight else 2), dtype=torch.float64)


def normalised_entropy(
    store: ReferenceStore, config: DispersionConfig, pair_ids: Sequence[str]
) -> Tensor:
    """The reference's mean token entropy of N pairs, (N,), as the recipe pools it."""
    rows = store.lookup(pair_ids)
    number = config.normaliser
    return dispersion.normalised_entropy(
        *_spans(rows, config.span),
        store.vocab_size,
        pool_tokens=config.pooling is Pooling.tokens,
        normaliser=None if isinstance(number, str) else float(number),
    )


def _spans(rows: ReferenceRows, span: Span) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed entropy and number of the tokens that count, chosen and rejected."""
    chosen, rejected = rows.chosen_entropy_sum, rows.rejected_entropy_sum
    if span is Span.response:
        return chosen, rows.chosen_tokens, rejected, rows.rejected_tokens
    return (
        (chosen - rows.chosen_first_entropy).clamp(min=0),
        rows.chosen_tokens - 1,
        (rejected - rows.rejected_first_entropy).clamp(min=0),
        rows.rejected_tokens - 1,
    )
