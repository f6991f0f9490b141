"""Direct preference optimisation: the Bradley-Terry link without a dispersion."""

from dataclasses import dataclass

from torch.nn import functional

from mallowspo_cli.objectives.base import (
    Objective,
    ObjectiveOutput,
    PairScores,
    ReferenceScores,
    log_ratios,
    register,
    require_reference,
    smoothed_loss,
)


@register("dpo")
@dataclass(kw_only=True)
class DPO(Objective):
    """-(1 - e) log sigma(beta Delta) - e log sigma(-beta Delta).

    Delta is the policy's log-ratio of chosen to rejected less the reference's. Source: Rafailov et
    al. 2023 (arXiv 2305.18290), eq. 7; label smoothing e as in the authors' code ("cDPO").
    """

    beta: float = 0.1
    """Strength of the pull towards the reference, per nat of log-ratio; raise it to stay closer."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong, in [0, 0.5); raise it for noisy labels."""
    length_normalised: bool = False
    """Mean instead of summed log-probs (DPO+LN); then beta is about 10, not 0.1."""

    def __post_init__(self) -> None:
        self.check_positive("beta")
        self.check_label_smoothing()

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_dispersion(self) -> bool:
        return False

    def __call__(self, policy: PairScores, reference: ReferenceScores | None) -> ObjectiveOutput:
        reference = require_reference(self, policy, reference)
        chosen, rejected = log_ratios(policy, reference, self.length_normalised)
        margin = self.beta * (chosen - rejected)
        return ObjectiveOutput(
            losses=smoothed_loss(
                functional.logsigmoid(margin), functional.logsigmoid(-margin), self.label_smoothing
            ),
            chosen_rewards=self.beta * chosen.detach(),
            rejected_rewards=self.beta * rejected.detach(),
            metrics={},
        )
