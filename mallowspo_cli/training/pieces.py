"""State that many processes write, a file each, and any number of them reads.

A tensor is a range of numbers. Whoever holds a piece of one (ZeRO-3's partition, FSDP's rows, or a
share of a tensor that all hold) writes it with the place where it begins, so a reader needs to know
nothing of how many wrote, or by which engine: it asks for the range that it holds itself.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHT = "weight"
"""The kind of a parameter itself; other kinds are keys of the optimizer's state."""


@dataclass(frozen=True)
class Piece:
    """A range of one tensor."""

    kind: str
    """`weight`, or a key of the optimizer's state."""
    name: str
    """The parameter's name in the scorer."""
    start: int
    """Where the range begins in the flat tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    values: Tensor
    """(n,) its elements."""


def write_pieces(path: Path, pieces: Iterable[Piece]) -> None:
    """Write one process's pieces: a safetensors file with their places in its header."""
    tensors: dict[str, Tensor] = {}
    places: dict[str, list[object]] = {}
    for piece in pieces:
        key = f"{piece.kind}/{piece.name}"
        # A copy of its own: ranges of one buffer may not share memory in a file.
        tensors[key] = torch.empty_like(piece.values, device="cpu").copy_(piece.values.detach())
        places[key] = [piece.start, list(piece.shape)]
    save_file(tensors, path, metadata={"places": json.dumps(places)})


class Pieces:
    """The files of all processes, as whole tensors of which any range can be read."""

    def __init__(self, files: Sequence[Path]):
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        """Shape of each tensor, by kind and name."""
        self._ranges: dict[tuple[str, str], list[tuple[int, Path]]] = defaultdict(list)
        for path in files:
            with safe_open(path, framework="pt") as file:
                places = json.loads((file.metadata() or {})["places"])
                for key, (start, shape) in places.items():
                    kind, _, name = key.partition("/")
                    self.shapes[kind, name] = tuple(shape)
                    self._ranges[kind, name].append((start, path))
        for ranges in self._ranges.values():
            ranges.sort()

    def names(self, kind: str) -> set[str]:
        """Names that have a tensor of this kind."""
        return {name for found, name in self.shapes if found == kind}

    def kinds(self, name: str) -> set[str]:
        """Kinds of a name, but for the weight itself."""
        return {kind for kind, found in self.shapes if found == name} - {WEIGHT}

    def read(self, kind: str, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """(count,) elements from `start` on; to the end without a count.

        Raises:
            ValueError: the files do not hold them all.
        """
        total = prod(self.shapes[kind, name])
        stop = total if count is None else start + count
        found, at = [], start
        ranges = self._ranges[kind, name]
        for index, (begin, path) in enumerate(ranges):
            end = ranges[index + 1][0] if index + 1 < len(ranges) else total
            if end <= at or begin >= stop:
                continue
            with safe_open(path, framework="pt") as file:
                part = file.get_slice(f"{kind}/{name}")[at - begin : min(end, stop) - begin]
            if begin > at or len(part) != min(end, stop) - at:
                break
            found.append(part)
            at += len(part)
        if at != stop:
            raise ValueError(f"elements {at} to {stop} of {kind} of {name} are missing")
        if len(found) == 1:
            return found[0]
        return torch.cat(found) if found else torch.empty(0)
