"""beta-DPO: DPO whose beta follows how far apart pairs are."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from mallowspo_cli.objectives.base import (
    ObjectiveOutput,
    PairScores,
    ReferenceScores,
    register,
)
from mallowspo_cli.objectives.baseline import RewardLoss


@register("beta_dpo")
@dataclass(kw_only=True)
class BetaDPO(RewardLoss):
    """-log sigma(beta_t / beta (r_w - r_l)), beta_t = beta (1 + a (M - M_0)), at least 0.001.

    M is the mean over a step's pairs of the log-ratio gap (r_w - r_l) / beta, in nats, and M_0 its
    moving average. Where gaps are wider than usual beta is larger. w(x) multiplies the rewards, in
    M as well; rewards are logged with beta.

    Source: Wu et al. 2024 (arXiv 2407.08639); the authors' code has M in nats, the average (decay
    0.9, from 0) and the bound. Two differences. M is the mean of the step before, since no pack
    knows the step's own while it is computed: beta follows the course of training, and not, as in
    the paper, the pairs at hand. And all pairs count; the paper leaves out a share of them, drawn
    among those whose gap is unusual.
    """

    sensitivity: float = 0.6
    """a, per nat, at least 0; 0 is DPO. The authors' 0.6; raise it so that beta moves more."""
    decay: float = 0.9
    """Share in [0, 1) of M_0 that a step leaves; raise it for a slower average."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_knob(
            "sensitivity", lambda value: 0 <= value < float("inf"), "a finite number, at least 0"
        )
        self.check_knob("decay", lambda value: 0 <= value < 1, "a number in [0, 1)")

    @property
    def step_beta(self) -> float:
        """beta_t."""
        unusual = self.running.get("gap", 0.0) - self.running.get("usual_gap", 0.0)
        return max(self.beta * (1 + self.sensitivity * unusual), 0.001)

    def losses(self, chosen: Tensor, rejected: Tensor, policy: PairScores) -> Tensor:
        return -functional.logsigmoid(self.step_beta / self.beta * (chosen - rejected))

    def __call__(self, policy: PairScores, reference: ReferenceScores | None) -> ObjectiveOutput:
        output = super().__call__(policy, reference)
        beta = torch.full_like(output.chosen_rewards, self.step_beta)
        return replace(output, metrics={**output.metrics, "beta": beta})

    def updated(self, values: Mapping[str, float]) -> dict[str, float]:
        margins = "objective/weighted_margin" if self.dispersion else "rewards/margins"
        gap = values[margins] / self.beta
        usual = self.decay * self.running.get("usual_gap", 0.0) + (1 - self.decay) * gap
        return {"gap": gap, "usual_gap": usual}
