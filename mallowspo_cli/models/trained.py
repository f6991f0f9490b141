"""A trained model, put together from its base and from what was trained."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mallowspo_cli.errors import CheckpointError, ModelError, first_line
from mallowspo_cli.models.load import add_lora, load_model
from mallowspo_cli.recipe.schema import ModelConfig

EAGER = "eager"
"""Every model has this attention, on every machine; nothing is computed with it here."""
PREFIX = "model."
"""A checkpoint has names of the scorer, which holds the model under this one."""


def trained_model(
    config: ModelConfig, directory: Path, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> Any:
    """The base in `directory` in type `dtype`, with trained weights, on the CPU.

    Adapters are wrapped around it, not merged, and stay float32. The base is never quantised.

    Args:
        config: the recipe's model.
        weights: what was trained, by its names in the scorer; each is read once.

    Raises:
        ModelError: the base does not load.
        CheckpointError: the weights are those of another model.
    """
    model = load_model(directory, dtype, EAGER)
    if config.lora.rank:
        # Their initial weights, which the seed decides, are overwritten.
        model = add_lora(model, config.lora, seed=0)
    own = {f"{PREFIX}{name}": p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != weights.keys():
        raise _another_model(own.keys() ^ weights.keys())
    with torch.no_grad():
        for name, parameter in own.items():
            value = weights[name]
            if value.shape != parameter.shape:
                raise _another_model([name])
            parameter.copy_(value)
    return model


def merge_adapters(model: Any, dtype: torch.dtype) -> nn.Module:
    """The model of a float32 base with its adapters added to it, rounded once to `dtype`."""
    merged = model.merge_and_unload()
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(dtype)
    return merged


def adapter_weights(directory: Path) -> dict[str, Tensor]:
    """Tensors of a peft adapter's directory, by their names in the scorer.

    Raises:
        ModelError: it holds none that can be read.
    """
    file = directory / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read the adapters in {file}: {first_line(error)}.") from error
    # In a file peft leaves out which of several adapters it is.
    return {
        PREFIX + re.sub(r"\.(lora_[AB]|lora_embedding_[AB])\b", r".\1.default", name): tensor
        for name, tensor in tensors.items()
    }


def _another_model(names: Iterable[str]) -> CheckpointError:
    wrong = sorted(name.removeprefix(PREFIX) for name in names)
    more = ", ..." if wrong[3:] else ""
    return CheckpointError(
        "what was trained is of another model than the run's recipe.yaml describes: they differ in "
        f"{len(wrong)} tensors or more ({', '.join(wrong[:3])}{more}). Put recipe.yaml and the "
        "base back as they were."
    )
