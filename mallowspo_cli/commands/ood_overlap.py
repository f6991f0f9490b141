"""What `mallowspo experiment out-of-distribution` trains on, kept out of what it evaluates on."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mallowspo_cli.data.table import TokenizedPairs
from mallowspo_cli.recipe.schema import DatasetConfig, PartConfig

Responses = frozenset[bytes]
"""The tokens of both responses of a pair, in any order."""

TRAINED_PAIR = "training pairs"
TRAINED_RESPONSES = "the responses of training pairs"
TRAINED_PROMPT = "of training prompts"
HELD_OUT = "held-out pairs of the training data"
EARLIER = "pairs that an earlier target has"


@dataclass(frozen=True)
class Known:
    """By what pairs that a run has to do with are found in other data."""

    pairs: frozenset[str]
    """Ids of the training pairs."""
    prompts: frozenset[int]
    """Keys of their prompts; empty where all share one, which tells nothing of a pair."""
    responses: frozenset[Responses]
    """Their responses where all share a prompt; else the prompts tell."""
    held_out: frozenset[str]
    """Ids of pairs that the training data holds out."""

    @classmethod
    def of(cls, train: TokenizedPairs, held_out: TokenizedPairs) -> "Known":
        """What is known of a data set's two splits."""
        prompts = frozenset(train.values("prompt_key").tolist())
        pairs, ours = frozenset(train.pair_ids), frozenset(held_out.pair_ids)
        if len(prompts) > 1:
            return cls(pairs, prompts, frozenset(), ours)
        return cls(pairs, frozenset(), frozenset(_responses(train)), ours)

    def causes(self, pairs: TokenizedPairs, inside: bool) -> list[str | None]:
        """Why each of N pairs is not to be scored; None where nothing speaks against it.

        Args:
            inside: whether they are the training data's own held-out pairs.
        """
        found: list[str | None] = [None] * len(pairs)
        # The most telling cause is written last.
        if not inside:
            _mark(found, (pair in self.held_out for pair in pairs.pair_ids), HELD_OUT)
        if self.prompts:
            keys = pairs.values("prompt_key").tolist()
            _mark(found, (key in self.prompts for key in keys), TRAINED_PROMPT)
        else:
            known = (each in self.responses for each in _responses(pairs))
            _mark(found, known, TRAINED_RESPONSES)
        _mark(found, (pair in self.pairs for pair in pairs.pair_ids), TRAINED_PAIR)
        return found


def same_data(one: DatasetConfig, other: DatasetConfig) -> bool:
    """Whether a source of one is a source of the other, or a part of it, or holds it."""
    return any(
        path == place and all(None in (a, b) or a == b for a, b in zip(parts, others, strict=True))
        for path, *parts in _sources(one)
        for place, *others in _sources(other)
    )


def _sources(config: DatasetConfig) -> list[tuple[str | None, str | None, str | None]]:
    """(path, subset, directory) of each part; null where a source is taken whole."""
    parts = list(config.parts.values()) or [PartConfig(path=str(config.path))]
    return [
        (
            _resolved(part.path),
            part.subset or config.subset,
            part.data_dir or config.data_dir,
        )
        for part in parts
    ]


def _resolved(path: str) -> str:
    place = Path(path).expanduser()
    return str(place.resolve()) if place.exists() else path


def _responses(pairs: TokenizedPairs) -> list[Responses]:
    return [
        frozenset(np.asarray(side, "<i4").tobytes() for side in (pair.chosen, pair.rejected))
        for pair in pairs
    ]


def _mark(found: list[str | None], known: Iterable[bool], cause: str) -> None:
    for index, hit in enumerate(known):
        if hit:
            found[index] = cause
