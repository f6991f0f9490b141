"""BCO: a classifier of single responses, with a threshold that follows the rewards."""

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


@register("bco")
@dataclass(kw_only=True)
class BCO(RewardLoss):
    """-log sigma(r_w - d) - log sigma(d - r_l), d the mean of (r_w + r_l) / 2 over earlier steps.

    Each response is classified by itself, against what rewards are like at the time. The loss
    bounds DPO's from above, for a pair most tightly where d is its own (r_w + r_l) / 2; it starts
    at 2 log 2. w(x) multiplies the rewards, those that d is a mean of as well.

    Source: Jung et al. 2024 (arXiv 2404.04656), the form for pairs. TRL's BCO trainer has the mean
    over all pairs so far, those at hand included: a loss there depends on what came before it in
    the same step. d here is that mean as the step before left it: it lags by one step, and is 0 in
    the first, where the policy is the reference. TRL's `bco_pair` has no threshold (d = 0).
    """

    def losses(self, chosen: Tensor, rejected: Tensor, policy: PairScores) -> Tensor:
        shift = self.running.get("shift", 0.0)
        return -functional.logsigmoid(chosen - shift) - functional.logsigmoid(shift - rejected)

    def __call__(self, policy: PairScores, reference: ReferenceScores | None) -> ObjectiveOutput:
        output = super().__call__(policy, reference)
        centre = (output.chosen_rewards + output.rejected_rewards) / 2
        if self.dispersion:
            centre = output.metrics["weight"] * centre
        shift = torch.full_like(centre, self.running.get("shift", 0.0))
        return replace(output, metrics={**output.metrics, "centre": centre, "shift": shift})

    def updated(self, values: Mapping[str, float]) -> dict[str, float]:
        steps = self.running.get("steps", 0.0) + 1
        shift = self.running.get("shift", 0.0)
        # Every step has as many pairs, so the mean over steps is that over pairs.
        return {"shift": shift + (values["objective/centre"] - shift) / steps, "steps": steps}
