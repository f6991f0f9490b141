"""From a recipe to what every verb needs: model files, tokenizer, tokenised pairs, reference."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers.utils.logging
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.data.prepare import PreparedSplit, prepare_split
from mallowspo_cli.data.table import TokenizedPair, TokenizedPairs
from mallowspo_cli.distributed import console, log, main_first, world_size
from mallowspo_cli.errors import DataError, MallowsPOError
from mallowspo_cli.files import cache_directory
from mallowspo_cli.models.load import load_tokenizer, model_directory
from mallowspo_cli.recipe.choices import DispersionSource
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
    fill_command: str
    """The command that fills the reference store, for messages."""

    @property
    def train(self) -> TokenizedPairs:
        """The training pairs."""
        return self.splits["train"].pairs

    @property
    def held_out(self) -> TokenizedPairs | None:
        """The held-out pairs, if there are any."""
        return self.splits["eval"].pairs if "eval" in self.splits else None


def prepare(
    recipe: Recipe, words: Sequence[str] = ("recipe=...",), sample: int | None = None
) -> Prepared:
    """Fetch the model's files, read the pairs and tokenise them, telling what was left out.

    Among several processes the main one does the work while the others wait for its files.

    Args:
        words: the command's words, for messages that say how to fill the reference store.
        sample: only the first so many rows of each split are read.
    """
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    fill = shlex.join(["mallowspo", "cache-ref", *words])
    launches = cache_directory() / "launches"
    prepared = main_first(lambda: _prepare(recipe, fill, sample), launches)
    for name, split in prepared.splits.items():
        log.info("%s split: %d of %d pairs", name, len(split.pairs), split.pairs.considered)
        for cause, count in split.pairs.losses.items():
            log.info("  %d %s", count, cause)
    return prepared


def _prepare(recipe: Recipe, fill: str, sample: int | None) -> Prepared:
    directory = model_directory(recipe.model)
    tokenizer = load_tokenizer(directory, recipe.model.chat_template)
    column = recipe.dispersion.column
    by_raters = recipe.dispersion.source is DispersionSource.raters
    found = {
        split: prepare_split(recipe.dataset, split, tokenizer, column, sample)
        for split in ("train", "eval")
    }
    splits = {name: split for name, split in found.items() if split is not None}
    rated = ~np.isnan(splits["train"].pairs.values("rater_neg_log_phi"))
    if by_raters and not rated.any():
        raise DataError(
            "dispersion.source=raters needs the scores of several raters, and "
            f"{recipe.dataset.title} has none: expected the columns prompt, responses and "
            "rater_scores."
        )
    return Prepared(directory, tokenizer, splits, fill)


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
    for name, split in prepared.splits.items():
        store, scored = complete(recipe, prepared, split.pairs, device, f"{name} split")
        counts["scored"] += scored
        counts["reused"] += len(set(split.pairs.pair_ids)) - scored
    assert store is not None
    return store, counts


def complete(
    recipe: Recipe,
    prepared: Prepared,
    pairs: Sequence[TokenizedPair],
    device: torch.device,
    what: str = "data",
) -> tuple[ReferenceStore, int]:
    """The store of the recipe's reference, with a row for each of `pairs` (`what` they are, for the
    log), and how many of them were scored now.
    """
    store = recipe_store(recipe, prepared)
    new = complete_store(
        store,
        pairs,
        prepared.directory,
        recipe.model,
        recipe.train.precision,
        recipe.reference.pack_tokens,
        device,
    )
    there = "every pair is there" if new == 0 else f"{new} pairs added"
    log.info("reference store, %s: %s (%s)", what, there, store.path)
    return store, new


def recipe_store(recipe: Recipe, prepared: Prepared, create: bool = True) -> ReferenceStore:
    """The store of a recipe's reference, made when it is not there and `create` is set.

    Raises:
        CacheError: `reference.store` names a store that was built otherwise (says what differs and
            how to build another), or none and `create` is not set.
    """
    return open_store(
        prepared.directory,
        recipe.model,
        recipe.reference,
        recipe.train.precision,
        prepared.fill_command,
        create,
    )


def default_device() -> torch.device:
    """This process's accelerator, if there are any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return torch.device("cuda", int(local) % torch.cuda.device_count())
