"""RainbowPO: MallowsPO-theta with length normalisation, a home advantage and a mixed reference."""

import math
from dataclasses import dataclass

from torch import Tensor

from mallowspo_cli.objectives.base import (
    Objective,
    ObjectiveOutput,
    PairScores,
    ReferenceScores,
    register,
    require_reference,
    response_logps,
)
from mallowspo_cli.objectives.links import logistic_log_link


@register("rainbowpo")
@dataclass(kw_only=True)
class RainbowPO(Objective):
    """-log sigma(w(x) beta [D - a D_ref - (1 - a) h]) - sft_coefficient l_w, D = l_w - l_l.

    l is the mean token log-prob of a response, w(x) = -2 log phi(x) ("contextual scaling": set
    `dispersion.mode=constant` to leave it out), a the mixing of the reference with a policy that
    prefers every chosen response by h. a = 1 is length-normalised MallowsPO-theta; a = 0 is SimPO
    with contextual scaling, and reads no reference log-probs.

    Source: RainbowPO (arXiv 2410.04203) and its release. As in the release h is inside beta, where
    the paper's written loss has it outside. Rewards are beta (l - a l_ref), so that a = 0 has
    SimPO's; the release logs beta (l - l_ref) always.
    """

    beta: float = 10.0
    """Scale of the margin, per nat of mean token log-prob; raise it to stay near the reference."""
    length_normalised: bool = True
    """Mean instead of summed log-probs; with sums, beta and home_advantage need other values."""
    home_advantage: float = 0.1
    """Target margin h of the mixed-in policy, nats per token, inside beta; tried: -0.1 to 0.5."""
    mixing: float = 0.25
    """Share a of the reference model, in [0, 1]; lower it to lean less on the reference."""
    sft_coefficient: float = 0.0
    """Weight of -l_w, the chosen response's NLL per token; raise it if chosen log-probs fall."""

    def __post_init__(self) -> None:
        self.check_positive("beta")
        self.check_knob("home_advantage", math.isfinite, "a finite number")
        self.check_knob("mixing", lambda value: 0 <= value <= 1, "a number in [0, 1]")
        self.check_knob(
            "sft_coefficient", lambda value: 0 <= value < math.inf, "a finite number, at least 0"
        )

    @property
    def needs_reference(self) -> bool:
        return self.mixing > 0

    @property
    def needs_dispersion(self) -> bool:
        return True

    def __call__(self, policy: PairScores, reference: ReferenceScores | None) -> ObjectiveOutput:
        reference = require_reference(self, policy, reference)
        chosen_logps, rejected_logps = response_logps(policy, self.length_normalised)
        chosen, rejected = self._mixed_log_ratios(chosen_logps, rejected_logps, reference)
        margin = self.beta * (chosen - rejected - (1 - self.mixing) * self.home_advantage)
        theta = reference.neg_log_phi.to(margin.dtype)
        return ObjectiveOutput(
            losses=-logistic_log_link(margin, theta) - self.sft_coefficient * chosen_logps,
            chosen_rewards=self.beta * chosen.detach(),
            rejected_rewards=self.beta * rejected.detach(),
            metrics={"weight": 2 * theta, "weighted_margin": (2 * theta * margin).detach()},
        )

    def _mixed_log_ratios(
        self, chosen: Tensor, rejected: Tensor, reference: ReferenceScores
    ) -> tuple[Tensor, Tensor]:
        if not self.needs_reference:
            # Not 0 * logps: what an unread field holds may be anything, NaN included.
            return chosen, rejected
        reference_chosen, reference_rejected = response_logps(reference, self.length_normalised)
        return chosen - self.mixing * reference_chosen, rejected - self.mixing * reference_rejected
