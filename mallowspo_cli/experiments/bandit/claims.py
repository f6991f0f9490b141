"""What the bandits say of the claims: less collapse, a better trade-off.

The unit is the seed: a number is averaged over all other settings first, and the methods are
compared on the same seeds, that is on the same samples. What is so by definition (with one prompt
and at equal KL, Mallows-theta is DPO and Mallows-IPO is IPO) is no claim.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from mallowspo_cli.evaluation.claims import Claim, t_estimate
from mallowspo_cli.experiments.bandit.methods import TRUE, Variant
from mallowspo_cli.experiments.mallows_model import Floats

AT_KL: Final = "kl=0.5"
"""One of KL_TARGETS and of MEAN_KL_TARGETS, and less than log 2: two arms can have it."""
NOTHING: Final = 1e-6
"""Differences below it are those of the solver: they count as none."""
RESCALED: Final = ("mallows_theta", "mallows_ipo")
"""With one weight for all prompts these are their baseline at another beta."""


def compared(variants: Sequence[Variant]) -> list[tuple[str, str]]:
    """(method, baseline) of the methods that are told phi, where the baseline is there."""
    methods = {variant.method: variant.baseline for variant in variants if variant.told == TRUE}
    there = {variant.method for variant in variants}
    return [(method, base) for method, base in methods.items() if base in there]


def claim(text: str, measure: str, values: Floats) -> Claim:
    """From (seed,) values, each above 0 where it speaks for the claim."""
    return Claim(text, measure, t_estimate(np.where(np.abs(values) < NOTHING, 0.0, values)))
