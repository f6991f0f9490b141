"""One forward pass over a pack of pairs, for the reference pass, evaluation and training alike."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mallowspo_cli.models.attention import scoring
from mallowspo_cli.models.flops import ForwardFlops
from mallowspo_cli.models.head import TokenStatistics, install_head
from mallowspo_cli.objectives.base import Objective, PairEntropies, PairScores
from mallowspo_cli.objectives.details import DetailedScores
from mallowspo_cli.packing.layout import Layout, PairBatch


class PairScorer(nn.Module):
    """A language model that scores pairs.

    This is what accelerate prepares, so that an engine's hooks see one forward.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        install_head(self.causal_model)
        self.flops = ForwardFlops.of(self.causal_model)
        # Where engines look for the blocks to shard by.
        self._no_split_modules = getattr(self.causal_model, "_no_split_modules", None)

    @property
    def causal_model(self) -> nn.Module:
        """The model without adapters' wrapping: backbone and output layer."""
        base = getattr(self.model, "get_base_model", None)
        return base() if base is not None else self.model

    @property
    def config(self) -> Any:
        """The language model's own configuration."""
        return self.causal_model.config

    @property
    def layout(self) -> Layout:
        """How packs for this model lie."""
        return Layout.of(self.config._attn_implementation)

    @property
    def vocab_size(self) -> int:
        """Number of logits, which may exceed the tokenizer's size."""
        return self.causal_model.get_output_embeddings().out_features  # type: ignore[operator]

    def tie_weights(self) -> None:
        """Make an output layer that is the embedding that again: an engine that moved the model to
        the meta device asks for it.
        """
        causal: Any = self.causal_model
        causal.tie_weights()

    def forward(
        self, batch: PairBatch, entropy: bool = False, details: bool = False
    ) -> PairScores | tuple[PairScores, PairEntropies]:
        """Summed log-probs and token counts of B pairs; with `entropy`, entropies beside them; with
        `details` the scores are DetailedScores.
        """
        causal = self.causal_model
        hidden = self._hidden_states(causal.base_model, batch)  # type: ignore[arg-type]
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.source_index)
        head = causal.get_output_embeddings()  # type: ignore[operator]
        tokens = head(rows, batch.target_ids, entropy=entropy, collision=details)

        responses = 2 * len(batch.pair_ids)
        counts = batch.response_tokens
        logps = _sum(tokens.logps, batch.response_index, responses)
        scores = PairScores(*_split(logps), *_split(counts))
        if details:
            scores = _detailed(scores, tokens, batch)
        if not entropy:
            return scores
        sums = _sum(tokens.entropies, batch.response_index, responses)
        first = tokens.entropies[counts.cumsum(0) - counts]
        return scores, PairEntropies(*_split(sums), *_split(first))

    def _hidden_states(self, backbone: nn.Module, batch: PairBatch) -> Tensor:
        """Last hidden states, in the shape of the pack's tokens."""
        if batch.segments is None:
            return backbone(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        if self.layout is not Layout.shared:
            raise ValueError("a pack of shared prompts for a model that cannot share them")
        with scoring():
            return backbone(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                segments=batch.segments,
                use_cache=False,
            ).last_hidden_state


def scorer_for(
    objective: Objective, scorer: Callable[..., Any]
) -> Callable[[PairBatch], PairScores]:
    """A `PairScorer`, however wrapped, as an objective needs it called."""
    return partial(scorer, details=True) if objective.needs_details else scorer


def _detailed(scores: PairScores, tokens: TokenStatistics, batch: PairBatch) -> DetailedScores:
    """`scores` with what some losses need beside them."""
    counts, index = batch.response_tokens, batch.response_index
    assert tokens.log_collisions is not None
    place = torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[index]
    common = counts.view(-1, 2).amin(dim=1).repeat_interleave(2)
    # Not logps times a mask: 0 times minus infinity would be NaN.
    logps = tokens.logps.masked_fill(place >= common[index], 0.0)
    return DetailedScores(
        **vars(scores),
        **_named("common_logps", _sum(logps, index, len(counts))),
        **_named("log_collisions", _sum(tokens.log_collisions, index, len(counts))),
    )


def _named(field: str, per_response: Tensor) -> dict[str, Tensor]:
    """(2 B,) as the fields of the chosen and the rejected responses."""
    chosen, rejected = _split(per_response)
    return {f"chosen_{field}": chosen, f"rejected_{field}": rejected}


def _sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums per response; in float32 or better."""
    return values.new_zeros(size).index_add(0, index, values)


def _split(per_response: Tensor) -> tuple[Tensor, Tensor]:
    """(2 B,) to the chosen (B,) and the rejected (B,)."""
    return per_response[0::2], per_response[1::2]
