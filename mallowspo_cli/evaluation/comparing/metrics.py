"""One metric of two sides on what they share: plain values for comparison.json."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mallowspo_cli import dispersion
from mallowspo_cli.evaluation.comparing.paired import (
    Array,
    Difference,
    Replicates,
    contrast,
    difference,
    resampled_means,
    sign_test,
)
from mallowspo_cli.evaluation.statistics import RESAMPLES, TERCILES

RESAMPLES_LC = 300
NO_TERCILE = -1


@dataclass(frozen=True)
class Resampling:
    """How often, and from which seed."""

    means: int = RESAMPLES
    length_controlled: int = RESAMPLES_LC
    """Each fits two regressions or more, so fewer."""
    seed: int = 0


def terciles(weights: Array) -> NDArray[np.int64]:
    """(N,) number of each row's tercile in TERCILES, NO_TERCILE where w (N,) is NaN.

    NO_TERCILE everywhere where fewer than three rows have a weight, or all have the same.
    """
    found = np.full(len(weights), NO_TERCILE)
    known = np.flatnonzero(~np.isnan(weights))
    if len(known) >= len(TERCILES) and np.ptp(weights[known]) > 0:
        # A low weight is a high dispersion.
        found[known] = 2 - dispersion.terciles(torch.from_numpy(weights[known])).numpy()
    return found


def compared_means(
    values: Sequence[Array],
    prompts: Sequence[str],
    strata: NDArray[np.int64] | None,
    resampling: Resampling,
) -> dict[str, Any]:
    """Compare means over rows, in percent.

    Args:
        values: of both sides, (S, N) in [0, 1]: by seed and row.
        prompts: (N,) prompt of each row; rows of one prompt are drawn together.
        strata: (N,) number of each row's tercile; None: none are asked for.
    """
    _, unit = np.unique(np.asarray(prompts), return_inverse=True)
    units = int(unit.max()) + 1
    masks = [np.ones(len(unit), dtype=bool)]
    if strata is not None and (strata != NO_TERCILE).any():
        masks += [strata == index for index in range(len(TERCILES))]
    counts = np.stack([np.bincount(unit[m], minlength=units) for m in masks]).astype(np.float64)
    first, second = (
        resampled_means(
            np.stack([_by_unit(100 * side[:, m], unit[m], units) for m in masks]),
            counts,
            resampling.means,
            resampling.seed,
        )
        for side in values
    )
    by_prompt = [_by_unit(side, unit, units).mean(axis=0) / counts[0] for side in values]
    return {
        "prompts": units,
        **overall(first[0], second[0], units),
        "sign_test": asdict(sign_test(by_prompt[0], by_prompt[1])),
        **_by_tercile(first[1:], second[1:], counts[1:]),
    }


def overall(first: Replicates, second: Replicates, units: int) -> dict[str, Any]:
    """Both sides' values, by seed too, and their difference."""
    sides = [
        {
            "value": float(side.values.mean()),
            "seeds": side.values.tolist(),
            "deviation": float(side.values.std(ddof=1)) if len(side.values) > 1 else None,
        }
        for side in (first, second)
    ]
    return {"sides": sides, "difference": _plain(difference(first, second, units))}


def _by_tercile(
    first: Sequence[Replicates], second: Sequence[Replicates], counts: Array
) -> dict[str, Any]:
    """Differences in each tercile, and how much larger that of high dispersion is."""
    if not first:
        return {"by_dispersion": {}, "interaction": None}
    units = [int((row > 0).sum()) for row in counts]
    found = {
        name: {
            "rows": int(counts[index].sum()),
            "prompts": units[index],
            "first": float(first[index].values.mean()),
            "second": float(second[index].values.mean()),
            **_plain(difference(first[index], second[index], units[index])),
        }
        for index, name in enumerate(TERCILES)
    }
    low, high = 0, len(TERCILES) - 1
    gaps = [contrast(side[high], side[low]) for side in (first, second)]
    between = difference(gaps[0], gaps[1], min(units[low], units[high]))
    return {"by_dispersion": found, "interaction": _plain(between)}


def _plain(found: Difference) -> dict[str, Any]:
    """Without the sides' values, which stand elsewhere."""
    return {key: value for key, value in asdict(found).items() if key not in ("first", "second")}


def _by_unit(values: Array, unit: NDArray[np.int64], units: int) -> Array:
    """(S, units) sums of (S, N) values."""
    sums = [np.bincount(unit, weights=row, minlength=units) for row in values]
    return np.stack(sums).astype(np.float64)
