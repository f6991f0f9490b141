"""WPO: DPO of pairs that the policy itself might have written."""

from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional

from mallowspo_cli.objectives.base import (
    ObjectiveOutput,
    PairScores,
    ReferenceScores,
    register,
)
from mallowspo_cli.objectives.baseline import RewardLoss
from mallowspo_cli.objectives.details import require_details


@register("wpo")
@dataclass(kw_only=True)
class WPO(RewardLoss):
    """-v_w v_l log sigma(r_w - r_l), v = exp of the mean over y of log p(y_t) - log sum_v p_t(v)^2.

    v is a response's probability per token under the policy, against that of a token drawn from it:
    about 1 for what the policy samples, little for what it would not write. It counts without a
    gradient. v multiplies the loss, so such pairs pull less; w(x) multiplies the rewards inside it.

    Source: Zhou et al. 2024 (arXiv 2406.11827), with the paper's "sampled alignment". As in the
    authors' code the product is at most 1; TRL's `use_weighting` has no bound, which is
    `largest_weight: .inf`.
    """

    largest_weight: float = 1.0
    """Bound of v_w v_l, above 0; raise it so that what the policy is surest of pulls more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_knob("largest_weight", lambda value: value > 0, "a number above 0")

    @property
    def needs_details(self) -> bool:
        return True

    def losses(self, chosen: Tensor, rejected: Tensor, policy: PairScores) -> Tensor:
        return -self._pair_weight(policy) * functional.logsigmoid(chosen - rejected)

    def __call__(self, policy: PairScores, reference: ReferenceScores | None) -> ObjectiveOutput:
        output = super().__call__(policy, reference)
        found = {"pair_weight": self._pair_weight(policy)}
        return replace(output, metrics={**output.metrics, **found})

    def _pair_weight(self, policy: PairScores) -> Tensor:
        """(B,) v_w v_l; an empty response has v = 1."""
        scores = require_details(self, policy)
        chosen = scores.chosen_logps.detach() - scores.chosen_log_collisions
        rejected = scores.rejected_logps.detach() - scores.rejected_log_collisions
        chosen = chosen / scores.chosen_tokens.clamp(min=1)
        rejected = rejected / scores.rejected_tokens.clamp(min=1)
        return (chosen + rejected).exp().clamp(max=self.largest_weight)
