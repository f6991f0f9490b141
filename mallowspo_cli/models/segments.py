"""Which tokens of a pack see which: the prompt lies there once, and both responses branch off it.

A pair takes P + C + R places in a row: prompt, chosen, rejected. Two segments of queries: the
first, prompt and chosen, is an ordinary causal sequence; the second, rejected, sees the prompt and
itself. Its position ids go on from the prompt's, so that every token is where it would be alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """The segments of B pairs in a row of T tokens."""

    lengths: tuple[tuple[int, int, int], ...]
    """Tokens of prompt, chosen and rejected of each pair, in the row's order."""
    query_starts: Tensor
    """(2 B + 1,) int32: where each segment of queries begins, and T."""
    key_starts: Tensor
    """(2 B + 1,) int32: where its keys begin in `key_index`, and their number."""
    key_index: Tensor
    """(T + sum P,) int64: the token of each key; a segment's keys lie in a row."""
    own_keys: Tensor
    """(T,) int64: the place in `key_index` of each token as a key of its own segment."""
    prompt_keys: Tensor
    """(sum P,) int64: the places in `key_index` of prompt tokens as keys of a rejected response."""
    prompts: Tensor
    """(sum P,) int64: the tokens at `prompt_keys`."""
    made: dict[Any, Any] = field(default_factory=dict)
    """Masks that kernels made for this pack, since every layer asks for the same."""

    @classmethod
    def of(cls, lengths: Sequence[tuple[int, int, int]]) -> "Segments":
        """The segments of pairs of these lengths."""
        keys: list[NDArray[np.int64]] = []
        own: list[NDArray[np.int64]] = []
        prompt_keys: list[NDArray[np.int64]] = []
        prompts: list[NDArray[np.int64]] = []
        query_starts, key_starts = [0], [0]
        token = key = 0
        for prompt, chosen, rejected in lengths:
            first = prompt + chosen
            keys += [
                np.arange(token, token + first),
                np.arange(token, token + prompt),
                np.arange(token + first, token + first + rejected),
            ]
            second = key + first
            own += [np.arange(key, second), np.arange(second + prompt, second + prompt + rejected)]
            prompt_keys.append(np.arange(second, second + prompt))
            prompts.append(np.arange(token, token + prompt))
            query_starts += [token + first, token + first + rejected]
            key_starts += [second, second + prompt + rejected]
            token, key = query_starts[-1], key_starts[-1]
        return cls(
            lengths=tuple(lengths),
            query_starts=torch.tensor(query_starts, dtype=torch.int32),
            key_starts=torch.tensor(key_starts, dtype=torch.int32),
            key_index=torch.from_numpy(np.concatenate(keys)),
            own_keys=torch.from_numpy(np.concatenate(own)),
            prompt_keys=torch.from_numpy(np.concatenate(prompt_keys)),
            prompts=torch.from_numpy(np.concatenate(prompts)),
        )

    def to(self, device: torch.device) -> "Segments":
        """The same segments on another device."""

        def moved(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=True)

        return Segments(
            lengths=self.lengths,
            query_starts=moved(self.query_starts),
            key_starts=moved(self.key_starts),
            key_index=moved(self.key_index),
            own_keys=moved(self.own_keys),
            prompt_keys=moved(self.prompt_keys),
            prompts=moved(self.prompts),
        )

    @property
    def queries(self) -> list[int]:
        """Queries of each segment."""
        return [n for prompt, chosen, rejected in self.lengths for n in (prompt + chosen, rejected)]

    @property
    def longest(self) -> tuple[int, int]:
        """Most queries and most keys of a segment."""
        keys = [prompt + max(chosen, rejected) for prompt, chosen, rejected in self.lengths]
        return max(self.queries), max(keys)

    def made_once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was first asked for under `key`."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def sees(self, window: int | None = None) -> Callable[..., Tensor]:
        """Whether query i sees key j, as a function of index tensors (batch, head, i, j).

        With a window, a query sees itself and the window - 1 positions before it.
        """
        columns = self.made_once("columns", self._columns)
        pair, branch, position = columns

        def visible(_batch: Any, _head: Any, query: Tensor, key: Tensor) -> Tensor:
            same = (pair[query] == pair[key]) & (query >= key)
            same = same & ~((branch[query] == 2) & (branch[key] == 1))
            if window is not None:
                same = same & (position[query] - position[key] < window)
            return same

        return visible

    def _columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token: its pair, 0 prompt or 1 chosen or 2 rejected, its position."""
        pair, branch, position = [], [], []
        for index, (prompt, chosen, rejected) in enumerate(self.lengths):
            pair.append(np.full(prompt + chosen + rejected, index))
            branch.append(np.repeat([0, 1, 2], [prompt, chosen, rejected]))
            position += [np.arange(prompt + chosen), np.arange(prompt, prompt + rejected)]
        device = self.key_index.device
        pair, branch, position = (
            torch.from_numpy(np.concatenate(column)).to(device)
            for column in (pair, branch, position)
        )
        return pair, branch, position
