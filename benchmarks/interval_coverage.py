"""How often the intervals of comparisons hold the truth, in simulations where it is known.

    python benchmarks/interval_coverage.py [--times 1000] [--fits 150] [--json coverage.json]

Preferences in (0, 1), correlated between models by the prompts' hardness; seeds differ by a normal
shift of their quality. Beside the interval in use stands the two-level percentile bootstrap (seeds
and prompts resampled), which it was chosen over. Length control: hard wins and losses, lengths that
have nothing to do with quality, the fit without difficulties, with the published choice of its
penalty and without a penalty. Also the paired seeds of `experiment out-of-distribution`, on one
data set and in the mean over two, where seeds shift both alike, and the time of a fit at
AlpacaEval's size with its gamed rows. Some six minutes on one core.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mallowspo_cli.evaluation.comparing.lengths import compared_length_control
from mallowspo_cli.evaluation.comparing.metrics import Resampling
from mallowspo_cli.evaluation.comparing.paired import Replicates, difference, resampled_means
from mallowspo_cli.evaluation.win_rates.calibration import Gamed
from mallowspo_cli.evaluation.win_rates.length_control import (
    Judged,
    length_controlled,
    refit_of,
)
from mallowspo_cli.experiments.ood_samples import Sample, mean_of, paired
from mallowspo_cli.files import write_json

Floats = NDArray[np.float64]
Interval = tuple[float, float]
QUALITY = 0.3
RESAMPLES = 200
CASES = [
    *((prompts, (1, 1), 0.0) for prompts in (20, 100, 805)),
    *((60, seeds, spread) for seeds in ((3, 3), (2, 2)) for spread in (0.0, 0.5)),
    *((60, seeds, spread) for seeds in ((1, 3), (1, 2)) for spread in (0.1, 0.5)),
]
"""Prompts, seeds of both sides, and how far a side's seeds lie apart."""
PAIRED_CASES = [
    (data_sets, seeds, spread)
    for data_sets in (1, 2)
    for seeds in (3, 5)
    for spread in (0.0, 0.1, 0.5, 2.0)
]
"""Data sets in the mean, seeds that both sides have, and how far a side's seeds lie apart."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--fits", type=int, default=150)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [seeds_row(*case, options.times) for case in CASES]
    print("| seeds | spread | prompts | covered | two-level percentile |")
    for row in rows:
        print("| {seeds} | {spread} | {prompts} | {covered:.1%} | {percentile:.1%} |".format(**row))
    fits = [length_row(300, *rates, options.fits) for rates in ((0.45, 0.55), (0.5, 0.5))]
    print("| true win rates | prompts | covered | mean difference |")
    for row in fits:
        print("| {rates} | {prompts} | {covered:.1%} | {mean:+.1f} |".format(**row))
        print("|   published penalty | | {penalised:.1%} | {penalised_mean:+.1f} |".format(**row))
    shared = [paired_row(*case, options.times) for case in PAIRED_CASES]
    print("| data sets | paired seeds | spread | covered |")
    for row in shared:
        print("| {data_sets} | {seeds} | {spread} | {covered:.1%} |".format(**row))
    times = fit_times()
    print("fit {fit:.2f} s, 300 refits {refits:.2f} s".format(**times))
    if options.json:
        found = {"seeds": rows, "paired": shared, "length_control": fits, "times": times}
        write_json(options.json, found)


def preferences(
    generator: np.random.Generator,
    hardness: Floats,
    seeds: int,
    quality: float | Floats,
    spread: float,
) -> Floats:
    """(S, N) preferences of a configuration's seeds."""
    of_seed = quality + spread * generator.normal(size=(seeds, 1))
    noise = generator.normal(size=(seeds, len(hardness)))
    return 1 / (1 + np.exp(-2 * (of_seed - hardness + noise)))


def true_mean(quality: float, spread: float) -> float:
    """Of `preferences`, over prompts, seeds and noise."""
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    values = 1 / (1 + np.exp(-2 * (quality + math.sqrt(2 + spread**2) * points)))
    return float((values * weights).sum() / weights.sum())


def seeds_row(prompts: int, seeds: tuple[int, int], spread: float, times: int) -> dict:
    """Coverage of both intervals of the difference of two means."""
    truth = true_mean(QUALITY, spread) - true_mean(0, spread)
    generator = np.random.default_rng(7)
    held = {"covered": 0, "percentile": 0}
    for number in range(times):
        hardness = generator.normal(size=prompts)
        first = preferences(generator, hardness, seeds[0], 0, spread)
        second = preferences(generator, hardness, seeds[1], QUALITY, spread)
        for name, method in (("covered", in_use), ("percentile", two_level)):
            low, high = method(first, second, number)
            held[name] += low <= truth <= high
    shares = {name: count / times for name, count in held.items()}
    return {"seeds": "{} to {}".format(*seeds), "spread": spread, "prompts": prompts, **shares}


def in_use(first: Floats, second: Floats, seed: int) -> Interval:
    """The interval of `eval compare`."""
    both, cut = np.concatenate([first, second]), len(first)
    units = both.shape[1]
    (found,) = resampled_means(both[None], np.ones((1, units)), RESAMPLES, seed)
    sides = (
        Replicates(found.values[part], found.resampled[:, part])
        for part in (slice(None, cut), slice(cut, None))
    )
    result = difference(*sides, units)
    assert result.low is not None
    assert result.high is not None
    return result.low, result.high


def two_level(first: Floats, second: Floats, seed: int) -> Interval:
    """Percentiles over resampled seeds and prompts."""
    generator = np.random.default_rng(seed)
    units = first.shape[1]
    found = []
    for _ in range(RESAMPLES):
        columns = generator.integers(units, size=units)
        means = [
            side[generator.integers(len(side), size=len(side))][:, columns].mean()
            for side in (first, second)
        ]
        found.append(means[1] - means[0])
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def paired_row(data_sets: int, seeds: int, spread: float, times: int, pairs: int = 120) -> dict:
    """Coverage of the difference of two entries with shared pairs and seeds of the same numbers."""
    truth = true_mean(QUALITY, spread) - true_mean(0, spread)
    generator = np.random.default_rng(13)
    held = 0
    for number in range(times):
        shifts = spread * generator.normal(size=(2, seeds, 1))
        sides: tuple[list[Sample], list[Sample]] = ([], [])
        for place in range(data_sets):
            hardness = generator.normal(size=pairs)
            for side, quality, shift in zip(sides, (0, QUALITY), shifts, strict=True):
                values = preferences(generator, hardness, seeds, quality + shift, 0)
                (found,) = resampled_means(
                    values[None], np.ones((1, pairs)), RESAMPLES, number * data_sets + place
                )
                side.append(Sample([found], [pairs], [pairs], list(range(seeds))))
        result = paired(mean_of(sides[0]), mean_of(sides[1]))
        held += result["low"] <= truth <= result["high"]
    return {"data_sets": data_sets, "seeds": seeds, "spread": spread, "covered": held / times}


def length_row(prompts: int, first: float, second: float, times: int) -> dict:
    """Coverage of the difference of length-controlled win rates, without and with a penalty."""
    generator = np.random.default_rng(11)
    truth = 100 * (second - first)
    held, values = {"": 0, "published": 0}, {"": [], "published": []}
    for number in range(times):
        judged = [
            Judged(
                1.0 + (generator.random(prompts) < rate),
                generator.integers(100, 2000, prompts),
                generator.integers(100, 2000, prompts),
            )
            for rate in (first, second)
        ]
        resampling = Resampling(length_controlled=RESAMPLES, seed=number)
        found = compared_length_control([[side] for side in judged], resampling)["difference"]
        values[""].append(found["value"])
        held[""] += found["low"] <= truth <= found["high"]
        value, (low, high) = published(judged, number)
        values["published"].append(value)
        held["published"] += low <= truth <= high
    return {
        "rates": f"{first:.0%} and {second:.0%}",
        "prompts": prompts,
        "covered": held[""] / times,
        "mean": float(np.mean(values[""])),
        "penalised": held["published"] / times,
        "penalised_mean": float(np.mean(values["published"])),
    }


def published(judged: list[Judged], seed: int) -> tuple[float, Interval]:
    """The same with the C that cross-validation chooses for each side."""
    fits = [length_controlled(side) for side in judged]
    refits: list[Callable[[NDArray[np.int64]], float]] = [
        refit_of(side, fit.c) for side, fit in zip(judged, fits, strict=True)
    ]
    generator, count = np.random.default_rng(seed), len(judged[0].preference)
    drawn = [generator.integers(count, size=count) for _ in range(RESAMPLES)]
    found = [refits[1](rows) - refits[0](rows) for rows in drawn]
    low, high = np.quantile(found, [0.025, 0.975])
    return fits[1].win_rate - fits[0].win_rate, (float(low), float(high))


def fit_times() -> dict[str, float]:
    """Seconds of a fit with cross-validation and of 300 refits: 805 rows, 1,610 gamed ones."""
    generator, count = np.random.default_rng(0), 805
    difficulty = generator.normal(size=count)
    twice = np.concatenate([difficulty, difficulty])
    gamed = Gamed(
        index=np.tile(np.arange(count), 2),
        preference=generator.random(2 * count),
        std_delta_len=generator.normal(size=2 * count),
        instruction_difficulty=twice,
    )
    lengths = [generator.integers(100, 3000, count) for _ in range(2)]
    judged = Judged(1 + generator.random(count), *lengths, difficulty, gamed)
    start = time.perf_counter()
    fit = length_controlled(judged)
    middle = time.perf_counter()
    refit = refit_of(judged, fit.c)
    for _ in range(300):
        refit(generator.integers(count, size=count))
    return {"fit": middle - start, "refits": time.perf_counter() - middle}


if __name__ == "__main__":
    main()
