"""What an experiment found of a claim: it held, it was not seen, or the opposite was seen."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from mallowspo_cli.evaluation.strata import Estimate

Verdict = Literal["held", "not seen", "opposite"]


@dataclass(frozen=True)
class Claim:
    """A claim, and the number that decides it: above 0 it speaks for the claim, below against."""

    text: str
    measure: str
    """What the number is, with its unit."""
    estimate: Estimate

    @property
    def verdict(self) -> Verdict:
        """By the 95 % interval alone; without one, nothing was seen."""
        if self.estimate.low > 0:
            return "held"
        return "opposite" if self.estimate.high < 0 else "not seen"

    def row(self) -> dict[str, Any]:
        """Plain values, for JSON: no number where there is none."""
        numbers = asdict(self.estimate)
        known = {
            k: None if isinstance(v, float) and math.isnan(v) else v for k, v in numbers.items()
        }
        return {"claim": self.text, "measure": self.measure, "verdict": self.verdict, **known}


def t_estimate(values: Sequence[float] | NDArray[np.float64]) -> Estimate:
    """Mean of (N,) values of independent units, such as seeds, with a 95 % Student-t interval.

    NaN are left out; with fewer than two values there is no interval (NaN). Equal values give an
    interval of width 0.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    count = len(known)
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(known.mean())
    if count == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = float(student.ppf(0.975, count - 1) * known.std(ddof=1) / math.sqrt(count))
    return Estimate(mean, mean - half, mean + half, count)
