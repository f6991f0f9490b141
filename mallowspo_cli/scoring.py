"""One forward pass over a pack of pairs, for the reference pass, evaluation and training alike."""

from typing import Any

from torch import Tensor, nn

from mallowspo_cli.models.attention import scoring
from mallowspo_cli.models.flops import ForwardFlops
from mallowspo_cli.models.head import install_head
from mallowspo_cli.objectives.base import PairEntropies, PairScores
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
        self, batch: PairBatch, entropy: bool = False
    ) -> PairScores | tuple[PairScores, PairEntropies]:
        """Summed log-probs and token counts of B pairs; with `entropy`, entropies beside them."""
        causal = self.causal_model
        hidden = self._hidden_states(causal.base_model, batch)  # type: ignore[arg-type]
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.source_index)
        head = causal.get_output_embeddings()  # type: ignore[operator]
        tokens = head(rows, batch.target_ids, entropy=entropy)

        responses = 2 * len(batch.pair_ids)
        counts = batch.response_tokens
        logps = _sum(tokens.logps, batch.response_index, responses)
        scores = PairScores(*_split(logps), *_split(counts))
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


def _sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums per response; in float32 or better."""
    return values.new_zeros(size).index_add(0, index, values)


def _split(per_response: Tensor) -> tuple[Tensor, Tensor]:
    """(2 B,) to the chosen (B,) and the rejected (B,)."""
    return per_response[0::2], per_response[1::2]
