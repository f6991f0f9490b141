"""`mallowspo data`: look at preference data before training on it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import transformers.utils.logging
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.commands.prepare import one_process
from mallowspo_cli.commands.show import print_pair
from mallowspo_cli.data.prepare import PreparedSplit, prepare_split
from mallowspo_cli.data.report import PERCENTILES, Findings, find, read_marks, warnings
from mallowspo_cli.distributed import console, log, set_up_logging
from mallowspo_cli.errors import DataError, RecipeError
from mallowspo_cli.files import make_directory, write_json
from mallowspo_cli.models.load import load_tokenizer, model_directory
from mallowspo_cli.recipe.choices import OnError
from mallowspo_cli.recipe.load import load_base, load_recipe
from mallowspo_cli.recipe.schema import DatasetConfig, Recipe
from mallowspo_cli.report.lengths import draw_lengths

DEFAULT_MODEL = "smollm2_135m"
SPLITS = ("train", "eval")
BARS = " ▁▂▃▄▅▆▇█"
ASCII_BARS = " .:-=+*#%"
BAR_COUNT = 10
WIDTH = 120
NOTHING = "nothing to complain of"


def check(words: list[str], as_json: bool) -> None:
    """Report what there is to know of a data set; see `mallowspo data check --help`."""
    set_up_logging()
    own, rest = _split_words(words, ("to",))
    recipe = _recipe(rest, "data check")
    one_process("data check")
    to = make_directory(Path(own["to"]).expanduser(), "the findings") if "to" in own else None
    findings = check_data(recipe)
    if as_json:
        click.echo(json.dumps(findings, indent=2))
    else:
        print_findings(findings)
    if to is not None:
        write_json(to / "findings.json", findings)
        draw_lengths(findings, to / "lengths.png")
        log.info("wrote %s and lengths.png", to / "findings.json")


def check_data(recipe: Recipe) -> Findings:
    """Read, tokenise and look at every row of a recipe's data, whatever is wrong with it.

    Raises:
        DataError: data that cannot be read.
    """
    directory, tokenizer = _tokenizer(recipe)
    splits, complaint = _splits(recipe.dataset, tokenizer, recipe.dispersion.column)
    findings = find(splits, recipe.dataset, read_marks(tokenizer, directory))
    paths = [part.path for part in recipe.dataset.parts.values()] or [recipe.dataset.path]
    findings |= {"dataset": paths, "model": recipe.model.source}
    findings["warnings"] = [*([complaint] if complaint else []), *warnings(findings)]
    return findings


def show(words: list[str]) -> None:
    """Print a pair as the model sees it; see `mallowspo data show --help`."""
    set_up_logging()
    own, rest = _split_words(words, ("index", "split", "tokens"))
    split, index = own.get("split", "train"), own.get("index", "0")
    tokens = own.get("tokens", "false")
    if split not in SPLITS:
        raise RecipeError(f"split={split} is no split; expected {' or '.join(SPLITS)}.")
    if tokens not in ("true", "false"):
        raise RecipeError(f"tokens={tokens} is neither true nor false.")
    recipe = _recipe(rest, "data show")
    one_process("data show")
    _, tokenizer = _tokenizer(recipe)
    config = replace(recipe.dataset, on_error=OnError.drop)
    found = prepare_split(config, split, tokenizer, recipe.dispersion.column)
    if found is None:
        raise DataError(
            "the data has no held-out pairs. Name a split (dataset.eval_split=NAME), or take some "
            "out (dataset.eval_size=100)."
        )
    count = len(found.pairs)
    if not index.isdecimal() or int(index) >= count:
        raise DataError(
            f"index={index} is no pair of the {split} split; expected 0 to {count - 1}."
        )
    number = int(index)
    where = found.pairs.values("where")[number]
    print_pair(
        found.pairs[number],
        tokenizer,
        where=f"{split} pair {number}: {where}",
        ids=tokens == "true",
    )


def _split_words(words: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The verb's own words, and those of the recipe.

    Raises:
        RecipeError: one of its own is empty.
    """
    own: dict[str, str] = {}
    rest = []
    for word in words:
        key, separator, value = word.partition("=")
        if key not in names or not separator:
            rest.append(word)
            continue
        if not value:
            raise RecipeError(f"{key} is empty. Give a value: {key}=...")
        own[key] = value
    return own, rest


def _recipe(words: list[str], verb: str) -> Recipe:
    """The recipe that is named, or the defaults with the data set (and model) that are."""
    names = [word.removeprefix("recipe=") for word in words if word.startswith("recipe=")]
    rest = [word for word in words if not word.startswith("recipe=")]
    keys = [word.partition("=")[0] for word in rest]
    if len(names) > 1 or "" in names or not (names or "dataset" in keys):
        found = " ".join(f"recipe={name}" for name in names) or "neither recipe= nor dataset="
        raise RecipeError(
            f"found {found}, expected one. Example: mallowspo {verb} dataset=local "
            "dataset.path=pairs.jsonl"
        )
    if names:
        return load_recipe(names[0], rest).recipe
    if not {"model", "model.source"} & set(keys):
        log.info("no model= is given: its tokenizer is that of model=%s", DEFAULT_MODEL)
        rest.append(f"model={DEFAULT_MODEL}")
    if "objective" not in keys:
        rest.append("objective=dpo")
    return load_base(rest).recipe


def _tokenizer(recipe: Recipe) -> tuple[Path, PreTrainedTokenizerBase]:
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    directory = model_directory(recipe.model)
    return directory, load_tokenizer(directory, recipe.model.chat_template)


def _splits(
    config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, column: str | None
) -> tuple[dict[str, PreparedSplit], str | None]:
    """Both splits, empty ones too; and why none could be held out, if so.

    Raises:
        DataError: data that cannot be read.
    """
    config = replace(config, on_error=OnError.drop)
    try:
        found = {
            split: prepare_split(config, split, tokenizer, column, keep_empty=True)
            for split in SPLITS
        }
    except DataError as error:
        if config.eval_size == 0:
            raise
        # Too few pairs to hold some out; or the data cannot be read, as is said once more then.
        splits, _ = _splits(replace(config, eval_size=0), tokenizer, column)
        return splits, str(error)
    return {name: split for name, split in found.items() if split is not None}, None


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


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=Text(title), box=box.SIMPLE_HEAD, padding=(0, 1), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
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
    return _table("", ["", *splits], rows)


def _overview_rows(split: Findings) -> dict[str, str]:
    losses, bos, end = split["losses"].values(), split["bos"], split["end"]
    repeated, swapped, equal = (
        split[name] for name in ("duplicates", "contradictions", "equal_responses")
    )
    counts = {
        "rows": split["rows"],
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
    columns = [f"{name}, tokens", "mean", *(f"{p} %" for p in PERCENTILES), "max", "0 to max"]
    titles = {"row": "prompt + longer", "pair": "pair in all"}
    rows = []
    for part, numbers in lengths.items():
        keys = [f"p{p}" for p in PERCENTILES]
        cells = [f"{numbers[key]:.0f}" for key in ("mean", *keys, "max")]
        histogram = bar_line(numbers["histogram"]["counts"], bars)
        rows.append([titles.get(part, part), *cells, histogram])
    return _table("", columns, rows)


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
    return _table("", columns, rows)
