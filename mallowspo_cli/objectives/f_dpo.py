"""f-DPO: DPO under other divergences from the reference than the reverse KL."""

import math
from dataclasses import dataclass
from enum import Enum

from torch import Tensor
from torch.nn import functional

from mallowspo_cli.objectives.base import PairScores, choice, register
from mallowspo_cli.objectives.baseline import RewardLoss, tangent_exp


class Divergence(Enum):
    """What holds the policy to the reference."""

    reverse_kl = "reverse_kl"
    forward_kl = "forward_kl"
    js = "js"
    alpha = "alpha"


@register("f_dpo")
@dataclass(kw_only=True)
class FDPO(RewardLoss):
    """-log sigma(beta f'(u_w) - beta f'(u_l)), u = pi / pi_ref of a whole response.

    f'(u), less f'(1): log u (reverse_kl: this is DPO), 1 - 1/u (forward_kl), log(2u / (1 + u))
    (js), (1 - u^-alpha) / alpha (alpha: to DPO as alpha falls to 0, to forward_kl as it rises to
    1). All but the first are bounded above: a chosen response gains at most 1, log 2 or 1 / alpha
    by becoming likelier, and the rest of the margin has to come from the rejected one. js starts
    half as steep as DPO, the others as steep. forward_kl and alpha grow like u^-1 and u^-alpha as u
    falls, so that over summed log-probs a rejected response a few nats down is all of the margin.
    With `length_normalised` u is e^(mean log-ratio).

    Source: Wang et al. 2023 (arXiv 2309.16240). TRL's `f_alpha_divergence_coef` is 1 - alpha. Ours:
    beyond e^20 the powers go on along their tangent, or they would overflow (TRL clamps the alpha
    form alone, at e^80). Logged rewards are beta log u. w(x) multiplies both terms.
    """

    divergence: Divergence = Divergence.js
    """js (between the KLs), reverse_kl (DPO), forward_kl (spreads over the reference) or alpha."""
    alpha: float = 0.5
    """In (0, 1), read by `divergence: alpha` alone; nearer to 0 is nearer to DPO."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.divergence = choice(Divergence, self.divergence, "divergence")
        self.check_knob("alpha", lambda value: 0 < value < 1, "a number in (0, 1)")

    def slope(self, log_ratio: Tensor) -> Tensor:
        match self.divergence:
            case Divergence.reverse_kl:
                return log_ratio
            case Divergence.forward_kl:
                return 1 - tangent_exp(-log_ratio)
            case Divergence.js:
                return math.log(2) + functional.logsigmoid(log_ratio)
            case Divergence.alpha:
                return (1 - tangent_exp(-self.alpha * log_ratio)) / self.alpha

    def losses(self, chosen: Tensor, rejected: Tensor, policy: PairScores) -> Tensor:
        return -functional.logsigmoid(chosen - rejected)
