"""The findings of a data check, printed as tables."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mallowspo_cli.data.report import PERCENTILES, Findings

BARS = " ▁▂▃▄▅▆▇█"


ASCII_BARS = " .:-=+*#%"


BAR_COUNT = 10


HISTOGRAM = "0 to max"


WIDTH = 120


NOTHING = "nothing to complain of"


def print_findings(findings: Findings) -> None:
    """The findings as tables, and what to look at."""
    out = Console(highlight=False, markup=False)
    if not out.is_terminal:
        # A file has no width; in 80 columns a table would lose digits.
        out.width = max(out.width, WIDTH)
    out.print(f"data: {', '.join(findings['dataset'])}; model: {findings['model']}", soft_wrap=True)
    out.print("limits: " + ", ".join(f"{k} {v}" for k, v in findings["limits"].items()))
    out.print(_overview(findings))
    for name, split in findings["splits"].items():
        _print_details(out, name, split)
        if split["lengths"]:
            bars = ASCII_BARS if out.options.ascii_only else BARS
            out.print(_length_table(name, split["lengths"], bars))
    _print_examples(out, "eval prompt in train", (findings["overlap"] or {}).get("examples", []))
    if findings["gain"]:
        out.print(_gain_table(findings["gain"]))
    out.print("what to look at:", style="bold")
    for line in findings["warnings"] or [NOTHING]:
        out.print(f"- {line}", soft_wrap=True)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for number, column in enumerate(columns):
        left = number == 0 or column == HISTOGRAM
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _overview(findings: Findings) -> Table:
    """A column a split, a row a finding."""
    splits = findings["splits"]
    columns = [_overview_rows(split) for split in splits.values()]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    if overlap := findings["overlap"]:
        cell = f"{overlap['pairs']:,} ({overlap['share']:.1%})"
        rows.append(["pairs whose prompt is in train", *([""] * (len(splits) - 1)), cell])
    return _table(["", *splits], rows)


def _overview_rows(split: Findings) -> dict[str, str]:
    losses, bos, end = split["losses"].values(), split["bos"], split["end"]
    repeated, swapped, equal = (
        split[name] for name in ("duplicates", "contradictions", "equal_responses")
    )
    counts = {
        "rows of the data": split["rows"],
        "pairs of this split": split["of_split"],
        "pairs": split["pairs"],
        "dropped": sum(each["count"] for each in losses if each["dropped"]),
        "cut": sum(each["count"] for each in losses if not each["dropped"]),
        "pairs that occur more than once": repeated["distinct"],
        "- too many by": repeated["pairs"] - repeated["distinct"],
        "contradictory labels": swapped["distinct"],
        "equal responses": equal["text"],
        "equal as tokens": equal["tokens"],
        "prompts without BOS": bos and bos["none"]["count"],
        "prompts with one BOS": bos and bos["one"],
        "prompts with several BOS": bos and bos["several"]["count"],
        "pairs with BOS inside": bos and bos["inside"]["count"],
        "responses without end token": end["missing"],
        **{f"pairs with {k.replace('_', ' ')}": v["count"] for k, v in split["oddities"].items()},
    }
    rows = {name: "-" if count is None else f"{count:,}" for name, count in counts.items()}
    bias = split["length_bias"]
    rows["chosen is longer"] = "-" if bias is None else f"{bias['chosen_longer']:.1%}"
    rows["chosen - rejected, mean tokens"] = (
        "-" if bias is None else f"{bias['mean_difference']:+.1f}"
    )
    return rows


def _print_details(out: Console, name: str, split: Findings) -> None:
    """Layouts, parts, causes and example rows of a split."""
    out.print(f"{name}:", style="bold")
    for source, layout in split["layouts"].items():
        out.print(f"  layout of {source}: {layout}", soft_wrap=True)
    for part, count in split["parts"].items():
        out.print(f"  part {part}: {count:,} pairs", soft_wrap=True)
    for cause, of_cause in split["losses"].items():
        out.print(f"  {of_cause['count']:,} {cause} ({of_cause['share']:.1%})", soft_wrap=True)
        for example in of_cause["examples"]:
            out.print(f"    {example['error'] or example['where']}", style="dim", soft_wrap=True)
    _print_examples(out, "more than once", split["duplicates"]["examples"])
    _print_examples(out, "contradictory labels", split["contradictions"]["examples"])
    for kind in ("none", "several", "inside") if split["bos"] else ():
        if kind != "none" or split["bos"]["expected_at_start"]:
            _print_examples(out, f"BOS: {kind}", split["bos"][kind]["examples"])
    _print_examples(out, "no end token", split["end"]["examples"])
    for kind, odd in split["oddities"].items():
        _print_examples(out, kind.replace("_", " "), odd["examples"])
    last = [f"{t['token']!r} (id {t['id']}) {t['count']:,}" for t in split["end"]["last"]]
    out.print(f"  responses end in: {', '.join(last) or 'nothing'}", soft_wrap=True)


def _print_examples(out: Console, what: str, examples: Sequence[Any]) -> None:
    if not examples:
        return
    groups = [list(each.values()) if isinstance(each, dict) else each for each in examples]
    shown = ["; ".join(each) if isinstance(each, list) else each for each in groups]
    out.print(f"  {what}, such as:", soft_wrap=True)
    for line in shown:
        out.print(f"    {line}", style="dim", soft_wrap=True)


def _length_table(name: str, lengths: Findings, bars: str) -> Table:
    columns = [f"{name}, tokens", "mean", *(f"{p} %" for p in PERCENTILES), "max", HISTOGRAM]
    titles = {"row": "prompt + longer", "pair": "pair in all"}
    rows = []
    for part, numbers in lengths.items():
        keys = [f"p{p}" for p in PERCENTILES]
        cells = [f"{numbers[key]:.0f}" for key in ("mean", *keys, "max")]
        histogram = bar_line(numbers["histogram"]["counts"], bars)
        rows.append([titles.get(part, part), *cells, histogram])
    return _table(columns, rows)


def bar_line(counts: Sequence[int], bars: str = BARS) -> str:
    """A histogram in at most BAR_COUNT characters; what is not empty is seen."""
    step = -(-len(counts) // BAR_COUNT)
    sums = [sum(counts[i : i + step]) for i in range(0, len(counts), step)]
    most = max(*sums, 1)
    return "".join(bars[-(-count * (len(bars) - 1) // most)] for count in sums)


def _gain_table(gain: Findings) -> Table:
    rows = [
        [
            f"batches of {size} pairs",
            f"x{numbers['packing']:.2f}",
            f"x{gain['sharing']:.2f}",
            f"x{numbers['both']:.2f}",
        ]
        for size, numbers in gain["batches"].items()
    ]
    columns = ["predicted gain (train), from padded", "packed", "prompt read once", "both"]
    return _table(columns, rows)
