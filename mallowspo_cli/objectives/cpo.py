"""CPO: DPO with a flat reference, and supervised fine-tuning beside it."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from mallowspo_cli.objectives.base import (
    Objective,
    ObjectiveOutput,
    PairScores,
    ReferenceScores,
    register,
    response_logps,
    smoothed_loss,
)
from mallowspo_cli.objectives.baseline import prompt_weight, weight_metrics


@register("cpo")
@dataclass(kw_only=True)
class CPO(Objective):
    """-log sigma(beta (log pi(y_w) - log pi(y_l))) - sft_coefficient l_w, l_w per token.

    DPO with a reference that finds all responses alike; the second term, which keeps the chosen
    response's likelihood up, stands in for it. At `sft_coefficient: 0` and `length_normalised` it
    is SimPO without a home advantage. Label smoothing as in `dpo`. w(x) multiplies the margin
    inside the sigmoid: then the dispersion of the prompts is read, their reference log-probs not.

    Source: Xu et al. 2024 (arXiv 2401.08417), whose formula has the sum over the tokens in the
    second term. TRL has the mean over all tokens of a batch; ours is the mean of each response, so
    that a pair's loss does not depend on the others.
    """

    beta: float = 0.1
    """Scale of the margin, per nat of log-prob; raise it to stop at a smaller margin."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong, in [0, 0.5); raise it for noisy labels."""
    length_normalised: bool = False
    """Mean instead of summed log-probs in the margin; then beta is about 10, not 0.1."""
    sft_coefficient: float = 1.0
    """Weight of -l_w, the chosen response's NLL per token; raise it if chosen log-probs fall."""
    dispersion: bool = False
    """Multiply the margin by w(x) inside the loss, as MallowsPO does; w = 1 changes nothing."""

    def __post_init__(self) -> None:
        self.check_positive("beta")
        self.check_label_smoothing()
        self.check_knob(
            "sft_coefficient", lambda value: 0 <= value < math.inf, "a finite number, at least 0"
        )

    @property
    def needs_reference(self) -> bool:
        return False

    @property
    def needs_dispersion(self) -> bool:
        return self.dispersion

    def __call__(self, policy: PairScores, reference: ReferenceScores | None) -> ObjectiveOutput:
        chosen, rejected = response_logps(policy, self.length_normalised)
        likelihood, _ = response_logps(policy, length_normalised=True)
        margin = self.beta * (chosen - rejected)
        metrics: dict[str, Tensor] = {}
        if self.dispersion:
            weight = prompt_weight(self, policy, reference)
            margin = weight * margin
            metrics = weight_metrics(weight, margin)
        preference = smoothed_loss(
            functional.logsigmoid(margin), functional.logsigmoid(-margin), self.label_smoothing
        )
        return ObjectiveOutput(
            losses=preference - self.sft_coefficient * likelihood,
            chosen_rewards=self.beta * chosen.detach(),
            rejected_rewards=self.beta * rejected.detach(),
            metrics=metrics,
        )
