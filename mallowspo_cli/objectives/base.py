"""What every objective takes, gives back and is: scores in, per-pair losses out."""

import copy
import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from types import MappingProxyType
from typing import Self, TypeVar, cast

from torch import Tensor

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.objectives.links import refuse_half_precision
from mallowspo_cli.objectives.third_parties import import_third_parties


# Without slots: DeepSpeed looks for tensors in what a forward pass returns by its __dict__.
@dataclass(frozen=True)
class PairScores:
    """Scores of B pairs under one model. Raises ValueError unless every field is (B,)."""

    chosen_logps: Tensor
    """(B,) log-prob of the chosen response, summed over its tokens, in nats."""
    rejected_logps: Tensor
    """(B,) log-prob of the rejected response, summed over its tokens, in nats."""
    chosen_tokens: Tensor
    """(B,) number of tokens in the chosen response."""
    rejected_tokens: Tensor
    """(B,) number of tokens in the rejected response."""

    def __post_init__(self) -> None:
        # A (B, 1) field would broadcast against (B,) into B x B losses without a word.
        shapes = {field.name: tuple(getattr(self, field.name).shape) for field in fields(self)}
        if len(set(shapes.values())) > 1 or self.chosen_logps.ndim != 1:
            raise ValueError(f"expected every field to be of one shape (B,), found {shapes}")


@dataclass(frozen=True, slots=True)
class ReferenceScores(PairScores):
    """Scores of B pairs under the frozen reference model, with the dispersion of their prompts."""

    neg_log_phi: Tensor
    """(B,) theta = -log phi(x) = w / 2, at least 0; 1/2 gives the weight of DPO."""


@dataclass(frozen=True, slots=True)
class PairEntropies:
    """Next-token entropies of B pairs, in nats; the raw material of the dispersion."""

    chosen_entropy: Tensor
    """(B,) summed over the chosen response's tokens."""
    rejected_entropy: Tensor
    """(B,) summed over the rejected response's tokens."""
    chosen_first_entropy: Tensor
    """(B,) of the chosen response's first token alone."""
    rejected_first_entropy: Tensor
    """(B,) of the rejected response's first token alone."""


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """What an objective says about B pairs. Only `losses` carries a gradient."""

    losses: Tensor
    """(B,) one loss a pair; the caller averages."""
    chosen_rewards: Tensor
    """(B,) beta times the chosen response's log-ratio, without the dispersion weight."""
    rejected_rewards: Tensor
    """(B,) the same for the rejected response."""
    metrics: dict[str, Tensor]
    """Detached (B,) tensors, by name."""


@dataclass(kw_only=True)
class Objective(ABC):
    """A loss on preference pairs. The fields are its knobs, and its node in the recipe."""

    # No field, so no knob: what `at_step` was given. `dataclasses.replace` starts anew without it.
    running = cast(Mapping[str, float], MappingProxyType({}))

    @property
    @abstractmethod
    def needs_reference(self) -> bool:
        """Whether the reference model's log-probs enter the loss."""

    @property
    @abstractmethod
    def needs_dispersion(self) -> bool:
        """Whether the dispersion of the prompts (`neg_log_phi`) enters the loss."""

    @property
    def needs_details(self) -> bool:
        """Whether `policy` has to be `objectives.details.DetailedScores`."""
        return False

    @property
    def follows_steps(self) -> bool:
        """Whether the loss has running statistics: it is another function at every step."""
        return type(self).updated is not Objective.updated

    def at_step(self, running: Mapping[str, float]) -> Self:
        """This loss as one step uses it, for every pair alike.

        `running` is what `updated` returned after the steps before; empty before the first.
        """
        found = copy.copy(self)
        found.running = dict(running)
        return found

    def updated(self, values: Mapping[str, float]) -> dict[str, float]:
        """The running statistics after a step of this loss; empty for a loss that has none.

        `values` are the means over the step's pairs, named as in metrics.jsonl.
        """
        return {}

    @abstractmethod
    def __call__(self, policy: PairScores, reference: ReferenceScores | None) -> ObjectiveOutput:
        """Losses and rewards of B pairs.

        `reference` may be None only where neither `needs_reference` nor `needs_dispersion` holds
        (ValueError otherwise).
        """

    def check_knob(self, knob: str, holds: Callable[[float], bool], expected: str) -> None:
        """Raise RecipeError naming the knob, its value and what was expected, unless it `holds`."""
        value = getattr(self, knob)
        if not holds(value):
            raise RecipeError(
                f"objective.{knob}={value} does not suit {type(self).__name__}: "
                f"expected {expected}."
            )

    def check_positive(self, knob: str) -> None:
        """`check_knob` for a number that has to be above 0 and finite."""
        self.check_knob(knob, lambda value: 0 < value < math.inf, "a finite number above 0")

    def check_label_smoothing(self) -> None:
        """`check_knob` for `label_smoothing`: at 1/2 the labels would say nothing."""
        self.check_knob("label_smoothing", lambda value: 0 <= value < 0.5, "a number in [0, 0.5)")


ObjectiveClass = TypeVar("ObjectiveClass", bound=type[Objective])

# Filled by `register` while the modules of this package are imported; read through `registered`.
_objectives: dict[str, type[Objective]] = {}


def register(name: str) -> Callable[[ObjectiveClass], ObjectiveClass]:
    """Class decorator: the class becomes `objective=NAME`. Stands above `@dataclass(kw_only=True)`.

    Raises RecipeError if the name is taken, TypeError if the class is not itself a dataclass (its
    knobs would be dropped without a word).
    """

    def add(objective: ObjectiveClass) -> ObjectiveClass:
        if "__dataclass_fields__" not in vars(objective):
            raise TypeError(f"{objective.__name__}: put @dataclass(kw_only=True) below @register")
        if name in _objectives:
            taken = _objectives[name]
            raise RecipeError(
                f"the objective name {name!r} is taken by {taken.__module__}.{taken.__name__}: "
                f"register {objective.__name__} under another."
            )
        _objectives[name] = objective
        return objective

    return add


def registered() -> dict[str, type[Objective]]:
    """Every registered objective by name, sorted, of this package and of installed ones.

    Imports their modules first. Raises RecipeError if one of an installed package's fails.
    """
    package = importlib.import_module("mallowspo_cli.objectives")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    import_third_parties()
    return dict(sorted(_objectives.items()))


def objective_name(objective: Objective) -> str:
    """The name under which an objective's class is registered."""
    return next(name for name, cls in registered().items() if type(objective) is cls)


Choice = TypeVar("Choice", bound=Enum)


def choice(kind: type[Choice], value: Choice | str, knob: str) -> Choice:
    """`value` as a member of `kind`, so that Python callers may write the name as a string.

    Raises RecipeError listing the members. (OmegaConf has made the member already.)
    """
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(str(member.value) for member in kind)
        raise RecipeError(f"objective.{knob}={value}: expected one of {names}.") from None


def require_reference(
    objective: Objective, policy: PairScores, reference: ReferenceScores | None
) -> ReferenceScores:
    """`reference`; ValueError if it is None or of another number of pairs (1 would broadcast)."""
    if reference is None:
        raise ValueError(f"{type(objective).__name__} needs ReferenceScores, found None")
    found, expected = len(reference.chosen_logps), len(policy.chosen_logps)
    if found != expected:
        raise ValueError(f"expected reference scores of {expected} pairs, found {found}")
    return reference


def response_logps(scores: PairScores, length_normalised: bool) -> tuple[Tensor, Tensor]:
    """(chosen, rejected) log-probs, each (B,), in nats: summed, or mean per token.

    An empty response has a sum and a mean of 0. Raises TypeError for 16-bit log-probs.
    """
    refuse_half_precision(scores.chosen_logps)
    refuse_half_precision(scores.rejected_logps)
    if not length_normalised:
        return scores.chosen_logps, scores.rejected_logps
    return (
        scores.chosen_logps / scores.chosen_tokens.clamp(min=1),
        scores.rejected_logps / scores.rejected_tokens.clamp(min=1),
    )


def log_ratios(
    policy: PairScores, reference: PairScores, length_normalised: bool
) -> tuple[Tensor, Tensor]:
    """(chosen, rejected) log pi - log pi_ref, each (B,), in nats: summed, or mean per token."""
    chosen, rejected = response_logps(policy, length_normalised)
    reference_chosen, reference_rejected = response_logps(reference, length_normalised)
    return chosen - reference_chosen, rejected - reference_rejected


def smoothed_loss(log_kept: Tensor, log_flipped: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log_kept - e log_flipped: the label is taken to be wrong with probability e."""
    return -(1 - label_smoothing) * log_kept - label_smoothing * log_flipped
