"""Data sets of `mallowspo experiment out-of-distribution`: by name, and ready to be scored."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.commands.ood_overlap import EARLIER, Known, same_data
from mallowspo_cli.data.dataset import has_split
from mallowspo_cli.data.prepare import PreparedSplit, prepare_split
from mallowspo_cli.data.table import TokenizedPairs, pairs_digest
from mallowspo_cli.distributed import log
from mallowspo_cli.errors import CheckpointError, DataError, RecipeError
from mallowspo_cli.experiments.rated_files import (
    DOCUMENT,
    NAMES,
    PREFIX,
    rated_path,
    write_rated,
)
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
    documents: list[str] | None
    """What each pair of a rated corpus is resampled with; None: its prompt, or itself where all
    share one."""
    about: dict[str, object]
    """For the report: how much there is, what was left out."""

    @property
    def digest(self) -> str:
        """Names the pairs."""
        return pairs_digest(self.pairs.pair_ids)


@dataclass(frozen=True)
class DataSets:
    """What is trained on, and what is evaluated on."""

    train: TokenizedPairs
    held_out: TokenizedPairs
    """All pairs that the training data holds out."""
    evaluated: list[Evaluated]
    """The held-out pairs that are scored, then the targets'."""

    def check(self, run: Path, recipe: Recipe) -> None:
        """Make sure that a finished run was trained on this data.

        A finished run is not trained again, so it would be scored on pairs that it has seen.

        Raises:
            CheckpointError: it was trained on other data.
        """
        found = json.loads((run / "data.json").read_text())
        now = {"held_out_digest": pairs_digest(self.held_out.pair_ids)}
        if recipe.dispersion.keep is None:
            # Else a part of the training pairs, which is not known here.
            now["train_digest"] = pairs_digest(self.train.pair_ids)
        changed = [key for key, digest in now.items() if found.get(key) != digest]
        if changed:
            raise CheckpointError(
                f"{run} was trained on other data: {', '.join(changed)} changed since (data.json). "
                "Put the data back, or start anew (to=DIR)."
            )


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
    place = rated_path(name, sizes.train_pairs, sizes.max_chars)
    return [
        *("dataset=local", f"dataset.path={json.dumps(str(place))}", "dataset.format=scored"),
        "dataset.eval_split=eval",
    ]


def target_config(name: str, sizes: Sizes) -> DatasetConfig:
    """A data set that nothing is trained on; a rated corpus is written where it is not there."""
    if name.startswith(PREFIX):
        place = write_rated(name, 0, sizes.max_chars)
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
) -> DataSets:
    """The recipe's data set, under the name `inside`, and the targets.

    Raises:
        DataError: data that cannot be read, without held-out pairs, or all of it trained on.
        RecipeError: a target that is the recipe's data set, or another target.
    """
    config, column = recipe.dataset, recipe.dispersion.column
    held_out = prepare_split(config, "eval", tokenizer, _document(inside) or column)
    if held_out is None:
        raise DataError(
            f"{inside} has no held-out pairs. Name a split (dataset.eval_split=NAME), or take some "
            "out (dataset.eval_size=100)."
        )
    train = prepare_split(config, "train", tokenizer, column)
    assert train is not None
    known = Known.of(train.pairs, held_out.pairs)
    found = [_evaluated(inside, held_out, known.causes(held_out.pairs, True), sizes.limit)]
    taken: dict[str, DatasetConfig] = {}
    scored: set[str] = set()
    for name in targets:
        # The user's word on broken rows holds for all data.
        target = replace(target_config(name, sizes), on_error=config.on_error)
        _check_new(name, target, config, taken)
        taken[name] = target
        split = "eval" if has_split(target, "eval") else "train"
        ready = prepare_split(target, split, tokenizer, _document(name))
        assert ready is not None
        causes = [
            EARLIER if cause is None and pair in scored else cause
            for pair, cause in zip(
                ready.pairs.pair_ids, known.causes(ready.pairs, False), strict=True
            )
        ]
        found.append(_evaluated(name, ready, causes, sizes.limit))
        scored.update(found[-1].pairs.pair_ids)
    return DataSets(train.pairs, held_out.pairs, found)


def _check_new(
    name: str, target: DatasetConfig, trained_on: DatasetConfig, taken: Mapping[str, DatasetConfig]
) -> None:
    """Refuse a target that is what is trained on, or one of the targets before it."""
    if same_data(target, trained_on):
        raise RecipeError(
            f"{name} is what is trained on, or a part of it. Name other data sets in targets=."
        )
    for other, before in taken.items():
        if same_data(target, before):
            raise RecipeError(
                f"targets: {other} and {name} are the same data, or one is a part of the other. "
                "Name one of them."
            )


def _document(name: str) -> str | None:
    """The column with the number of a pair's document, where the data set has one."""
    return DOCUMENT if name.startswith(PREFIX) else None


def _words(name: str) -> list[str]:
    place = Path(name).expanduser()
    if not place.exists():
        return [f"dataset={name}"]
    words = ["dataset=local", f"dataset.path={json.dumps(str(place.resolve()))}"]
    return [*words, *(["dataset.eval_split=eval"] if _has_eval(place) else [])]


def _has_eval(place: Path) -> bool:
    return place.is_dir() and any(place.glob("eval.*"))


def _evaluated(
    name: str, split: PreparedSplit, causes: Sequence[str | None], limit: int
) -> Evaluated:
    """At most `limit` pairs, drawn from all that have no cause to be left out."""
    ids = split.pairs.pair_ids
    # A pair that is there twice has one row in the reference store, and counts once.
    first = {pair: index for index, pair in reversed(list(enumerate(ids)))}
    known = Counter(cause for index in first.values() if (cause := causes[index]) is not None)
    told = "; ".join(f"{count} {cause}" for cause, count in sorted(known.items()))
    fresh = np.asarray(sorted(i for i in first.values() if causes[i] is None), np.int64)
    if len(fresh) == 0:
        raise DataError(
            f"{name}: none of its {len(ids)} pairs can be scored: {told}. Pairs of a training "
            "prompt are not new, unless all training pairs have one prompt. Name another data set, "
            "or hold out pairs of other prompts."
        )
    drawn = np.random.default_rng(DRAW_SEED).permutation(len(fresh))[:limit]
    pairs = split.pairs.take(fresh[np.sort(drawn)])
    prompts = len(set(pairs.values("prompt_key").tolist()))
    documents = None
    if _document(name) is not None:
        documents = [f"{number:.0f}" for number in pairs.values("column").tolist()]
    lengths = pairs.lengths
    about: dict[str, object] = {
        "pairs": len(pairs),
        "prompts": prompts,
        "documents": None if documents is None else len(set(documents)),
        "of": len(fresh),
        "known": dict(sorted(known.items())),
        "left_out": dict(split.pairs.losses),
        "prompt_tokens": float(lengths[:, 0].mean()),
        "response_tokens": float(lengths[:, 1:].mean()),
    }
    log.info("%s: %d of %d pairs, %d prompts", name, len(pairs), len(fresh), prompts)
    if told:
        log.info("  not scored: %s", told)
    for cause, count in split.pairs.losses.items():
        log.info("  %d %s", count, cause)
    return Evaluated(name, pairs, documents, about)
