"""What some losses ask of the policy beside sums over whole responses."""

from dataclasses import dataclass

from torch import Tensor

from mallowspo_cli.objectives.base import Objective, PairScores


# Without slots, as PairScores.
@dataclass(frozen=True)
class DetailedScores(PairScores):
    """Scores of B pairs with sums over tokens that a loss cannot derive from the others.

    They are the policy's alone: a reference store holds whole sums.
    """

    chosen_common_logps: Tensor
    """(B,) log-prob of the chosen response's first min(T_w, T_l) tokens, in nats."""
    rejected_common_logps: Tensor
    """(B,) the same of the rejected response: of the shorter one it is the whole log-prob."""
    chosen_log_collisions: Tensor
    """(B,) log sum_v p_v^2 of the next-token distributions, summed over the chosen response's
    tokens, in nats; without a gradient."""
    rejected_log_collisions: Tensor
    """(B,) the same of the rejected response."""


def require_details(objective: Objective, policy: PairScores) -> DetailedScores:
    """`policy`; TypeError if its details are not there."""
    if not isinstance(policy, DetailedScores):
        found = type(policy).__name__
        raise TypeError(f"{type(objective).__name__} needs DetailedScores, found {found}")
    return policy
