"""Small bandits for the tests."""

import numpy as np
import torch

from mallowspo_cli.experiments.bandit.one_prompt import Grid, arm_pairs, draw_counts
from mallowspo_cli.experiments.bandit.solver import BUDGET, Problem


def problem(counts: np.ndarray, theta: float, budget: float = BUDGET) -> Problem:
    """Tabular problems of (B, arms, arms) counts or probabilities."""
    winner, loser = arm_pairs(counts.shape[-1])
    identity = torch.eye(counts.shape[-1], dtype=torch.float64)
    share = torch.from_numpy(counts[:, winner, loser])
    share = share / share.sum(-1, keepdim=True)
    many = torch.full((len(counts),), budget, dtype=torch.float64)
    return Problem(identity[winner] - identity[loser], share, torch.full_like(share, theta), many)


def some_counts(phi: float, pairs: int = 300, seeds: int = 3) -> np.ndarray:
    grid = Grid(distances=("kendall",), dispersions=(phi,), pairs=(pairs,), seeds=seeds)
    return draw_counts(grid)[0, 0, 0]
