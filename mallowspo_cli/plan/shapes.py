"""What a plan knows of a model: parameters and widths, read off a model that has no weights."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mallowspo_cli.errors import ModelError, first_line
from mallowspo_cli.models.flops import ForwardFlops, head_dim, whole_shape
from mallowspo_cli.models.load import add_lora
from mallowspo_cli.plan.blocks import (
    blocks_of,
    groups_of,
    kept_by_activation,
    norms_of,
)
from mallowspo_cli.recipe.schema import LoraConfig


@dataclass(frozen=True)
class BlockShape:
    """Widths of a block: numbers that it computes for each token, by what they are."""

    parameters: int
    largest: int
    """Parameters of its largest tensor."""
    hidden: int
    """Width of the stream that goes from block to block."""
    norms: float
    """Norms written out in Python, in sum."""
    fused_norms: float
    """Norms that are one operator, in sum."""
    shared_inputs: int
    """Inputs of matrices behind norms: one where several have the same (q, k and v, say)."""
    inputs: int
    """The same, as often as matrices read them."""
    last_inputs: int
    """Inputs of the matrices that end attention and MLP."""
    widest: int
    """The widest of these."""
    outputs: int
    """Results of all matrices."""
    activations: int
    """What the MLP keeps before its last matrix's input: gate, activated gate and up, say."""
    queries: int = 0
    """In attention, over all heads; 0 where no attention was recognised."""
    keys: int = 0
    """Keys and values together."""
    heads: int = 0
    unrotated: int = 0
    """Queries and keys as they were before their rotation: kept where one matrix makes them
    together with the values."""
    matrices: int = 0
    """Parameters that a token is multiplied with."""
    not_again: int = 0
    """Of these, those of a last matrix: recomputing a block stops before it, since nothing that
    the backward pass needs comes behind."""

    @classmethod
    def of(cls, block: nn.Module, config: Any) -> "BlockShape":
        """The widths of a transformers block, from the shapes of its parameters alone.

        Matrices of one module are a group, whose last leads back to the stream. The group with the
        widths of the configuration's heads is attention; any other is taken for an MLP, with a gate
        if twice the width of its last matrix goes into it.
        """
        hidden, width = config.hidden_size, head_dim(config)
        heads = getattr(config, "num_attention_heads", None) or 0
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        groups = groups_of(block, config)
        attention = (heads * width, (heads + 2 * kv_heads) * width)
        found = next((group for group in groups if group.widths == attention), None)
        kept = kept_by_activation(block)
        mlps = [group.kept_before_last(kept) for group in groups if group is not found]
        rotated = getattr(config, "rope_parameters", None) is not None
        fused = rotated and found is not None and len(found.first) == 1
        per_head = (heads + kv_heads) * width / 2
        norms = list(norms_of(block, hidden, width, per_head))
        # Results that are normalised or weighed are needed again.
        ends_in_matrix = sum(size == hidden for size, _ in norms) <= len(groups) == 2
        return cls(
            parameters=sum(prod(whole_shape(p)) for p in block.parameters()),
            largest=max(prod(whole_shape(p)) for p in block.parameters()),
            hidden=hidden,
            norms=sum(size for size, is_fused in norms if not is_fused),
            fused_norms=sum(size for size, is_fused in norms if is_fused),
            shared_inputs=sum(max((m.inputs for m in g.first), default=0) for g in groups),
            inputs=sum(m.inputs for g in groups for m in g.first),
            last_inputs=sum(g.last.inputs for g in groups),
            widest=max((g.last.inputs for g in groups), default=hidden),
            outputs=sum(m.outputs for g in groups for m in (*g.first, g.last)),
            activations=sum(mlps),
            queries=heads * width if found else 0,
            keys=2 * kv_heads * width if found else 0,
            heads=heads if found else 0,
            unrotated=(heads + kv_heads) * width if fused else 0,
            matrices=sum(m.size for g in groups for m in (*g.first, g.last)),
            not_again=groups[-1].last.size if ends_in_matrix else 0,
        )


@dataclass(frozen=True)
class ModelShape:
    """A model to train."""

    flops: ForwardFlops
    blocks: tuple[BlockShape, ...]
    hidden: int
    vocab: int
    parameters: int
    """All of them; tied ones once."""
    trained: int
    """Those that are trained."""
    trained_share: float
    """Share of the blocks' matrix products that are with trained matrices."""
    adapters: bool
    """Whether adapters alone are trained."""

    @classmethod
    def of(cls, model: nn.Module) -> "ModelShape":
        """That of a transformers model, with or without adapters; it may lie on the meta device."""
        base = getattr(model, "get_base_model", None)
        causal: Any = model if base is None else base()
        config = causal.config.get_text_config(decoder=True)
        parameters = list(model.parameters())
        trained = sum(prod(whole_shape(p)) for p in parameters if p.requires_grad)
        flops = ForwardFlops.of(causal)
        return cls(
            flops=flops,
            blocks=tuple(BlockShape.of(block, config) for block in blocks_of(causal.base_model)),
            hidden=config.hidden_size,
            vocab=causal.get_output_embeddings().out_features,
            parameters=sum(prod(whole_shape(p)) for p in parameters),
            trained=trained,
            trained_share=1.0 if base is None else 2 * trained / flops.per_token,
            adapters=base is not None,
        )


def read_shape(directory: Path, lora: LoraConfig) -> ModelShape:
    """The shape of the model in a directory, from its config.json: no weights are read.

    Raises:
        ModelError: no model that transformers knows.
    """
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(directory)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            if lora.rank:
                model = add_lora(model, lora, seed=0)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"{directory} describes no model: {first_line(error)}") from error
    return ModelShape.of(model)
