"""Tiny random models of many architectures, in float64."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 7
"""Shorter than most responses, so that it matters."""

SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "llama tied": ("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2 window": (
        "Qwen2",
        {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}),
    "gemma": ("Gemma", {**GROUPED, "head_dim": 16}),
    "gemma2": (
        "Gemma2",
        {
            **GROUPED,
            "head_dim": 8,
            "sliding_window": WINDOW,
            # Low caps, so that they matter.
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": ("Gemma3", {**GROUPED, "head_dim": 8, "sliding_window": WINDOW}),
    "phi": ("Phi", {**GROUPED, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", GROUPED),
    "gpt_neox": ("GPTNeoX", {**SIZES, "use_parallel_residual": True}),
    "gpt2": ("GPT2", GPT2),
    "gpt2 inverse scale": ("GPT2", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "cohere": ("Cohere", {**GROUPED, "logit_scale": 0.3}),
    "granite": ("Granite", {**GROUPED, "logits_scaling": 4.0, "attention_multiplier": 0.2}),
    "olmo2": ("Olmo2", GROUPED),
    "mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "decoder_sparse_step": 1},
    ),
    "qwen2_moe window": (
        "Qwen2Moe",
        {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    ),
}
"""Families whose prompts are shared: class prefix and configuration."""
PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", {**SIZES, "n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", SIZES),
    "stablelm": ("StableLm", GROUPED),
    "mamba": ("Mamba", {**SIZES, "state_size": 4}),
}
"""Families that are padded."""
FAMILIES = SHARED | PADDED
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": ("GptOss", {**GROUPED, "head_dim": 8, "num_local_experts": 4}),
    "doge": ("Doge", GROUPED),
    "phimoe": ("Phimoe", {**GROUPED, "sliding_window": WINDOW, "num_local_experts": 4}),
}
"""Families that no test scores."""


def build(family: str, attention: str | None, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model with random weights that depend on the family alone."""
    prefix, options = (FAMILIES | OTHERS)[family]
    names = [f"{prefix}Config", f"{prefix}TextConfig"]
    kind: Callable[..., Any] = next(
        c for name in reversed(names) if (c := getattr(transformers, name, None))
    )
    config = kind(**options)
    for key in vars(config):
        if ("dropout" in key or "pdrop" in key) and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    if attention is not None:
        config._attn_implementation = attention
    # The grouped matrix product takes no float64.
    config._experts_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # Biases of 0 and norms of 1 would hide a mistake.
                nn.init.normal_(parameter, mean=1.0 if parameter.min() == 1 else 0.0, std=0.2)
    return model.to(dtype).train()
