"""Identity preference optimisation: a squared loss with a finite target margin."""

from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from mallowspo_cli.objectives.base import (
    Objective,
    ObjectiveOutput,
    PairScores,
    ReferenceScores,
    choice,
    log_ratios,
    register,
    require_reference,
)


class Scaling(Enum):
    """Where beta stands in the squared loss: the two forms differ by a factor of beta^2."""

    margin = "margin"
    target = "target"


@register("ipo")
@dataclass(kw_only=True)
class IPO(Objective):
    """(beta h - 1/2)^2, or (h - 1/(2 beta))^2 with `scaling: target`.

    h is the policy's log-ratio of chosen to rejected less the reference's. Source: Azar et al. 2023
    (arXiv 2310.12036), eq. 17, which is the target form with tau = beta and summed log-probs.
    """

    beta: float = 0.1
    """Inverse target: the loss is 0 at a log-ratio gap of 1/(2 beta) nats; raise to stay close."""
    length_normalised: bool = False
    """Mean instead of summed log-probs, as TRL does; the target gap is then per token."""
    scaling: Scaling = Scaling.margin
    """margin (RainbowPO's code) or target (the paper, MallowsPO's code), 1/beta^2 times larger."""

    def __post_init__(self) -> None:
        self.check_positive("beta")
        self.scaling = choice(Scaling, self.scaling, "scaling")

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_dispersion(self) -> bool:
        return False

    def __call__(self, policy: PairScores, reference: ReferenceScores | None) -> ObjectiveOutput:
        reference = require_reference(self, policy, reference)
        chosen, rejected = log_ratios(policy, reference, self.length_normalised)
        return ObjectiveOutput(
            losses=squared_loss(chosen - rejected, self.beta, self.scaling),
            chosen_rewards=self.beta * chosen.detach(),
            rejected_rewards=self.beta * rejected.detach(),
            metrics={},
        )


def squared_loss(gap: Tensor, beta: float, scaling: Scaling) -> Tensor:
    """(beta gap - 1/2)^2 (margin) or (gap - 1/(2 beta))^2 (target); gap in nats, any shape."""
    if scaling is Scaling.margin:
        return (beta * gap - 0.5) ** 2
    return (gap - 0.5 / beta) ** 2
