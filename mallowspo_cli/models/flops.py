"""Matrix-multiplication FLOPs of a causal language model, from its parameters and its shape."""

from dataclasses import dataclass
from math import prod
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
        return (
            self.per_token * (prompt + chosen + rejected)
            + self.per_visible * visible_keys(lengths)
            + self.per_target * (chosen + rejected)
        )


def visible_keys(lengths: ArrayLike) -> NDArray[np.float64]:
    """Keys that the queries of each pair see, (N,), with its prompt read once; half of a square for
    a causal one. `lengths` (N, 3) are the tokens of prompt, chosen and rejected.
    """
    prompt, chosen, rejected = np.asarray(lengths, dtype=np.float64).reshape(-1, 3).T
    return (prompt + chosen) ** 2 / 2 + rejected * prompt + rejected**2 / 2


def experts_of_a_token(config: Any, experts: int) -> int:
    """How many of a layer's experts a token goes through; all, where nothing says otherwise."""
    names = ("num_experts_per_tok", "top_k_experts")
    return next((used for name in names if (used := getattr(config, name, None))), experts)


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
    found = 0.0
    for parameter in backbone.parameters():
        shape = whole_shape(parameter)
        if len(shape) == 3:
            # Experts of a layer lie in one tensor (experts, out, in).
            found += experts_of_a_token(config, shape[0]) * prod(shape[1:])
        elif len(shape) == 2 and id(parameter) not in embeddings:
            found += prod(shape)
    return found


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter, also where ZeRO-3 leaves this process a part of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
