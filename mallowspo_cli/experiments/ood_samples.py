"""Runs' values on shared pairs as resampled statistics: means, paired differences, intervals.

Seeds and prompts are both sources of error; `comparing.paired` says how they enter. Everything is
the difference to a side of zeros there: of a mean, or of the gap between two runs of one seed.

Seeds are paired because runs of one seed see the same pairs in the same order. Measured coverage of
the 95 % interval (benchmarks/interval_coverage.py): 94 to 99 % with three seeds, 95 to 98 % with
five, on one data set and in the mean over two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mallowspo_cli.evaluation.comparing.metrics import NO_TERCILE, terciles
from mallowspo_cli.evaluation.comparing.paired import (
    Array,
    Difference,
    Replicates,
    contrast,
    difference,
    resampled_means,
)
from mallowspo_cli.evaluation.statistics import TERCILES

ACCURACY: Final = "accuracy"
MARGIN: Final = "margin"
MEASURES: Final = (ACCURACY, MARGIN)


@dataclass(frozen=True)
class Table:
    """What a run got on N pairs of a data set."""

    pair_ids: list[str]
    units: list[str]
    """What is resampled together: the pair's prompt or document, or the pair itself where all share
    a prompt."""
    wins: Array
    """(N,) 1 where the chosen reward is above, 0 below, 1/2 where both are equal."""
    margins: Array
    """(N,) chosen minus rejected reward over beta, in nats: does not grow with beta. The reward as
    it is where the objective has no beta."""
    weights: Array
    """(N,) w of the reference's entropies; NaN where unknown."""


@dataclass(frozen=True)
class Scored:
    """A finished run: tables by data set."""

    entry: str
    seed: int
    tables: Mapping[str, Table]
    reward: str
    """What margins are differences of: those of one kind alone are compared."""


@dataclass(frozen=True)
class Sample:
    """One entry's statistic on one data set, over the entry's seeds."""

    kinds: list[Replicates]
    """Of all pairs, then of each tercile by w, if there are any."""
    units: list[int]
    """What was resampled, of each kind."""
    pairs: list[int]
    seeds: list[int]


def read_table(file: Path, beta: float | None) -> Table:
    """The table that `ScoredPairs.write` wrote."""
    columns = pq.read_table(file).to_pydict()
    wins, margins, weights = (
        np.asarray([np.nan if value is None else value for value in columns[name]], np.float64)
        for name in ("win", "margin", "weight")
    )
    scale = 1 if beta is None else beta
    return Table(columns["pair_id"], columns["prompt"], wins, margins / scale, weights)


def samples_of(
    runs: Sequence[Scored], place: str, resamples: int, seed: int
) -> dict[tuple[str, str], Sample]:
    """The sample of each (entry, measure) on a data set, all on the same resamples."""
    tables = [run.tables[place] for run in runs]
    # Strata by one table, so that all entries have the same.
    strata, ids, units = terciles(tables[0].weights), tables[0].pair_ids, tables[0].units
    assert all(table.pair_ids == ids for table in tables), f"{place}: not the same pairs"
    found = {}
    for entry in dict.fromkeys(run.entry for run in runs):
        own = sorted((run for run in runs if run.entry == entry), key=lambda run: run.seed)
        for measure in MEASURES:
            values = np.stack([_values(run.tables[place], measure) for run in own])
            kinds, counts, pairs = _replicates(values, units, strata, resamples, seed)
            found[entry, measure] = Sample(kinds, counts, pairs, [run.seed for run in own])
    return found


def mean_of(parts: Sequence[Sample]) -> Sample:
    """The mean of a statistic over data sets that were drawn apart; the fewest units count."""
    wholes = [part.kinds[0] for part in parts]
    values = np.mean([whole.values for whole in wholes], axis=0)
    resampled = np.mean([whole.resampled for whole in wholes], axis=0)
    units, pairs = min(part.units[0] for part in parts), sum(part.pairs[0] for part in parts)
    return Sample([Replicates(values, resampled)], [units], [pairs], parts[0].seeds)


def lost(within: Sample, without: Sample) -> Sample:
    """The first statistic minus the second, of the same runs on other data."""
    kinds = [contrast(within.kinds[0], without.kinds[0])]
    return Sample(kinds, [min(within.units[0], without.units[0])], within.pairs[:1], within.seeds)


def outcome(sample: Sample) -> dict[str, Any]:
    """The mean with its interval, by seed, and in each tercile."""
    seeds = zip(map(str, sample.seeds), sample.kinds[0].values.tolist(), strict=True)
    thirds = zip(TERCILES, sample.kinds[1:], sample.units[1:], sample.pairs[1:], strict=False)
    return {
        **_of_one(sample.kinds[0], sample.units[0]),
        "pairs": sample.pairs[0],
        "units": sample.units[0],
        "seeds": dict(seeds),
        "by_dispersion": {
            name: {**_of_one(kind, units), "pairs": pairs} for name, kind, units, pairs in thirds
        },
    }


def paired(base: Sample, other: Sample) -> dict[str, Any]:
    """`other` minus `base` over the seeds that both have, in each tercile too; NaN without any."""
    shared = sorted(set(base.seeds) & set(other.seeds))
    counts = {"seeds": len(shared), "units": base.units[0], "pairs": base.pairs[0]}
    if not shared:
        unknown = _plain(Difference(np.nan, np.nan, np.nan))
        return {**unknown, **counts, "by_dispersion": {}, "interaction": None}
    gaps = [
        contrast(_at(second, other.seeds, shared), _at(first, base.seeds, shared))
        for first, second in zip(base.kinds, other.kinds, strict=True)
    ]
    thirds = zip(TERCILES, gaps[1:], base.units[1:], strict=False)
    interaction = None
    if len(gaps) > 1:
        between = contrast(gaps[-1], gaps[1])
        interaction = _of_one(between, min(base.units[-1], base.units[1]))
    return {
        **_of_one(gaps[0], base.units[0]),
        **counts,
        "by_dispersion": {name: _of_one(gap, units) for name, gap, units in thirds},
        "interaction": interaction,
    }


def _values(table: Table, measure: str) -> Array:
    return table.wins if measure == ACCURACY else table.margins


def _replicates(
    values: Array, units: Sequence[str], strata: NDArray[np.int64], resamples: int, seed: int
) -> tuple[list[Replicates], list[int], list[int]]:
    """Replicates of (S, N) values of each kind, the number of units behind each, and of pairs."""
    _, unit = np.unique(np.asarray(units), return_inverse=True)
    count = int(unit.max()) + 1
    masks = [np.ones(len(unit), dtype=bool)]
    if (strata != NO_TERCILE).any():
        masks += [strata == index for index in range(len(TERCILES))]
    counts = np.stack([np.bincount(unit[mask], minlength=count) for mask in masks])
    sums = np.asarray(
        [
            [np.bincount(unit[mask], weights=row[mask], minlength=count) for row in values]
            for mask in masks
        ],
        dtype=np.float64,
    )
    kinds = resampled_means(sums, counts.astype(np.float64), resamples, seed)
    return kinds, (counts > 0).sum(axis=1).tolist(), counts.sum(axis=1).tolist()


def _of_one(sample: Replicates, units: int) -> dict[str, Any]:
    """The mean over seeds and units with its interval."""
    zeros = Replicates(np.zeros_like(sample.values), np.zeros_like(sample.resampled))
    return _plain(difference(zeros, sample, units))


def _at(sample: Replicates, seeds: Sequence[int], wanted: Sequence[int]) -> Replicates:
    columns = [seeds.index(seed) for seed in wanted]
    return Replicates(sample.values[columns], sample.resampled[:, columns])


def _plain(found: Difference) -> dict[str, Any]:
    if found.standard_error == 0:
        # Where no unit and no seed differs from another, nothing says how far others would lie.
        found = Difference(found.first, found.second, found.value)
    return {key: value for key, value in asdict(found).items() if key not in ("first", "second")}
