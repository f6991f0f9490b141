"""ORPO: supervised fine-tuning with an odds ratio, without a reference model."""

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
)
from mallowspo_cli.objectives.baseline import prompt_weight, weight_metrics

_LARGEST_LOGP = -1e-6


@register("orpo")
@dataclass(kw_only=True)
class ORPO(Objective):
    """-l_w - beta log sigma(log odds(l_w) - log odds(l_l)), odds(l) = e^l / (1 - e^l).

    l is the mean token log-prob of a response, so e^l is the geometric mean of its tokens'
    probabilities. For small probabilities the odds ratio is the ratio, and its term SimPO's at a
    beta of 1 without a home advantage. beta = 0 would be `sft`. w(x) multiplies the log odds ratio
    inside the sigmoid: then the dispersion of the prompts is read, their reference log-probs not.

    Source: Hong et al. 2024 (arXiv 2403.07691), eqs. 6 and 7, whose lambda is beta here, as in TRL.
    The first term is the mean over each response, as `sft` has it; TRL's takes the prompt's tokens
    too, and the mean over all tokens of a batch. A response likelier than e^-1e-6 per token (an
    empty one is) counts as that, without a pull, where its odds would be infinite.
    """

    beta: float = 0.1
    """Weight of the odds ratio beside -l_w (not an inverse temperature); raise it to part more."""
    dispersion: bool = False
    """Multiply the log odds ratio by w(x), as MallowsPO does; w = 1 changes nothing."""

    def __post_init__(self) -> None:
        self.check_positive("beta")

    @property
    def needs_reference(self) -> bool:
        return False

    @property
    def needs_dispersion(self) -> bool:
        return self.dispersion

    def __call__(self, policy: PairScores, reference: ReferenceScores | None) -> ObjectiveOutput:
        chosen, rejected = response_logps(policy, length_normalised=True)
        log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
        metrics: dict[str, Tensor] = {}
        if self.dispersion:
            weight = prompt_weight(self, policy, reference)
            log_odds_ratio = weight * log_odds_ratio
            metrics = weight_metrics(weight, log_odds_ratio)
        return ObjectiveOutput(
            losses=-chosen - self.beta * functional.logsigmoid(log_odds_ratio),
            chosen_rewards=self.beta * chosen.detach(),
            rejected_rewards=self.beta * rejected.detach(),
            metrics=metrics,
        )


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) for log p at most 0."""
    logp = logp.clamp(max=_LARGEST_LOGP)
    return logp - (-logp.expm1()).log()
