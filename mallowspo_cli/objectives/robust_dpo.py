"""Robust DPO: DPO's loss without the bias of flipped labels."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from mallowspo_cli.objectives.base import PairScores, register, smoothed_loss
from mallowspo_cli.objectives.baseline import RewardLoss


@register("robust_dpo")
@dataclass(kw_only=True)
class RobustDPO(RewardLoss):
    """[-(1 - e) log sigma(m) + e log sigma(-m)] / (1 - 2 e), m = r_w - r_l.

    Where each label is flipped with probability e, its mean is DPO's loss on the true labels; e = 0
    is DPO. It has no minimum: it falls by e / (1 - 2 e) per unit of margin without end, and the
    pull never drops below that times beta, so a long run at a large e drives the pairs apart. cDPO
    (`dpo` with `label_smoothing`) has a plus before the e and stops at m = log((1 - e) / e).

    Source: Chowdhury et al. 2024 (arXiv 2403.00409); TRL's `robust`.
    """

    label_smoothing: float = 0.1
    """Share e of labels that are flipped, in [0, 0.5); an estimate of the data's, not a tuning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_label_smoothing()

    def losses(self, chosen: Tensor, rejected: Tensor, policy: PairScores) -> Tensor:
        margin, flipped = chosen - rejected, self.label_smoothing
        kept = functional.logsigmoid(margin)
        # Both weights are divided first: they add to 1, the second below 0.
        return smoothed_loss(kept, functional.logsigmoid(-margin), -flipped / (1 - 2 * flipped))
