"""Matrix-multiplication FLOPs of a causal language model, from its parameters and its shape."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of a forward pass; a multiplication and an addition are two."""

    per_token: float
    """Of the blocks' matrices, for each token: twice their parameters (of a mixture of experts,
    those that a token uses)."""
    per_visible: float
    """Of attention in all layers, for each key that a query sees."""
    per_target: float
    """Of the output layer, for each response token."""

    @classmethod
    def of(cls, model: nn.Module) -> "ForwardFlops":
        """Those of a transformers model, which may lie on the meta device."""
        config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        # A model without attention has no heads.
        heads = getattr(config, "num_attention_heads", None) or 0
        width = head_dim(config)
        return cls(
            per_token=2.0 * _block_parameters(model.base_model, config),  # type: ignore[arg-type]
            per_visible=4.0 * heads * width * config.num_hidden_layers,
            per_target=2.0 * head.in_features * head.out_features,
        )

    def of_pairs(self, lengths: ArrayLike) -> NDArray[np.float64]:
        """FLOPs of each pair, (N,), with its prompt read once; `lengths` (N, 3) are the tokens of
        prompt, chosen and rejected.
        """
        prompt, chosen, rejected = np.asarray(lengths, dtype=np.float64).reshape(-1, 3).T
        visible = (prompt + chosen) ** 2 / 2 + rejected * prompt + rejected**2 / 2
        return (
            self.per_token * (prompt + chosen + rejected)
            + self.per_visible * visible
            + self.per_target * (chosen + rejected)
        )


def head_dim(config: Any) -> int:
    """Width of a head; that of the stream in a model without attention."""
    heads = getattr(config, "num_attention_heads", None) or 1
    try:
        width = getattr(config, "head_dim", None)
    except RuntimeError:
        # Layers of several widths, of which transformers names none.
        width = None
    return width or config.hidden_size // heads


def _block_parameters(backbone: nn.Module, config: Any) -> float:
    """Parameters of the matrices that every token is multiplied with."""
    embeddings = {id(m.weight) for m in backbone.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in backbone.parameters() if p.ndim == 2 and id(p) not in embeddings]
    # Experts of a layer lie in one tensor (experts, out, in); a token goes through a few of them.
    experts = [p for p in backbone.parameters() if p.ndim == 3]
    share = 0.0
    if experts:
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        total = next((v for name in names if (v := getattr(config, name, None))), 1)
        used = ("num_experts_per_tok", "top_k_experts")
        share = next((v for name in used if (v := getattr(config, name, None))), total) / total
    return sum(p.numel() for p in matrices) + share * sum(p.numel() for p in experts)
