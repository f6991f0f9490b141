"""The optimizer and its learning rate."""

import math

import torch
from torch import nn

from mallowspo_cli.recipe.choices import Scheduler
from mallowspo_cli.recipe.schema import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; only matrices decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.learning_rate, betas=(0.9, 0.999), fused=True
    )


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (counted from 0) of `total_steps`."""
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.scheduler is Scheduler.constant:
        return config.learning_rate
    done = (step - warmup) / max(total_steps - warmup, 1)
    if config.scheduler is Scheduler.linear:
        return config.learning_rate * (1 - done)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
