"""Anchored preference optimisation: which way the chosen response goes is part of the loss."""

from dataclasses import dataclass

from torch import Tensor

from mallowspo_cli.objectives.base import PairScores, register
from mallowspo_cli.objectives.baseline import RewardLoss


@register("apo_zero")
@dataclass(kw_only=True)
class APOZero(RewardLoss):
    """sigma(-r_w) + sigma(r_l), r = beta log(pi / pi_ref): the chosen up, the rejected down.

    For chosen responses that are better than the model's own. It lies in (0, 2) and is not convex:
    the pull on a response is greatest at r = 0 (beta / 4) and dies away on both sides, for pairs
    far behind too. w(x) multiplies both rewards.

    Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7, which is this less 1; TRL's
    `apo_zero`.
    """

    def losses(self, chosen: Tensor, rejected: Tensor, policy: PairScores) -> Tensor:
        return (-chosen).sigmoid() + rejected.sigmoid()


@register("apo_down")
@dataclass(kw_only=True)
class APODown(RewardLoss):
    """sigma(r_w) + sigma(r_l - r_w), r = beta log(pi / pi_ref): both down, the rejected more.

    For chosen responses that are worse than the model's own, which otherwise raise what they hold.
    It lies in (0, 2) and is not convex. The chosen response is pushed down while r_w lies nearer to
    0 than the margin does, and up otherwise; at the reference the two cancel, and the rejected one
    alone is pulled (beta / 4). w(x) multiplies both rewards.

    Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8, which is this less 1; TRL's
    `apo_down`.
    """

    def losses(self, chosen: Tensor, rejected: Tensor, policy: PairScores) -> Tensor:
        return chosen.sigmoid() + (rejected - chosen).sigmoid()
