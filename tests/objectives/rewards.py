"""Pairs with given log-ratios, for the tests of the baselines."""

import torch
from torch import Tensor

from mallowspo_cli.objectives import Objective, PairScores, ReferenceScores


def loss_and_pulls(
    objective: Objective,
    chosen: float,
    rejected: float,
    *,
    weight: float = 1.0,
    tokens: tuple[int, int] = (5, 8),
) -> tuple[float, float, float]:
    """(loss, its slope in the chosen log-prob, in the rejected one) at log-ratios in nats."""
    moved = torch.tensor([[chosen], [rejected]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    lengths: tuple[Tensor, Tensor] = (torch.tensor(tokens[:1]), torch.tensor(tokens[1:]))
    policy = PairScores(moved[0], moved[1], *lengths)
    reference = ReferenceScores(zero, zero, *lengths, zero + weight / 2)
    losses = objective(policy, reference).losses
    (slopes,) = torch.autograd.grad(losses.sum(), moved)
    return losses.item(), slopes[0].item(), slopes[1].item()
