"""SPPO with hard labels: a squared loss with a target for each response."""

from dataclasses import dataclass

from torch import Tensor

from mallowspo_cli.objectives.base import PairScores, register
from mallowspo_cli.objectives.baseline import RewardLoss


@register("sppo_hard")
@dataclass(kw_only=True)
class SPPOHard(RewardLoss):
    """[(r_w - 1/2)^2 + (r_l + 1/2)^2] / beta^2, r = beta log(pi / pi_ref).

    That is (log u_w - 1/(2 beta))^2 + (log u_l + 1/(2 beta))^2: it is 0 at log-ratios of plus and
    minus 1/(2 beta) nats, and where IPO has a target for the gap alone, this holds both. It is of
    the size 1/beta^2, so its learning rate has to be smaller; the paper's runs have beta = 0.001,
    targets that training does not reach. With w(x) the targets are +-1/(2 w beta).

    Source: Wu et al. 2024 (arXiv 2405.00675), eq. 4.7 with eta = 1/beta and win probabilities 1 and
    0 (TRL's `sppo_hard`). The paper estimates them with a preference model on responses drawn from
    the policy anew each round; on fixed pairs this is its loss, not its algorithm.
    """

    beta: float = 0.1
    """Targets are +-1/(2 beta) nats; lower it for farther ones and a larger loss (1/beta^2)."""
    length_normalised: bool = False
    """Mean instead of summed log-probs: targets per token. At beta = 10 the loss is about 0.01."""

    def losses(self, chosen: Tensor, rejected: Tensor, policy: PairScores) -> Tensor:
        return ((chosen - 0.5) ** 2 + (rejected + 0.5) ** 2) / self.beta**2
