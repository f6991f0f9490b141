"""From a recipe to what every verb needs: model files, tokenizer, tokenised pairs, reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers.utils.logging
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.data.dataset import load_pairs
from mallowspo_cli.data.tokenize import TokenizedPair, TokenizedPairs, tokenize_pairs
from mallowspo_cli.distributed import console, log, world_size
from mallowspo_cli.errors import MallowsPOError
from mallowspo_cli.models.load import load_tokenizer, model_directory
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.reference.build import complete_store, open_store
from mallowspo_cli.reference.store import ReferenceStore


@dataclass(frozen=True)
class Prepared:
    """Data ready to score."""

    directory: Path
    tokenizer: PreTrainedTokenizerBase
    train: TokenizedPairs
    held_out: TokenizedPairs | None
    train_read: int
    """Training pairs in the data, before any were left out."""


def prepare(recipe: Recipe, sample: int | None = None) -> Prepared:
    """Fetch the model's files, read the pairs and tokenise them, telling what was left out.

    With `sample`, only the first so many pairs of each split are tokenised.
    """
    if world_size() > 1:
        raise MallowsPOError(
            f"{world_size()} processes were launched; this version trains in one. "
            "Run `mallowspo train` without a launcher."
        )
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    directory = model_directory(recipe.model)
    tokenizer = load_tokenizer(directory)
    pairs = {split: load_pairs(recipe.dataset, split) for split in ("train", "eval")}
    splits = {}
    for split, every in pairs.items():
        chosen = every[:sample]
        splits[split] = tokenize_pairs(chosen, tokenizer, recipe.dataset) if chosen else None
        if splits[split] is not None:
            report_losses(split, len(chosen), splits[split])
    return Prepared(directory, tokenizer, splits["train"], splits["eval"], len(pairs["train"]))


def report_losses(split: str, read: int, tokenized: TokenizedPairs) -> None:
    """Say how many pairs a split has, and what happened to the rest."""
    log.info("%s split: %d of %d pairs", split, len(tokenized), read)
    for cause, count in tokenized.losses.items():
        log.info("  %d of %d %s", count, read, cause)


def filled_store(recipe: Recipe, prepared: Prepared, device: torch.device) -> ReferenceStore:
    """The reference store, with a row for every pair of the recipe.

    Split by split: evaluation then packs the held-out pairs as the pass did, so that a policy equal
    to its reference has margins of exactly 0 on them.
    """
    store = complete(recipe, prepared.directory, prepared.train, device)
    if prepared.held_out is None:
        return store
    return complete(recipe, prepared.directory, prepared.held_out, device)


def complete(
    recipe: Recipe, directory: Path, pairs: Sequence[TokenizedPair], device: torch.device
) -> ReferenceStore:
    """The store of the recipe's reference in `directory`, with a row for each of `pairs`."""
    precision = recipe.train.precision
    store = open_store(directory, recipe.model, recipe.reference, precision)
    pack_tokens = recipe.reference.pack_tokens
    new = complete_store(store, pairs, directory, recipe.model, precision, pack_tokens, device)
    if new == 0:
        log.info("reference store: every pair is there (%s)", store.path)
    else:
        log.info("reference store: %d pairs added (%s)", new, store.path)
    return store


def default_device() -> torch.device:
    """The accelerator, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
