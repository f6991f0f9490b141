"""Cells of a comparison's tables, for Markdown and terminal alike."""

from collections.abc import Callable, Iterator
from math import isnan
from typing import Any

FEW_PROMPTS = 50
"""With fewer, the bootstrap's p is too small (measured: evaluation/comparing/paired.py)."""
SIGNIFICANT = 0.05

HEAD = ["second - first", "first", "second", "difference [95%]", "p", "Holm", "sign test"]
BASIS_HEAD = ["second - first", "prompts", "left out", "std. error", "df", "detectable"]
SEED_HEAD = ["", "mean", "std. deviation", "seeds"]
TERCILE_HEAD = ["", "low dispersion", "middle", "high dispersion", "high - low", "p"]
AGREEMENT_HEAD = ["judges", "answers", "same verdict", "Cohen's kappa [95%]"]

Values = dict[str, Any]
Groups = list[tuple[str, list[list[str]]]]
"""(name, rows) of each metric."""


def all_pairs(results: Values) -> Iterator[tuple[Values, Values]]:
    """(metric, pair) for each comparison."""
    for metric in results["metrics"]:
        for pair in metric["pairs"]:
            yield metric, pair


def title(metric: Values, metrics: list[Values]) -> str:
    """A metric's name, with as much beside it as tells it from the others."""
    alike = [
        other
        for other in metrics
        if (other["metric"], other["evaluation"]) == (metric["metric"], metric["evaluation"])
    ]
    name = metric["metric"]
    if metric["evaluation"]:
        name += f", {metric['evaluation']}"
    if len(alike) > 1:
        name += f", by {metric['judge']} against {metric['baseline']}"
    return name


def compared(pair: Values) -> str:
    """Which difference it is."""
    first, second = (side["label"] for side in pair["sides"])
    return f"{second} - {first}"


def finding(name: str, pair: Values) -> str:
    """The difference in a line."""
    difference = pair["difference"]
    line = f"{name}, {compared(pair)}: {interval(difference)} points"
    if difference["p"] is None:
        return line
    corrected = difference["p_holm"]
    holm = "" if corrected == difference["p"] else f", {corrected:.2g} after Holm's correction"
    return f"{line}, p {difference['p']:.2g}{holm}"


def row(pair: Values) -> list[str]:
    """Cells under HEAD."""
    difference, sign = pair["difference"], pair["sign_test"]
    p = [_p(difference["p"]), _p(difference.get("p_holm"))]
    counted = f"{_p(sign['p'])} ({sign['better']} : {sign['worse']})" if sign else "-"
    values = [f"{side['value']:.2f}" for side in pair["sides"]]
    return [compared(pair), *values, interval(difference), *p, counted]


def basis(pair: Values) -> list[str]:
    """Cells under BASIS_HEAD."""
    found = pair["difference"]
    pairs = "" if pair["rows"] == pair["prompts"] else f" ({pair['rows']:,} pairs)"
    return [
        compared(pair),
        f"{pair['prompts']:,}{pairs}",
        " / ".join(f"{side['left_out']:,}" for side in pair["sides"]),
        *(_number(found[key]) for key in ("standard_error", "degrees_of_freedom", "detectable")),
    ]


def by_metric(results: Values, cells_of: Callable[[Values], list[str]]) -> Groups:
    """A row for each pair."""
    metrics = results["metrics"]
    return [(title(m, metrics), [cells_of(pair) for pair in m["pairs"]]) for m in metrics]


def seed_groups(results: Values) -> Groups:
    """Rows under SEED_HEAD for sides of several seeds, on what their first comparison shares."""
    groups: Groups = []
    for metric in results["metrics"]:
        sides: dict[str, list[str]] = {}
        for side in (side for pair in metric["pairs"] for side in pair["sides"]):
            if len(side["seeds"]) > 1:
                seeds = ", ".join(f"{name} {value:.2f}" for name, value in side["seeds"].items())
                values = [f"{side['value']:.2f}", f"{side['deviation']:.2f}"]
                sides.setdefault(side["label"], [side["label"], *values, seeds])
        if sides:
            groups.append((title(metric, results["metrics"]), list(sides.values())))
    return groups


def tercile_groups(results: Values) -> Groups:
    """Rows under TERCILE_HEAD."""
    groups: Groups = []
    for metric in results["metrics"]:
        rows = [
            [
                compared(pair),
                *(interval(third, 1) for third in pair["by_dispersion"].values()),
                interval(pair["interaction"], 1),
                _p(pair["interaction"]["p"]),
            ]
            for pair in metric["pairs"]
            if pair["by_dispersion"]
        ]
        if rows:
            groups.append((title(metric, results["metrics"]), rows))
    return groups


def agreement_rows(results: Values) -> list[list[str]]:
    """Rows under AGREEMENT_HEAD."""
    return [
        [
            f"{found['first']} and {found['second']}",
            f"{found['count']:,}",
            f"{100 * found['equal']:.1f} %",
            "-"
            if isnan(found["kappa"])
            else f"{found['kappa']:.3f} [{found['low']:.3f}, {found['high']:.3f}]",
        ]
        for found in results["agreement"]
    ]


def cautions(results: Values) -> list[str]:
    """What makes the numbers weaker than they look."""
    found = []
    for metric, pair in all_pairs(results):
        counts = sorted(len(side["seeds"]) for side in pair["sides"])
        told = f"{title(metric, results['metrics'])}, {compared(pair)}"
        if pair["prompts"] < FEW_PROMPTS and counts[-1] == 1:
            test = " Go by the sign test." if pair["sign_test"] else ""
            found.append(
                f"{told}: only {pair['prompts']} prompts, so p is too small by up to a half.{test}"
            )
        if counts == [1, 2]:
            found.append(f"{told}: two seeds say little of how seeds vary. Train a third.")
    return found + _coarse(results)


def _coarse(results: Values) -> list[str]:
    """Metrics with too few resamples for as many comparisons."""
    found = []
    for metric in results["metrics"]:
        controlled = "unpenalised" in metric["pairs"][0]
        key, word = ("length_controlled", "bootstrap_lc") if controlled else ("means", "bootstrap")
        tested = [pair["difference"] for pair in metric["pairs"]]
        tested = [each for each in tested if each["p"] is not None]
        # With several seeds p is a t distribution's, and as small as it may be.
        counted = [each for each in tested if each["degrees_of_freedom"] is None]
        resamples = results["resampling"][key]
        if counted and len(tested) / (resamples + 1) > SIGNIFICANT:
            enough = round(len(tested) / SIGNIFICANT)
            found.append(
                f"{title(metric, results['metrics'])}: with {resamples:,} resamples and "
                f"{len(tested)} comparisons Holm's p cannot be below {SIGNIFICANT:g}. Take "
                f"{word}={enough} or more."
            )
    return found


def interval(found: Values, digits: int = 2) -> str:
    """A difference with its interval, where it has one."""
    if found["low"] is None:
        return f"{found['value']:+.{digits}f}"
    value, low, high = (f"{found[key]:+.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
