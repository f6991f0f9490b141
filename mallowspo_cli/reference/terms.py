"""What the reference gives an objective: stored log-probs, and the dispersion derived from them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mallowspo_cli import dispersion
from mallowspo_cli.objectives.base import ReferenceScores
from mallowspo_cli.recipe.schema import DispersionConfig, DispersionMode
from mallowspo_cli.reference.store import ReferenceStore


@dataclass(frozen=True)
class DispersionSummary:
    """What the dispersion did to the training split, for the run's files and the log."""

    mode: str
    scale: float
    """w = scale * -ln(mean normalised entropy)."""
    vocab_size: int
    pairs: int
    """Training pairs."""
    weight_mean: float
    weight_min: float
    weight_max: float
    clamped: int
    """Pairs whose normalised entropy sits on a bound."""
    empty: int
    """Pairs with an empty response; their weight is 1."""


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
    ):
        self.store, self.config, self.seed = store, config, seed
        entropy = self._entropy(train_ids)
        if scale is None:
            auto = config.scale == "auto"
            scale = dispersion.unit_mean_scale(entropy) if auto else float(config.scale)
        self.scale = scale
        self._weights: dict[str, float] = {}
        self._estimates: dict[str, float] = {}
        weights = self.add(train_ids)
        self.summary = DispersionSummary(
            mode=config.mode.value,
            scale=scale,
            vocab_size=store.vocab_size,
            pairs=len(train_ids),
            weight_mean=float(weights.double().mean()),
            weight_min=float(weights.min()),
            weight_max=float(weights.max()),
            clamped=dispersion.clamped_count(entropy),
            empty=dispersion.empty_count(entropy),
        )

    def add(self, pair_ids: Sequence[str]) -> Tensor:
        """Weigh the pairs of a split; returns w, (N,). `shuffled` permutes within the split.

        A pair that appears twice, or was weighed with an earlier split, keeps its first weight.
        """
        new = [pair for pair in dict.fromkeys(pair_ids) if pair not in self._weights]
        weights = dispersion.weight(self._entropy(new), self.scale)
        self._estimates.update(zip(new, weights.tolist(), strict=True))
        if self.config.mode is DispersionMode.constant:
            weights = dispersion.constant(weights)
        elif self.config.mode is DispersionMode.shuffled:
            weights = dispersion.shuffled(weights, self.seed)
        self._weights.update(zip(new, weights.tolist(), strict=True))
        return self.weights(pair_ids)

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

    def _entropy(self, pair_ids: Sequence[str]) -> Tensor:
        rows = self.store.lookup(pair_ids)
        return dispersion.normalised_entropy(
            rows.chosen_entropy_sum,
            rows.chosen_tokens,
            rows.rejected_entropy_sum,
            rows.rejected_tokens,
            self.store.vocab_size,
        )
