"""The report of `mallowspo eval compare`: report.md and the tables on the terminal."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mallowspo_cli.report.comparison_rows import (
    AGREEMENT_HEAD,
    BASIS_HEAD,
    HEAD,
    SEED_HEAD,
    TERCILE_HEAD,
    Groups,
    Values,
    agreement_rows,
    all_pairs,
    basis,
    by_metric,
    cautions,
    finding,
    row,
    seed_groups,
    tercile_groups,
    title,
)
from mallowspo_cli.report.estimates import markdown_table

WIDTH = 120
"""Of a table in a file, which has no width of its own."""
MARKS = "|*<["
"""What Markdown would not show as it is, in names and paths."""

MEANING = """\
Values are in percent, differences in points. Prompts are resampled {means} times (for
length-controlled rates, fitted anew each time, {length_controlled} times), both sides together,
seed {seed}. `p` is two-sided; `Holm` corrects it for all comparisons in a table, and not for
several tables. `sign test` is exact: its p, and on how many prompts the second side is better :
worse in the mean over seeds, ties left out. Only what all seeds of both sides have is compared:
`left out` is what the first / second side has beside it, failed judgements included. `detectable`:
the smallest true difference that this comparison would find with 80 % power.
"""
ONE_MODEL = """\
Where both sides are single training runs, interval and p speak of these two models on other
prompts. They say nothing of another training run with the same settings: compare several seeds for
that.
"""
SEEDS = """\
Where a side has several seeds, the interval is a t interval, and seeds and prompts are both sources
of error (`df`: degrees of freedom; with few seeds it is wide because little is known). The sign
test looks at prompts alone.
"""


def as_markdown(results: Values, picture: str) -> str:
    """The report as Markdown; `evaluation.comparison.compare` says what the values are."""
    results = _escaped(results)
    sides, metrics = results["sides"], results["metrics"]
    first = sides[0]["label"]
    findings = [
        f"- {finding(title(metric, metrics), pair)}"
        for metric, pair in all_pairs(results)
        if pair["sides"][0]["label"] == first
    ]
    lines = [
        f"# {', '.join(side['label'] for side in sides[1:])} compared with {first}",
        "",
        *findings,
        "",
        f"![Differences with intervals, and values by seed]({picture})",
        "",
        *(line for metric in metrics for line in _metric(metric, metrics)),
        *_section("Seeds", SEED_HEAD, _flat(seed_groups(results))),
        *_terciles(results),
        *_section("Agreement of judges", AGREEMENT_HEAD, agreement_rows(results)),
    ]
    if notes := [*results["notes"], *cautions(results)]:
        lines += ["## What to look at", "", *(f"- {note}" for note in notes), ""]
    paths = [f"- {side['label']}: {side['path']} ({_members(side)})" for side in sides]
    lines += ["## How", "", *paths, "", MEANING.format(**results["resampling"])]
    counts = [max(len(s["seeds"]) for s in pair["sides"]) for _, pair in all_pairs(results)]
    return "\n".join([*lines, *[SEEDS] * (max(counts) > 1), *[ONE_MODEL] * (min(counts) == 1)])


def print_comparison(results: Values, place: Path) -> None:
    """The tables at the end, what to look at, and where things lie."""
    out = Console(highlight=False, markup=False)
    if not out.is_terminal:
        out.width = max(out.width, WIDTH)
    agreement = agreement_rows(results)
    tables = {
        "differences": (HEAD, by_metric(results, row)),
        "what they rest on": (BASIS_HEAD, by_metric(results, basis)),
        "seeds": (SEED_HEAD, seed_groups(results)),
        "differences by the prompts' dispersion": (TERCILE_HEAD, tercile_groups(results)),
        "agreement of judges": (AGREEMENT_HEAD, [("", agreement)] if agreement else []),
    }
    for name, (head, groups) in tables.items():
        if groups:
            out.print(_table(name, head, groups))
    for note in [*results["notes"], *cautions(results)]:
        out.print(f"note: {note}", soft_wrap=True)
    out.print(f"report: {place / 'report.md'}", soft_wrap=True)


def _metric(metric: Values, metrics: list[Values]) -> list[str]:
    name = title(metric, metrics)
    rows = [[*row(pair), *basis(pair)[1:]] for pair in metric["pairs"]]
    judged = f"Judge {metric['judge']}, against {metric['baseline']}." if metric["judge"] else ""
    return _section(name[0].upper() + name[1:], HEAD + BASIS_HEAD[1:], rows, judged)


def _terciles(results: Values) -> list[str]:
    told = (
        "Differences in each third of the prompts by w = -ln entropy (high w: low dispersion), and "
        "how much larger the difference is where dispersion is high. p is of the latter, not "
        "corrected for several rows."
    )
    if reference := results["dispersion_reference"]:
        told += f" Entropies of instructions are those of {reference}."
    rows = _flat(tercile_groups(results))
    return _section("By the prompts' dispersion", TERCILE_HEAD, rows, told)


def _section(name: str, head: list[str], rows: list[list[str]], told: str = "") -> list[str]:
    """A heading, a table and a paragraph below it; nothing without rows."""
    if not rows:
        return []
    table = markdown_table(head, rows)
    return [f"## {name}", "", *table, "", *([told, ""] if told else [])]


def _flat(groups: Groups) -> list[list[str]]:
    return [[f"{name}, {cells[0]}", *cells[1:]] for name, rows in groups for cells in rows]


def _table(name: str, head: list[str], groups: Groups) -> Table:
    """Rows stand below the name of their group, so that none needs to hold it."""
    table = Table(title=Text(name), title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(head):
        table.add_column(column, justify="right" if number else "left")
    for group, rows in groups:
        if group:
            table.add_row(Text(group, style="bold"))
        for first, *others in rows:
            table.add_row(Text(f"{'  ' * bool(group)}{first}"), *map(Text, others))
    return table


def _members(side: Values) -> str:
    seeds = side["seeds"]
    return "one model" if len(seeds) == 1 else f"{len(seeds)} seeds: {', '.join(seeds)}"


def _escaped(value: Any) -> Any:
    """Plain values whose texts stand in Markdown as they are."""
    if isinstance(value, dict):
        return {_escaped(key): _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    if isinstance(value, str):
        return "".join(f"\\{mark}" if mark in MARKS else mark for mark in value)
    return value
