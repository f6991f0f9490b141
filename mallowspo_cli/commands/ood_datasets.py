"""Data sets of `mallowspo experiment out-of-distribution`: by name, and ready to be scored."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.data.dataset import has_split
from mallowspo_cli.data.prepare import PreparedSplit, prepare_split
from mallowspo_cli.data.table import TokenizedPairs
from mallowspo_cli.distributed import log
from mallowspo_cli.errors import DataError, RecipeError
from mallowspo_cli.experiments.rated_files import NAMES, PREFIX, rated_path, write_rated
from mallowspo_cli.recipe.find import option_names
from mallowspo_cli.recipe.load import load_base
from mallowspo_cli.recipe.nearest import nearest
from mallowspo_cli.recipe.schema import DatasetConfig, Recipe

DRAW_SEED = 0
"""Of the pairs that are drawn from a larger set: the same ones for every run."""


@dataclass(frozen=True)
class Sizes:
    """How many pairs are taken."""

    train_pairs: int = 1000
    """Pairs of a rated corpus to train on."""
    limit: int = 500
    """Pairs of each data set to evaluate on."""
    max_chars: int | None = None
    """Longest text of a rated corpus."""


@dataclass(frozen=True)
class Evaluated:
    """A data set to evaluate on."""

    name: str
    pairs: TokenizedPairs
    one_prompt: bool
    """Whether all pairs answer one prompt, so that the pair is what is resampled."""
    about: dict[str, object]
    """For the report: where it lies, what was left out."""


def check_name(name: str) -> None:
    """Refuse what is no rated corpus, no file and no name in recipes/dataset/.

    Raises:
        RecipeError: tells the nearest.
    """
    known = [*NAMES, *(option for option in option_names("dataset") if option != "local")]
    if name in known or Path(name).expanduser().exists():
        return
    raise RecipeError(
        f"no data set '{name}'.{nearest(name, known)} Give a file, or one of {', '.join(known)}."
    )


def training_words(name: str, sizes: Sizes) -> list[str]:
    """Recipe words that choose a data set to train on; nothing is read or written."""
    if not name.startswith(PREFIX):
        return _words(name)
    place = rated_path(name, sizes.train_pairs, sizes.limit, sizes.max_chars)
    return [
        *("dataset=local", f"dataset.path={json.dumps(str(place))}", "dataset.format=scored"),
        "dataset.eval_split=eval",
    ]


def target_config(name: str, sizes: Sizes) -> DatasetConfig:
    """A data set that nothing is trained on; a rated corpus is written where it is not there."""
    if name.startswith(PREFIX):
        place = write_rated(name, 0, sizes.limit, sizes.max_chars)
        return DatasetConfig(path=str(place), format="scored", max_length=1024)
    words = _words(name)
    if Path(name).expanduser().exists():
        # Nothing has to be held out.
        words.append("dataset.eval_size=0")
    fixed = ["model.source=none", "objective=dpo"]
    return load_base([*fixed, *words]).recipe.dataset


def prepared_sets(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    inside: str,
    targets: Sequence[str],
    sizes: Sizes,
) -> list[Evaluated]:
    """The held-out pairs of the recipe's data set under the name `inside`, then the targets'.

    Raises:
        DataError: data that cannot be read, without held-out pairs, or all of it trained on.
        RecipeError: a target that is the recipe's data set.
    """
    config, column = recipe.dataset, recipe.dispersion.column
    held_out = prepare_split(config, "eval", tokenizer, column)
    if held_out is None:
        raise DataError(
            f"{inside} has no held-out pairs. Name a split (dataset.eval_split=NAME), or take some "
            "out (dataset.eval_size=100)."
        )
    train = prepare_split(config, "train", tokenizer, column)
    assert train is not None
    trained_on = set(train.pairs.pair_ids)
    found = [_evaluated(inside, held_out, set(), sizes.limit)]
    for name in targets:
        # The user's word on broken rows holds for all data.
        target = replace(target_config(name, sizes), on_error=config.on_error)
        if _content(target) == _content(config):
            raise RecipeError(f"{name} is what is trained on. Name other data sets in targets=.")
        split = "eval" if has_split(target, "eval") else "train"
        ready = prepare_split(target, split, tokenizer)
        assert ready is not None
        found.append(_evaluated(name, ready, trained_on, sizes.limit))
    return found


def _content(config: DatasetConfig) -> tuple[object, ...]:
    """What tells whether two names stand for the same data."""
    place = Path(config.path or "").expanduser()
    path = str(place.resolve()) if config.path and place.exists() else config.path
    parts = [(part.path, part.subset, part.data_dir) for part in config.parts.values()]
    return (path, config.subset, config.data_dir, *parts)


def _words(name: str) -> list[str]:
    place = Path(name).expanduser()
    if not place.exists():
        return [f"dataset={name}"]
    words = ["dataset=local", f"dataset.path={json.dumps(str(place.resolve()))}"]
    return [*words, *(["dataset.eval_split=eval"] if _has_eval(place) else [])]


def _has_eval(place: Path) -> bool:
    return place.is_dir() and any(place.glob("eval.*"))


def _evaluated(name: str, split: PreparedSplit, trained_on: set[str], limit: int) -> Evaluated:
    """At most `limit` pairs, drawn from all that were not trained on."""
    ids = split.pairs.pair_ids
    # A pair that is there twice has one row in the reference store, and counts once.
    first = {pair: index for index, pair in reversed(list(enumerate(ids)))}
    fresh = np.asarray(sorted(i for pair, i in first.items() if pair not in trained_on), np.int64)
    if len(fresh) == 0:
        raise DataError(f"{name}: all of its {len(ids)} pairs are training pairs.")
    drawn = np.random.default_rng(DRAW_SEED).permutation(len(fresh))[:limit]
    pairs = split.pairs.take(fresh[np.sort(drawn)])
    prompts = len(set(pairs.values("prompt_key").tolist()))
    lengths = pairs.lengths
    about: dict[str, object] = {
        "pairs": len(pairs),
        "prompts": prompts,
        "of": len(fresh),
        "trained_on": len(trained_on & set(ids)),
        "left_out": dict(split.pairs.losses),
        "prompt_tokens": float(lengths[:, 0].mean()),
        "response_tokens": float(lengths[:, 1:].mean()),
    }
    log.info("%s: %d of %d pairs, %d prompts", name, len(pairs), len(fresh), prompts)
    _tell(split.pairs.losses)
    return Evaluated(name, pairs, prompts == 1, about)


def _tell(losses: Mapping[str, int]) -> None:
    for cause, count in losses.items():
        log.info("  %d %s", count, cause)
