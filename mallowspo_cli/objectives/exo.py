"""EXO: the KL of DPO's classification the other way round."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from mallowspo_cli.objectives.base import PairScores, register
from mallowspo_cli.objectives.baseline import RewardLoss


@register("exo")
@dataclass(kw_only=True)
class EXO(RewardLoss):
    """KL(q || p) of q = (sigma(m), sigma(-m)) and p = (1 - e, e), m = r_w - r_l.

    DPO with label smoothing is KL(p || q) and a constant. The slope in m is sigma(m) sigma(-m)
    (m - log((1 - e) / e)): 0 at the target margin (6.9 at e = 0.001), and next to 0 for pairs far
    behind, which are given up where DPO pulls them hardest. At e = 0 the loss is infinite.

    Source: Ji et al. 2024 (arXiv 2402.00856), the form for two responses with labels ("EXO-pref",
    K = 2); TRL's `exo_pair`. The paper's form with a reward model needs more than pairs.
    """

    label_smoothing: float = 0.001
    """Target probability e of the rejected response, in (0, 0.5); raise it for a smaller margin."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_knob("label_smoothing", lambda value: 0 < value < 0.5, "a number in (0, 0.5)")

    def losses(self, chosen: Tensor, rejected: Tensor, policy: PairScores) -> Tensor:
        log_chosen = functional.logsigmoid(chosen - rejected)
        log_rejected = functional.logsigmoid(rejected - chosen)
        return log_chosen.exp() * (log_chosen - math.log1p(-self.label_smoothing)) + (
            log_rejected.exp() * (log_rejected - math.log(self.label_smoothing))
        )
