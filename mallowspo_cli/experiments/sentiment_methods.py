"""The runs of the controlled-sentiment experiment: losses, each with its betas and seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.recipe.nearest import nearest


@dataclass(frozen=True)
class Method:
    """A loss as the experiment runs it."""

    name: str
    words: tuple[str, ...]
    """Recipe words without beta."""
    beta: float
    """At factor 1."""
    what: str
    mode: str = "estimated"
    """The recipe's dispersion.mode."""


METHODS: Final[Mapping[str, Method]] = {
    method.name: method
    for method in (
        Method("dpo", ("objective=dpo",), 0.1, "DPO"),
        Method("ipo", ("objective=ipo",), 0.1, "IPO, (beta h - 1/2)^2 on summed log-probs"),
        # 2 on mean log-probs of 16 tokens starts about as fast as 0.1 on sums.
        Method("simpo", ("objective=simpo",), 2.0, "SimPO, no reference, mean log-probs"),
        Method("mallows_theta", ("objective=mallows_theta",), 0.1, "MallowsPO-theta"),
        # The link's slope at 0 is theta / 6 against theta / 2.
        Method("mallows_phi", ("objective=mallows_phi",), 0.3, "MallowsPO-phi, exact link"),
        Method("mallows_ipo", ("objective=mallows_ipo",), 0.1, "Mallows-IPO"),
        Method(
            "theta_shuffled",
            ("objective=mallows_theta",),
            0.1,
            "control: MallowsPO-theta with the weights of other pairs",
            mode="shuffled",
        ),
        # With a constant weight theta is DPO to the bit, so the control is phi's.
        Method(
            "phi_constant",
            ("objective=mallows_phi",),
            0.3,
            "control: MallowsPO-phi with w = 1 for every pair",
            mode="constant",
        ),
        Method(
            "theta_inverse",
            ("objective=mallows_theta",),
            0.1,
            "control: MallowsPO-theta with weights the wrong way round",
            mode="inverse",
        ),
        Method(
            "phi_smooth",
            ("objective=mallows_phi", "objective.link=smooth"),
            0.3,
            "MallowsPO-phi, smooth link",
        ),
    )
}


MAIN: Final = tuple(METHODS)[:8]
"""What `all` stands for."""


@dataclass(frozen=True)
class Job:
    """One training run."""

    method: Method
    factor: float
    seed: int

    @property
    def beta(self) -> float:
        """The run's objective.beta, of the digits that its words and its name have."""
        return float(f"{self.method.beta * self.factor:g}")

    @property
    def name(self) -> str:
        """Of its row's file."""
        return f"{self.method.name}-beta{self.beta:g}-seed{self.seed}"

    def words(self) -> list[str]:
        """Recipe words; they come after a user's own, and win."""
        own = (f"dispersion.mode={self.method.mode}", f"objective.beta={self.beta:g}")
        return [*self.method.words, *own, f"seed={self.seed}"]


def chosen_methods(text: str) -> list[Method]:
    """The methods of NAME,NAME or `all`.

    Raises:
        RecipeError: an unknown name.
    """
    names = list(MAIN) if text == "all" else list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in METHODS:
            raise RecipeError(
                f"no method named '{name}'.{nearest(name, METHODS)} Choices: all, or some of "
                f"{','.join(METHODS)}."
            )
    return [METHODS[name] for name in names]


def all_jobs(
    methods: Sequence[Method], factors: Sequence[float], seeds: Sequence[int]
) -> list[Job]:
    """Every run, seed by seed, so that an unfinished experiment has whole seeds."""
    return [Job(method, factor, seed) for seed in seeds for factor in factors for method in methods]
