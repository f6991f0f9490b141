"""LD-DPO: DPO in which what one response is longer by counts less."""

from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional

from mallowspo_cli.objectives.base import (
    ObjectiveOutput,
    PairScores,
    ReferenceScores,
    log_ratios,
    register,
    require_reference,
)
from mallowspo_cli.objectives.baseline import RewardLoss
from mallowspo_cli.objectives.details import require_details


@register("ld_dpo")
@dataclass(kw_only=True)
class LDDPO(RewardLoss):
    """-log sigma(r_w - r_l), where log-probs beyond the shorter response's length count alpha.

    log pi(y) becomes c + alpha (log pi(y) - c), c that of the first min(|y_w|, |y_l|) tokens; the
    shorter response's stays as it is. alpha = 1 is DPO, and alpha = 0 does not see the excess. With
    `length_normalised` the tokens of the excess count alpha, too.

    Source: Liu et al. 2024 (arXiv 2409.06411); TRL's `ld_alpha`, which splits the reference's
    log-probs as the policy's. The reference store holds whole sums, so here the longer response's
    is divided as the policy divides its own at the moment (derived): where c = s log pi(y), without
    a gradient through s, log pi_ref(y) becomes (s + alpha (1 - s)) log pi_ref(y). That is exact
    where policy and reference are one, so that margins begin at 0, and as long as training moves
    both parts in proportion. The gradient of a pair has LD-DPO's direction always; its size is that
    at a margin in which the excess has the share 1 - s of the log-ratio. Logged rewards are of the
    whole log-ratios.
    """

    excess_weight: float = 0.5
    """alpha in [0, 1]; ours. Lower it if answers grow too long."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_knob("excess_weight", lambda value: 0 <= value <= 1, "a number in [0, 1]")

    @property
    def needs_details(self) -> bool:
        return True

    def losses(self, chosen: Tensor, rejected: Tensor, policy: PairScores) -> Tensor:
        return -functional.logsigmoid(chosen - rejected)

    def __call__(self, policy: PairScores, reference: ReferenceScores | None) -> ObjectiveOutput:
        reference = require_reference(self, policy, reference)
        scores = require_details(self, policy)
        common = scores.chosen_tokens.minimum(scores.rejected_tokens)
        tokens = (
            self._split(scores.chosen_tokens, common),
            self._split(scores.rejected_tokens, common),
        )
        split_policy = PairScores(
            self._split(scores.chosen_logps, scores.chosen_common_logps),
            self._split(scores.rejected_logps, scores.rejected_common_logps),
            *tokens,
        )
        chosen_share = _share(scores.chosen_common_logps, scores.chosen_logps)
        rejected_share = _share(scores.rejected_common_logps, scores.rejected_logps)
        split_reference = ReferenceScores(
            reference.chosen_logps * self._split(1.0, chosen_share),
            reference.rejected_logps * self._split(1.0, rejected_share),
            *tokens,
            reference.neg_log_phi,
        )
        chosen, rejected = log_ratios(policy, reference, self.length_normalised)
        return replace(
            super().__call__(split_policy, split_reference),
            chosen_rewards=self.beta * chosen.detach(),
            rejected_rewards=self.beta * rejected.detach(),
        )

    def _split(self, whole: Tensor | float, common: Tensor) -> Tensor:
        """(B,) the common part, and alpha times the rest."""
        return common + self.excess_weight * (whole - common)


def _share(common: Tensor, whole: Tensor) -> Tensor:
    """(B,) of a response's log-prob under the policy, the part of its common tokens, detached.

    It is 1 for a response that the policy is certain of, which has nothing to divide.
    """
    certain = whole == 0
    return (common / whole.masked_fill(certain, 1.0)).masked_fill(certain, 1.0).detach()
