"""How the tokens of several pairs lie in one forward pass.

Two rows a pair, padded on the right to the longest row of the pack. Attention is causal, so no
token sees the padding behind it and no mask is needed. Only this package and `scoring.py` know the
layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from mallowspo_cli.data.tokenize import TokenizedPair


@dataclass(frozen=True, slots=True)
class PairBatch:
    """B pairs of N response tokens in R = 2 B rows of T tokens.

    Row 2 i is the chosen response of pair i, row 2 i + 1 the rejected one.
    """

    pair_ids: list[str]
    input_ids: Tensor
    """(R, T) int64, padded on the right."""
    position_ids: Tensor
    """(R, T) int64."""
    source_index: Tensor
    """(N,) flat position (row * T + column) at which each response token is predicted."""
    target_ids: Tensor
    """(N,) the response tokens."""
    response_index: Tensor
    """(N,) which response each belongs to: 2 i chosen, 2 i + 1 rejected of pair i."""

    def to(self, device: torch.device) -> "PairBatch":
        """The same pack on another device."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return PairBatch(pair_ids=self.pair_ids, **moved)


def collate(pairs: Sequence[TokenizedPair], pad_id: int = 0) -> PairBatch:
    """Lay pairs out as a pack. Which token pads does not matter: nothing sees it."""
    rows = [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    sources: list[np.ndarray] = []
    for index, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        input_ids[index, : len(prompt)] = prompt
        input_ids[index, len(prompt) : end] = response
        # The first response token is predicted from the last prompt token.
        sources.append(index * width + np.arange(len(prompt) - 1, end - 1))
    counts = torch.tensor([len(response) for _, response in rows])
    return PairBatch(
        pair_ids=[pair.pair_id for pair in pairs],
        input_ids=torch.as_tensor(input_ids),
        position_ids=torch.arange(width).expand(len(rows), width),
        source_index=torch.as_tensor(np.concatenate(sources)),
        target_ids=torch.as_tensor(np.concatenate([r for _, r in rows]).astype(np.int64)),
        response_index=torch.repeat_interleave(torch.arange(len(rows)), counts),
    )
