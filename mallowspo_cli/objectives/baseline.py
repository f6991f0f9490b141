"""What the baselines share: the rewards of a pair, and the dispersion weight as a plug-in.

Notation of their docstrings: u = pi(y) / pi_ref(y) of a whole response, r = beta log u its reward,
_w and _l the chosen and the rejected response, m = r_w - r_l, w(x) = -2 log phi(x), all per pair.
"""

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from mallowspo_cli.objectives.base import (
    Objective,
    ObjectiveOutput,
    PairScores,
    ReferenceScores,
    log_ratios,
    require_reference,
)

_TANGENT_FROM = 20.0


@dataclass(kw_only=True)
class RewardLoss(Objective):
    """A loss on the two rewards of a pair, each with a reference.

    With `dispersion` both rewards are multiplied by w(x) inside the loss, so that beta is w(x) beta
    for the prompt: MallowsPO's reading of its weight as one on the KL penalty (arXiv 2405.14953),
    which any loss of rewards takes. The loss itself is not multiplied.
    """

    beta: float = 0.1
    """Strength of the pull towards the reference, per nat of log-ratio; raise it to stay closer."""
    length_normalised: bool = False
    """Mean instead of summed log-probs; then beta is about 10, not 0.1."""
    dispersion: bool = False
    """Multiply the rewards by w(x) inside the loss, as MallowsPO does; w = 1 changes nothing."""

    def __post_init__(self) -> None:
        self.check_positive("beta")

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_dispersion(self) -> bool:
        return self.dispersion

    @abstractmethod
    def losses(self, chosen: Tensor, rejected: Tensor, policy: PairScores) -> Tensor:
        """(B,) losses of the rewards, (B,) each; `policy` for what else enters, such as lengths."""

    def slope(self, log_ratio: Tensor) -> Tensor:
        """f'(u) of the divergence that holds the policy to the reference, less f'(1); (B,).

        log u, that of the reverse KL, unless a loss has another divergence.
        """
        return log_ratio

    def __call__(self, policy: PairScores, reference: ReferenceScores | None) -> ObjectiveOutput:
        reference = require_reference(self, policy, reference)
        chosen, rejected = log_ratios(policy, reference, self.length_normalised)
        chosen_score = self.beta * self.slope(chosen)
        rejected_score = self.beta * self.slope(rejected)
        metrics: dict[str, Tensor] = {}
        if self.dispersion:
            weight = prompt_weight(self, policy, reference)
            chosen_score, rejected_score = weight * chosen_score, weight * rejected_score
            metrics = weight_metrics(weight, chosen_score - rejected_score)
        return ObjectiveOutput(
            losses=self.losses(chosen_score, rejected_score, policy),
            chosen_rewards=self.beta * chosen.detach(),
            rejected_rewards=self.beta * rejected.detach(),
            metrics=metrics,
        )


def prompt_weight(
    objective: Objective, policy: PairScores, reference: ReferenceScores | None
) -> Tensor:
    """(B,) w(x) in the policy's dtype; ValueError as `require_reference`."""
    reference = require_reference(objective, policy, reference)
    return 2 * reference.neg_log_phi.to(policy.chosen_logps.dtype)


def weight_metrics(weight: Tensor, margin: Tensor) -> dict[str, Tensor]:
    """What an objective with w(x) logs beside its rewards: w and the margin that it multiplies."""
    return {"weight": weight, "weighted_margin": margin.detach()}


def tangent_exp(x: Tensor) -> Tensor:
    """e^x up to x = 20 and its tangent beyond (derived): finite in float32 for any log-ratio.

    A clamp would do that, too, and leave the pairs beyond it without a gradient.
    """
    capped = x.clamp(max=_TANGENT_FROM)
    return capped.exp() * (1 + x - capped)
