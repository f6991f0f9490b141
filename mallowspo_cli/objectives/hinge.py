"""SLiC's hinge loss, on log-ratios."""

from dataclasses import dataclass

from torch import Tensor

from mallowspo_cli.objectives.base import PairScores, register
from mallowspo_cli.objectives.baseline import RewardLoss


@register("hinge")
@dataclass(kw_only=True)
class Hinge(RewardLoss):
    """max(0, 1 - (r_w - r_l)), r = beta log(pi / pi_ref).

    The pull is beta until the log-ratios are 1 / beta nats apart, and none after that: twice DPO's
    at the start, DPO's own for a pair far behind. With w(x) the target gap is 1 / (w beta).

    Source: SLiC-HF (Zhao et al. 2023, arXiv 2305.10425), which has log-probs without a reference, a
    margin in nats and a likelihood term; this form, "hinge-norm", is RSO's (Liu et al. 2023, arXiv
    2309.06657), and TRL's `hinge`.
    """

    def losses(self, chosen: Tensor, rejected: Tensor, policy: PairScores) -> Tensor:
        return (1 - (chosen - rejected)).relu()
