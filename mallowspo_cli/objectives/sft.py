"""Supervised fine-tuning on the chosen responses: the stage before preference training."""

from dataclasses import dataclass

from mallowspo_cli.objectives.base import (
    Objective,
    ObjectiveOutput,
    PairScores,
    ReferenceScores,
    register,
    response_logps,
)


@register("sft")
@dataclass(kw_only=True)
class SFT(Objective):
    """-l_w: the mean token negative log-likelihood of each chosen response, in nats per token.

    Each response counts alike, whatever its length (a trainer that averages over the tokens of a
    batch weighs long responses more). Rewards are the mean token log-probs, so the accuracy says
    how often the chosen response is the likelier one. It has no knobs and reads no reference.
    """

    @property
    def needs_reference(self) -> bool:
        return False

    @property
    def needs_dispersion(self) -> bool:
        return False

    def __call__(self, policy: PairScores, reference: ReferenceScores | None) -> ObjectiveOutput:
        chosen, rejected = response_logps(policy, length_normalised=True)
        return ObjectiveOutput(
            losses=-chosen,
            chosen_rewards=chosen.detach(),
            rejected_rewards=rejected.detach(),
            metrics={},
        )
