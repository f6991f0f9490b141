"""The MallowsPO family: a dispersion of the prompt, phi(x), inside the link.

All read theta = -log phi(x) from `ReferenceScores.neg_log_phi`; the weight is w(x) = 2 theta, and
w = 1 is the strength of DPO. w stays inside the link: the loss is not multiplied by it.
"""

from dataclasses import dataclass
from enum import Enum

from mallowspo_cli.objectives.base import (
    Objective,
    ObjectiveOutput,
    PairScores,
    ReferenceScores,
    choice,
    log_ratios,
    register,
    require_reference,
    smoothed_loss,
)
from mallowspo_cli.objectives.ipo import Scaling, squared_loss
from mallowspo_cli.objectives.links import kendall_log_links, logistic_log_link


class Link(Enum):
    """Form of the Kendall link: the paper's, with its jump at 0, or the smooth one through 1/2."""

    exact = "exact"
    smooth = "smooth"


@register("mallows_theta")
@dataclass(kw_only=True)
class MallowsTheta(Objective):
    """-(1 - e) log sigma(w(x) beta Delta) - e log sigma(-w(x) beta Delta), w(x) = -2 log phi(x).

    Source: MallowsPO (arXiv 2405.14953), the Spearman (theta) variant; label smoothing e as in the
    authors' code. With w = 1 it is DPO. The authors' default configuration is a reference-free,
    length-normalised form of it with beta = 10; this is the method as written.
    """

    beta: float = 0.1
    """Strength of the pull towards the reference, per nat, at w = 1; raise it to stay closer."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong, in [0, 0.5); raise it for noisy labels."""
    length_normalised: bool = False
    """Mean instead of summed log-probs; then beta is about 10, not 0.1."""

    def __post_init__(self) -> None:
        self.check_positive("beta")
        self.check_label_smoothing()

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_dispersion(self) -> bool:
        return True

    def __call__(self, policy: PairScores, reference: ReferenceScores | None) -> ObjectiveOutput:
        reference = require_reference(self, policy, reference)
        chosen, rejected = log_ratios(policy, reference, self.length_normalised)
        margin = self.beta * (chosen - rejected)
        theta = reference.neg_log_phi.to(margin.dtype)
        return ObjectiveOutput(
            losses=smoothed_loss(
                logistic_log_link(margin, theta),
                logistic_log_link(-margin, theta),
                self.label_smoothing,
            ),
            chosen_rewards=self.beta * chosen.detach(),
            rejected_rewards=self.beta * rejected.detach(),
            metrics={"weight": 2 * theta, "weighted_margin": (2 * theta * margin).detach()},
        )


@register("mallows_phi")
@dataclass(kw_only=True)
class MallowsPhi(Objective):
    """-(1 - e) log g(beta Delta) - e log g(-beta Delta), g the Kendall link at phi(x).

    Source: MallowsPO (arXiv 2405.14953), the Kendall (phi) variant; the stable form and the smooth
    link are derived (`objectives.links`). The authors' release has no code for it. With w = 1 it is
    not DPO. At Delta = 0 under the exact link, the kept label takes the limit g(0+) and the flipped
    label g(0-) = 1 - g(0+).
    """

    beta: float = 0.1
    """As DPO's, but tune it apart: about 3x larger starts as fast (slope theta/6, not theta/2)."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong, in [0, 0.5); raise it for noisy labels."""
    length_normalised: bool = False
    """Mean instead of summed log-probs; then beta is about 10, not 0.1."""
    link: Link = Link.exact
    """exact (the paper's, which jumps at 0) or smooth (no jump, convex loss)."""

    def __post_init__(self) -> None:
        self.check_positive("beta")
        self.check_label_smoothing()
        self.link = choice(Link, self.link, "link")

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_dispersion(self) -> bool:
        return True

    def __call__(self, policy: PairScores, reference: ReferenceScores | None) -> ObjectiveOutput:
        reference = require_reference(self, policy, reference)
        chosen, rejected = log_ratios(policy, reference, self.length_normalised)
        margin = self.beta * (chosen - rejected)
        theta = reference.neg_log_phi.to(margin.dtype)
        kept, flipped = kendall_log_links(margin, theta, self.link.value)
        return ObjectiveOutput(
            losses=smoothed_loss(kept, flipped, self.label_smoothing),
            chosen_rewards=self.beta * chosen.detach(),
            rejected_rewards=self.beta * rejected.detach(),
            metrics={"weight": 2 * theta, "weighted_margin": (2 * theta * margin).detach()},
        )


@register("mallows_ipo")
@dataclass(kw_only=True)
class MallowsIPO(Objective):
    """(beta w(x) h - 1/2)^2, or (w(x) h - 1/(2 beta))^2 with `scaling: target`.

    h is the policy's log-ratio of chosen to rejected less the reference's. At a preference rate p
    both are least at h = (p - 1/2) / (beta w) (derived). Source: the authors' two releases,
    RainbowPO (margin) and MallowsPO (target), which differ by beta^2 in gradient. With w = 1 it is
    IPO.
    """

    beta: float = 0.1
    """Inverse target: the loss is 0 at a gap of 1/(2 beta w) nats; raise it to stay close."""
    length_normalised: bool = False
    """Mean instead of summed log-probs; the target gap is then per token."""
    scaling: Scaling = Scaling.margin
    """margin or target; target is 1/beta^2 larger, so its learning rate has to be smaller."""

    def __post_init__(self) -> None:
        self.check_positive("beta")
        self.scaling = choice(Scaling, self.scaling, "scaling")

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_dispersion(self) -> bool:
        return True

    def __call__(self, policy: PairScores, reference: ReferenceScores | None) -> ObjectiveOutput:
        reference = require_reference(self, policy, reference)
        chosen, rejected = log_ratios(policy, reference, self.length_normalised)
        weight = 2 * reference.neg_log_phi.to(chosen.dtype)
        gap = weight * (chosen - rejected)
        return ObjectiveOutput(
            losses=squared_loss(gap, self.beta, self.scaling),
            chosen_rewards=self.beta * chosen.detach(),
            rejected_rewards=self.beta * rejected.detach(),
            metrics={"weight": weight, "weighted_margin": self.beta * gap.detach()},
        )
