"""Chi-squared preference optimisation: DPO under a divergence that holds the policy harder."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from mallowspo_cli.objectives.base import PairScores, register
from mallowspo_cli.objectives.baseline import RewardLoss, tangent_exp


@register("chi_po")
@dataclass(kw_only=True)
class ChiPO(RewardLoss):
    """-log sigma(clip(beta (u_w + log u_w) - beta (u_l + log u_l), +-2 R)), u = pi / pi_ref.

    u + log u is f'(u) of the chi-squared divergence with the KL. It starts twice as steep as DPO
    (slope u + 1), holds a response that has become likelier (a log-ratio of 5 nats counts as 153)
    and is DPO where both have become far less likely. Outside the clip a pair has no gradient, one
    far behind included: the clip bites where beta u is about 2 R. At beta = 0.1 and R = 10 that is
    5.3 nats, and a rejected response that has gained more is not pulled back. w(x) multiplies both
    terms before the clip, as the rewards elsewhere. With `length_normalised` u is e^(mean
    log-ratio).

    Source: Huang et al. 2024 (arXiv 2407.13399), whose R bounds the true reward. Ours: beyond 20
    nats u goes on along its tangent, or it would overflow; R = 10. Logged rewards are beta log u.
    """

    reward_bound: float = 10.0
    """R: the margin is clipped at twice it; raise it to pull pairs that are far apart, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("reward_bound")

    def slope(self, log_ratio: Tensor) -> Tensor:
        return tangent_exp(log_ratio) - 1 + log_ratio

    def losses(self, chosen: Tensor, rejected: Tensor, policy: PairScores) -> Tensor:
        bound = 2 * self.reward_bound
        return -functional.logsigmoid((chosen - rejected).clamp(-bound, bound))
