"""R-DPO: DPO of a reward with a penalty for length."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from mallowspo_cli.objectives.base import PairScores, register
from mallowspo_cli.objectives.baseline import RewardLoss


@register("r_dpo")
@dataclass(kw_only=True)
class RDPO(RewardLoss):
    """-log sigma(r_w - r_l + alpha (|y_w| - |y_l|)), |y| the number of tokens.

    The policy is that of the reward less alpha |y|, so its own log-ratios need not explain what the
    length explains: a longer chosen response pulls less, a shorter one more. The term holds no
    gradient of its own; alpha = 0 is DPO. w(x) multiplies the rewards alone, not the lengths (the
    reading as a weight on the KL penalty; RainbowPO's would multiply both).

    Source: Park et al. 2024 (arXiv 2403.19159). |y| is what the loss counts as the response, an end
    token included.
    """

    length_penalty: float = 0.01
    """alpha, per token, at least 0; ours: raise it until answers are as long as the data's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_knob(
            "length_penalty", lambda value: 0 <= value < math.inf, "a finite number, at least 0"
        )

    def losses(self, chosen: Tensor, rejected: Tensor, policy: PairScores) -> Tensor:
        longer = (policy.chosen_tokens - policy.rejected_tokens).to(chosen.dtype)
        return -functional.logsigmoid(chosen - rejected + self.length_penalty * longer)
