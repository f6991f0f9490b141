"""How the tokens of several pairs lie in one forward pass.

Shared: one row, each prompt once, its two responses branching off it; attention goes by segments.
Padded: two rows a pair, filled up on the right, for models whose attention cannot be told of
segments. Attention is causal there, so no token sees the padding behind it and no mask is needed.
What lies where is known to this package, `models/segments.py` and its kernels, and `scoring.py`;
others only pass a `Layout` on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mallowspo_cli.data.table import TokenizedPair
from mallowspo_cli.models.attention import NAME
from mallowspo_cli.models.segments import Segments


class Layout(Enum):
    """How pairs lie."""

    shared = "shared"
    padded = "padded"

    @classmethod
    def of(cls, attention: str) -> "Layout":
        """The layout that an attention implementation takes."""
        return cls.shared if attention == NAME else cls.padded


@dataclass(frozen=True, slots=True, eq=False)
class PairBatch:
    """B pairs of N response tokens, in a row of T tokens, or in R = 2 B padded rows of T."""

    pair_ids: list[str]
    input_ids: Tensor
    """(1, T) int64; padded: (R, T), row 2 i the chosen response of pair i, 2 i + 1 the rejected."""
    position_ids: Tensor | None
    """(1, T) int64: where each token would be if its response were alone; None in the padded
    layout, where it is its column."""
    segments: Segments | None
    """What each token sees; None in the padded layout."""
    source_index: Tensor
    """(N,) flat place in `input_ids` at which each response token is predicted."""
    target_ids: Tensor
    """(N,) the response tokens."""
    response_index: Tensor
    """(N,) which response each belongs to: 2 i chosen, 2 i + 1 rejected of pair i."""
    response_tokens: Tensor
    """(2 B,) int64: response tokens of each."""

    def to(self, device: torch.device) -> "PairBatch":
        """The same pack on another device."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        segments = None if self.segments is None else self.segments.to(device)
        return replace(self, segments=segments, **moved)


def collate(
    pairs: Sequence[TokenizedPair], layout: Layout = Layout.shared, pad_id: int = 0
) -> PairBatch:
    """Lay pairs out as a pack. Which token pads does not matter: nothing sees it."""
    if not pairs:
        raise ValueError("a pack of no pairs")
    responses = [response for pair in pairs for response in (pair.chosen, pair.rejected)]
    counts = torch.tensor([len(response) for response in responses])
    rows, positions, sources = (
        _in_a_row(pairs) if layout is Layout.shared else _in_rows(pairs, pad_id)
    )
    lengths = [(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs]
    return PairBatch(
        pair_ids=[pair.pair_id for pair in pairs],
        input_ids=torch.as_tensor(rows),
        position_ids=None if positions is None else torch.as_tensor(positions),
        segments=Segments.of(lengths) if layout is Layout.shared else None,
        source_index=torch.as_tensor(np.concatenate(sources)),
        target_ids=torch.as_tensor(np.concatenate(responses).astype(np.int64)),
        response_index=torch.repeat_interleave(torch.arange(len(responses)), counts),
        response_tokens=counts,
    )


Laid = tuple[NDArray[np.int64], NDArray[np.int64] | None, list[NDArray[np.int64]]]
"""Tokens, positions unless they are columns, and the flat places that predict each response."""


def _in_a_row(pairs: Sequence[TokenizedPair]) -> Laid:
    tokens: list[NDArray[np.int32]] = []
    positions: list[NDArray[np.int64]] = []
    sources: list[NDArray[np.int64]] = []
    start = 0
    for pair in pairs:
        prompt, chosen, rejected = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        tokens += [pair.prompt, pair.chosen, pair.rejected]
        positions += [np.arange(prompt + chosen), np.arange(prompt, prompt + rejected)]
        # The last prompt token predicts the first token of both responses.
        last, branch = start + prompt - 1, start + prompt + chosen
        sources.append(np.arange(last, last + chosen))
        sources.append(np.concatenate([[last], np.arange(branch, branch + rejected - 1)]))
        start = branch + rejected
    return (
        np.concatenate(tokens).astype(np.int64)[None],
        np.concatenate(positions)[None],
        sources,
    )


def _in_rows(pairs: Sequence[TokenizedPair], pad_id: int) -> Laid:
    rows = [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    tokens = np.full((len(rows), width), pad_id, dtype=np.int64)
    sources: list[NDArray[np.int64]] = []
    for index, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        tokens[index, : len(prompt)] = prompt
        tokens[index, len(prompt) : end] = response
        sources.append(index * width + np.arange(len(prompt) - 1, end - 1))
    return tokens, None, sources
