"""From a recipe to what every verb needs: model files, tokenizer, tokenised pairs, reference."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers.utils.logging
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.data.prepare import PreparedSplit, prepare_split
from mallowspo_cli.data.table import TokenizedPair, TokenizedPairs
from mallowspo_cli.distributed import console, log, main_first, world_size
from mallowspo_cli.errors import MallowsPOError, RecipeError
from mallowspo_cli.files import cache_directory
from mallowspo_cli.models.load import load_tokenizer, model_directory
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.reference.build import complete_store, open_store
from mallowspo_cli.reference.store import ReferenceStore


@dataclass(frozen=True)
class Prepared:
    """Data ready to score."""

    directory: Path
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, PreparedSplit]
    """"train", and "eval" where the data has held-out pairs."""

    @property
    def train(self) -> TokenizedPairs:
        """The training pairs."""
        return self.splits["train"].pairs

    @property
    def held_out(self) -> TokenizedPairs | None:
        """The held-out pairs, if there are any."""
        return self.splits["eval"].pairs if "eval" in self.splits else None


def prepare(recipe: Recipe, sample: int | None = None) -> Prepared:
    """Fetch the model's files, read the pairs and tokenise them, telling what was left out.

    Among several processes the main one does the work while the others wait for its files.

    With `sample`, only the first so many rows of each split are read.
    """
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    prepared = main_first(lambda: _prepare(recipe, sample), cache_directory() / "launches")
    for name, split in prepared.splits.items():
        log.info("%s split: %d pairs of %d rows", name, len(split.pairs), split.rows)
        for cause, count in split.pairs.losses.items():
            log.info("  %d %s", count, cause)
    return prepared


def _prepare(recipe: Recipe, sample: int | None) -> Prepared:
    directory = model_directory(recipe.model)
    tokenizer = load_tokenizer(directory, recipe.model.chat_template)
    column = recipe.dispersion.column
    found = {
        split: prepare_split(recipe.dataset, split, tokenizer, column, sample)
        for split in ("train", "eval")
    }
    splits = {name: split for name, split in found.items() if split is not None}
    return Prepared(directory, tokenizer, splits)


def own_words(words: list[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """A verb's own NAME=VALUE words, and the others.

    Raises:
        RecipeError: one of them twice, or without a value.
    """
    own: dict[str, str] = {}
    others = []
    for word in words:
        name, equals, value = word.partition("=")
        if name not in names:
            others.append(word)
        elif not equals or not value or name in own:
            raise RecipeError(f"found {word!r}; expected {name}=VALUE, once.")
        else:
            own[name] = value
    return own, others


def one_process(verb: str) -> None:
    """Refuse a launch of several processes.

    Raises:
        MallowsPOError: there are several.
    """
    if world_size() > 1:
        raise MallowsPOError(
            f"{world_size()} processes were launched; this version's `{verb}` runs in one. "
            f"Run `mallowspo {verb}` without a launcher."
        )


def filled_store(
    recipe: Recipe, prepared: Prepared, device: torch.device
) -> tuple[ReferenceStore, dict[str, int]]:
    """The reference store with a row for every pair of the recipe, and how many pairs were scored
    for that and how many were there.

    Split by split: evaluation then packs the held-out pairs as the pass did, so that a policy equal
    to its reference has margins of exactly 0 on them.
    """
    counts = {"scored": 0, "reused": 0}
    store = None
    for split in prepared.splits.values():
        store, scored = complete(recipe, prepared.directory, split.pairs, device)
        counts["scored"] += scored
        counts["reused"] += len(set(split.pairs.pair_ids)) - scored
    assert store is not None
    return store, counts


def complete(
    recipe: Recipe, directory: Path, pairs: Sequence[TokenizedPair], device: torch.device
) -> tuple[ReferenceStore, int]:
    """The store of the recipe's reference in `directory`, with a row for each of `pairs`, and how
    many of them were scored now.
    """
    precision = recipe.train.precision
    store = recipe_store(recipe, directory)
    pack_tokens = recipe.reference.pack_tokens
    new = complete_store(store, pairs, directory, recipe.model, precision, pack_tokens, device)
    if new == 0:
        log.info("reference store: every pair is there (%s)", store.path)
    else:
        log.info("reference store: %d pairs added (%s)", new, store.path)
    return store, new


def recipe_store(recipe: Recipe, directory: Path) -> ReferenceStore:
    """The store of a recipe's reference, made when it is not there.

    Raises:
        CacheError: `reference.store` names a store that was built otherwise; says what differs and
            how to build another.
    """
    words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    kept = [shlex.quote(w) for w in words if not w.startswith("reference.store=")]
    rebuild = " ".join(["mallowspo cache-ref", *kept])
    precision = recipe.train.precision
    return open_store(directory, recipe.model, recipe.reference, precision, rebuild)


def default_device() -> torch.device:
    """The accelerator, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
