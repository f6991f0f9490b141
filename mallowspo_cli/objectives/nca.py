"""NCA: each response against noise, so that the chosen one does not fall with the rejected one."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from mallowspo_cli.objectives.base import PairScores, register
from mallowspo_cli.objectives.baseline import RewardLoss


@register("nca")
@dataclass(kw_only=True)
class NCA(RewardLoss):
    """-log sigma(r_w) - (1/2) log sigma(-r_w) - (1/2) log sigma(-r_l), r = beta log(pi / pi_ref).

    Each reward counts by itself: the chosen response's is drawn to log 2 from either side, the
    rejected one's down, less and less. It starts at 2 log 2, with a pull of beta / 4 on each. With
    w(x) the chosen log-ratio is drawn to log 2 / (w beta).

    Source: Chen et al. 2024 (arXiv 2402.05369), NCA for two responses with the whole label on the
    chosen one; TRL's `nca_pair`. InfoNCA for such pairs is DPO.
    """

    def losses(self, chosen: Tensor, rejected: Tensor, policy: PairScores) -> Tensor:
        noise = functional.logsigmoid(-chosen) + functional.logsigmoid(-rejected)
        return -functional.logsigmoid(chosen) - 0.5 * noise
