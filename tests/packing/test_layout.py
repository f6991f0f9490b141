"""Layout: each response token is predicted from the position before it, in its own row."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mallowspo_cli.data.tokenize import TokenizedPair
from mallowspo_cli.packing.layout import collate

PAD = 99


def tokenized(
    name: str, prompt: list[int], chosen: list[int], rejected: list[int]
) -> TokenizedPair:
    return TokenizedPair(
        name, *(np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected))
    )


IDS = st.lists(st.integers(0, 50), min_size=1, max_size=6)
PAIRS = st.lists(st.builds(tokenized, st.text(max_size=3), IDS, IDS, IDS), min_size=1, max_size=5)


def test_two_pairs_lie_as_in_this_picture() -> None:
    batch = collate(
        [tokenized("a", [1, 2], [3, 4], [5]), tokenized("b", [6], [7], [8, 9, 10])], pad_id=PAD
    )
    assert batch.pair_ids == ["a", "b"]
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 4],
        [1, 2, 5, PAD],
        [6, 7, PAD, PAD],
        [6, 8, 9, 10],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 4
    assert batch.target_ids.tolist() == [3, 4, 5, 7, 8, 9, 10]
    assert batch.source_index.tolist() == [1, 2, 5, 8, 12, 13, 14]
    assert batch.response_index.tolist() == [0, 0, 1, 2, 3, 3, 3]


@given(PAIRS)
def test_each_target_is_the_token_behind_its_source_in_the_row_of_its_response(
    pairs: list[TokenizedPair],
) -> None:
    batch = collate(pairs, pad_id=PAD)
    width = batch.input_ids.shape[1]
    row, column = batch.source_index // width, batch.source_index % width
    assert torch.equal(row, batch.response_index)
    assert (column + 1 < width).all()
    assert torch.equal(batch.input_ids[row, column + 1], batch.target_ids)


@given(PAIRS)
def test_responses_and_prompts_can_be_read_back(pairs: list[TokenizedPair]) -> None:
    batch = collate(pairs, pad_id=PAD)
    for index, pair in enumerate(pairs):
        for row, response in ((2 * index, pair.chosen), (2 * index + 1, pair.rejected)):
            targets = batch.target_ids[batch.response_index == row]
            assert targets.tolist() == response.tolist()
            line = batch.input_ids[row].tolist()
            filled = len(pair.prompt) + len(response)
            assert line[:filled] == [*pair.prompt, *response]
            assert set(line[filled:]) <= {PAD}


@given(PAIRS)
def test_the_pack_is_as_wide_as_its_longest_row(pairs: list[TokenizedPair]) -> None:
    longest = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
    batch = collate(pairs)
    assert batch.input_ids.shape == batch.position_ids.shape == (2 * len(pairs), longest)


def test_indices_are_int64_as_embeddings_take_them() -> None:
    batch = collate([tokenized("a", [1, 2], [3, 4], [5])])
    tensors = [getattr(batch, field.name) for field in fields(batch)]
    assert {t.dtype for t in tensors if isinstance(t, Tensor)} == {torch.int64}


def test_moving_a_pack_moves_every_tensor_and_keeps_the_ids() -> None:
    batch = collate([tokenized("a", [1, 2], [3, 4], [5])])
    moved = batch.to(torch.device("meta"))
    assert moved.pair_ids == ["a"]
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, Tensor):
            assert (after.device.type, after.shape) == ("meta", before.shape)


def test_an_empty_pack_is_our_own_mistake() -> None:
    with pytest.raises(ValueError):
        collate([])
