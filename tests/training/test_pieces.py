"""Any number of processes reads what any number has written."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mallowspo_cli.training.pieces import WEIGHT, Piece, Pieces, write_pieces


def written(place: Path, values: torch.Tensor, cuts: list[int]) -> Pieces:
    """A tensor in ranges that begin at `cuts`, one to a file."""
    flat, files = values.flatten(), []
    bounds = [*sorted({0, *cuts}), flat.numel()]
    for index, (start, stop) in enumerate(pairwise(bounds)):
        files.append(place / f"{len(list(place.iterdir()))}_{index}.safetensors")
        piece = Piece(WEIGHT, "a.weight", start, tuple(values.shape), flat[start:stop])
        write_pieces(files[-1], [piece])
    # In no order.
    return Pieces(files[::-1])


@given(data=st.data())
def test_any_range_comes_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 7)))
    total = shape[0] * shape[1]
    cuts = data.draw(st.lists(st.integers(1, max(total - 1, 1)).filter(lambda c: c < total)))
    values = torch.arange(float(total)).view(shape)
    pieces = written(tmp_path_factory.mktemp("pieces"), values, cuts)
    assert pieces.shapes == {(WEIGHT, "a.weight"): shape}
    start = data.draw(st.integers(0, total))
    count = data.draw(st.integers(0, total - start))
    found = pieces.read(WEIGHT, "a.weight", start, count)
    assert torch.equal(found, values.flatten()[start : start + count])
    assert torch.equal(pieces.read(WEIGHT, "a.weight").view(shape), values)


def test_a_range_that_nobody_wrote_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "second_half.safetensors"
    write_pieces(path, [Piece(WEIGHT, "a", 4, (8,), torch.ones(4))])
    with pytest.raises(ValueError, match=r"elements 0 to 8 of weight of a are missing"):
        Pieces([path]).read(WEIGHT, "a")
    assert torch.equal(Pieces([path]).read(WEIGHT, "a", 5, 2), torch.ones(2))


def test_kinds_and_types_are_kept(tmp_path: Path) -> None:
    path, buffer = tmp_path / "one.safetensors", torch.arange(6.0)
    state = torch.arange(3, dtype=torch.uint8)
    write_pieces(
        path,
        [
            # Two ranges of one buffer.
            Piece(WEIGHT, "a", 0, (3,), buffer[:3]),
            Piece("exp_avg", "a", 0, (3,), buffer[3:]),
            Piece("state1", "b", 0, (3,), state),
        ],
    )
    pieces = Pieces([path])
    assert pieces.names(WEIGHT) == {"a"}
    assert pieces.kinds("a") == {"exp_avg"}
    assert torch.equal(pieces.read("exp_avg", "a"), buffer[3:])
    assert torch.equal(pieces.read("state1", "b"), state)
