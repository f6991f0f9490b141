"""`mallowspo data`: look at preference data before training on it."""

import json
from dataclasses import replace
from pathlib import Path

import click
import transformers.utils.logging
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.commands.prepare import one_process
from mallowspo_cli.commands.show import print_pair
from mallowspo_cli.commands.words import own_words
from mallowspo_cli.data.advice import warnings
from mallowspo_cli.data.prepare import PreparedSplit, prepare_split
from mallowspo_cli.data.report import Findings, find, read_marks
from mallowspo_cli.distributed import console, log, set_up_logging
from mallowspo_cli.errors import DataError, RecipeError
from mallowspo_cli.files import make_directory, write_json
from mallowspo_cli.models.load import load_tokenizer, model_directory
from mallowspo_cli.recipe.choices import OnError
from mallowspo_cli.recipe.load import load_base, load_recipe
from mallowspo_cli.recipe.schema import DatasetConfig, Recipe
from mallowspo_cli.report.data_tables import print_findings
from mallowspo_cli.report.lengths import draw_lengths

DEFAULT_MODEL = "smollm2_135m"
SPLITS = ("train", "eval")


def check(words: list[str], as_json: bool) -> None:
    """Report what there is to know of a data set; see `mallowspo data check --help`."""
    set_up_logging()
    own, rest = own_words(words, ("to",))
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
    if not findings["splits"]["train"]["pairs"]:
        raise DataError(f"no pair of {recipe.dataset.title} can be trained on; see above.")


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
    own, rest = own_words(words, ("index", "split", "tokens"))
    split, index = own.get("split", "train"), own.get("index", "0")
    tokens = own.get("tokens", "false")
    if split not in SPLITS:
        raise RecipeError(f"split={split} is no split; expected {' or '.join(SPLITS)}.")
    if tokens not in ("true", "false"):
        raise RecipeError(f"tokens={tokens} is neither true nor false.")
    recipe = _recipe(rest, "data show")
    one_process("data show")
    _, tokenizer = _tokenizer(recipe)
    splits, complaint = _splits(recipe.dataset, tokenizer, recipe.dispersion.column)
    if complaint:
        log.info("%s All pairs are shown as the training split.", complaint)
    found = splits.get(split)
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
