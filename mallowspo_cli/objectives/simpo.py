"""SimPO: length-normalised and without a reference model."""

import math
from dataclasses import dataclass

from torch.nn import functional

from mallowspo_cli.objectives.base import (
    Objective,
    ObjectiveOutput,
    PairScores,
    ReferenceScores,
    register,
    response_logps,
)


@register("simpo")
@dataclass(kw_only=True)
class SimPO(Objective):
    """-log sigma(beta (l_w - l_l - h)), l the mean token log-prob of a response.

    Source: Meng et al. 2024 (arXiv 2405.14734), eq. 6, whose gamma is beta h here (as in
    RainbowPO). Rewards are beta l, without a reference.
    """

    beta: float = 10.0
    """Scale of the margin, per nat of mean token log-prob; 2 to 10 in the paper's runs."""
    home_advantage: float = 0.3
    """Target margin h, nats per token, inside beta (SimPO's gamma / beta); raise to part more."""
    length_normalised: bool = True
    """Mean instead of summed log-probs; with sums, beta and home_advantage need other values."""

    def __post_init__(self) -> None:
        self.check_positive("beta")
        self.check_knob("home_advantage", math.isfinite, "a finite number")

    @property
    def needs_reference(self) -> bool:
        return False

    @property
    def needs_dispersion(self) -> bool:
        return False

    def __call__(self, policy: PairScores, reference: ReferenceScores | None) -> ObjectiveOutput:
        chosen, rejected = response_logps(policy, self.length_normalised)
        return ObjectiveOutput(
            losses=-functional.logsigmoid(self.beta * (chosen - rejected - self.home_advantage)),
            chosen_rewards=self.beta * chosen.detach(),
            rejected_rewards=self.beta * rejected.detach(),
            metrics={},
        )
