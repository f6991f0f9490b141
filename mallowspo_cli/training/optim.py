"""The optimizer and its learning rate."""

import importlib.util
import math
from typing import Any

import torch
from torch import nn

from mallowspo_cli.errors import TrainingError
from mallowspo_cli.recipe.choices import Optimizer, Scheduler
from mallowspo_cli.recipe.schema import TrainConfig

BETAS = (0.9, 0.999)
"""AdamW's decay rates of the gradient's mean and of its square's."""


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of `train.optimizer` over the trainable parameters; only matrices decay.

    Raises:
        TrainingError: it needs a package or a device that is not there.
    """
    check_optimizer(config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if is_matrix(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if not is_matrix(p)], "weight_decay": 0.0},
    ]
    used: list[dict[str, Any]] = [group for group in groups if group["params"]]
    rate = config.learning_rate
    match config.optimizer:
        case Optimizer.adamw:
            return torch.optim.AdamW(used, lr=rate, betas=BETAS, fused=True)
        case Optimizer.adamw_8bit:
            # Not at the top: the package is there only where somebody asked for it.
            from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]

            return AdamW8bit(used, lr=rate, betas=BETAS)
        case Optimizer.rmsprop:
            # The DPO reference code's, which sets the rate alone; torch has no fused form of it.
            return torch.optim.RMSprop(used, lr=rate)


def check_optimizer(config: TrainConfig) -> None:
    """Before anything else is done.

    Raises:
        TrainingError: the optimizer needs a package or a device that is not there.
    """
    if config.optimizer is not Optimizer.adamw_8bit:
        return
    needs = "train.optimizer=adamw_8bit needs"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TrainingError(f"{needs} bitsandbytes: pip install 'mallowspo[quantized]'")
    if not torch.cuda.is_available():
        raise TrainingError(f"{needs} a CUDA device. Take train.optimizer=adamw here.")


def is_matrix(parameter: torch.Tensor) -> bool:
    """Whether weight decay applies to a parameter: to matrices, not to biases and norms.

    ZeRO-3 leaves a tensor of shape (0,) in each parameter's place and keeps its whole shape in
    `ds_shape`; by what is left every matrix would pass for a bias.
    """
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (counted from 0) of `total_steps`."""
    warmup = warmup_steps(total_steps, config)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.scheduler is Scheduler.constant:
        return config.learning_rate
    done = (step - warmup) / max(total_steps - warmup, 1)
    if config.scheduler is Scheduler.linear:
        return config.learning_rate * (1 - done)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def warmup_steps(total_steps: int, config: TrainConfig) -> int:
    """Steps over which the rate rises: `train.warmup_steps`, or else the share of all steps."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * total_steps)
