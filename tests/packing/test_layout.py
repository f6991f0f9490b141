"""Layout: each response token is predicted from the token before it in its own sequence."""

import itertools
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mallowspo_cli.data.tokenize import TokenizedPair
from mallowspo_cli.models.attention import NAME
from mallowspo_cli.packing.layout import Layout, PairBatch, collate

PAD = 99


def tokenized(
    name: str, prompt: list[int], chosen: list[int], rejected: list[int]
) -> TokenizedPair:
    return TokenizedPair(
        name, *(np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected))
    )


IDS = st.lists(st.integers(0, 50), min_size=1, max_size=6)
PAIRS = st.lists(st.builds(tokenized, st.text(max_size=3), IDS, IDS, IDS), min_size=1, max_size=5)
TWO_PAIRS = [tokenized("a", [1, 2], [3, 4], [5]), tokenized("b", [6], [7], [8, 9, 10])]


def sequences(batch: PairBatch) -> list[list[int]]:
    """Flat places of the tokens of each response's sequence, prompt first: 2 i chosen, 2 i + 1
    rejected of pair i."""
    if batch.segments is None:
        width = batch.input_ids.shape[1]
        counts = torch.bincount(batch.response_index)
        ends = batch.source_index[counts.cumsum(0) - 1] + 2
        return [list(range(row * width, end)) for row, end in enumerate(ends.tolist())]
    starts = batch.segments.key_starts.tolist()
    keys = batch.segments.key_index.tolist()
    return [keys[start:end] for start, end in itertools.pairwise(starts)]


def test_two_pairs_lie_as_in_this_picture() -> None:
    batch = collate(TWO_PAIRS)
    assert batch.pair_ids == ["a", "b"]
    #                                  prompt chosen rejected
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2, 3]]
    assert batch.target_ids.tolist() == [3, 4, 5, 7, 8, 9, 10]
    assert batch.source_index.tolist() == [1, 2, 1, 5, 5, 7, 8]
    assert batch.response_index.tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert batch.segments is not None
    assert batch.segments.lengths == ((2, 2, 1), (1, 1, 3))


def test_two_padded_pairs_lie_as_in_this_picture() -> None:
    batch = collate(TWO_PAIRS, Layout.padded, PAD)
    assert batch.pair_ids == ["a", "b"]
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 4],
        [1, 2, 5, PAD],
        [6, 7, PAD, PAD],
        [6, 8, 9, 10],
    ]
    assert batch.position_ids is None
    assert batch.target_ids.tolist() == [3, 4, 5, 7, 8, 9, 10]
    assert batch.source_index.tolist() == [1, 2, 5, 8, 12, 13, 14]
    assert batch.response_index.tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert batch.segments is None


@pytest.mark.parametrize("layout", Layout)
@given(pairs=PAIRS)
def test_each_target_is_the_token_behind_its_source_in_the_sequence_of_its_response(
    layout: Layout, pairs: list[TokenizedPair]
) -> None:
    batch = collate(pairs, layout, PAD)
    places, flat = sequences(batch), batch.input_ids.flatten()
    columns = (batch.source_index, batch.target_ids, batch.response_index)
    for source, target, response in zip(*(c.tolist() for c in columns), strict=True):
        sequence = places[response]
        assert flat[sequence[sequence.index(source) + 1]] == target


@pytest.mark.parametrize("layout", Layout)
@given(pairs=PAIRS)
def test_responses_and_prompts_can_be_read_back(layout: Layout, pairs: list[TokenizedPair]) -> None:
    batch = collate(pairs, layout, PAD)
    assert batch.pair_ids == [pair.pair_id for pair in pairs]
    places, flat = sequences(batch), batch.input_ids.flatten()
    for index, pair in enumerate(pairs):
        for row, response in ((2 * index, pair.chosen), (2 * index + 1, pair.rejected)):
            targets = batch.target_ids[batch.response_index == row]
            assert targets.tolist() == response.tolist()
            assert flat[places[row]].tolist() == [*pair.prompt, *response]


@given(pairs=PAIRS)
def test_each_token_is_at_the_position_that_it_has_in_its_sequence_alone(
    pairs: list[TokenizedPair],
) -> None:
    batch = collate(pairs)
    assert batch.position_ids.shape == batch.input_ids.shape
    for places in sequences(batch):
        assert batch.position_ids.flatten()[places].tolist() == list(range(len(places)))


@given(PAIRS)
def test_the_first_tokens_of_both_responses_are_predicted_from_the_last_prompt_token(
    pairs: list[TokenizedPair],
) -> None:
    batch = collate(pairs)
    start = 0
    for index, pair in enumerate(pairs):
        for row in (2 * index, 2 * index + 1):
            sources = batch.source_index[batch.response_index == row]
            assert sources[0] == start + len(pair.prompt) - 1
        start += len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


@given(PAIRS)
def test_a_shared_pack_holds_each_prompt_once_and_nothing_else(pairs: list[TokenizedPair]) -> None:
    tokens = [id_ for p in pairs for ids in (p.prompt, p.chosen, p.rejected) for id_ in ids]
    assert collate(pairs).input_ids.tolist() == [tokens]


@given(PAIRS)
def test_a_padded_pack_is_as_wide_as_its_longest_row(pairs: list[TokenizedPair]) -> None:
    longest = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
    batch = collate(pairs, Layout.padded)
    assert batch.input_ids.shape == (2 * len(pairs), longest)


@given(PAIRS)
def test_what_fills_a_padded_row_up_is_the_padding_behind_it(pairs: list[TokenizedPair]) -> None:
    batch = collate(pairs, Layout.padded, PAD)
    for row, places in enumerate(sequences(batch)):
        assert set(batch.input_ids[row, len(places) :].tolist()) <= {PAD}


@pytest.mark.parametrize("layout", Layout)
def test_indices_are_int64_as_embeddings_take_them(layout: Layout) -> None:
    batch = collate(TWO_PAIRS, layout)
    tensors = [getattr(batch, field.name) for field in fields(batch)]
    assert {t.dtype for t in tensors if isinstance(t, Tensor)} == {torch.int64}


@pytest.mark.parametrize("layout", Layout)
def test_moving_a_pack_moves_every_tensor_and_keeps_the_ids(layout: Layout) -> None:
    batch = collate(TWO_PAIRS, layout)
    moved = batch.to(torch.device("meta"))
    assert moved.pair_ids == ["a", "b"]
    places = [(batch, moved)]
    if layout is Layout.shared:
        assert moved.segments.lengths == batch.segments.lengths
        places.append((batch.segments, moved.segments))
    seen = 0
    for one, other in places:
        for field in fields(one):
            before, after = getattr(one, field.name), getattr(other, field.name)
            if isinstance(before, Tensor):
                seen += 1
                assert (after.device.type, after.shape) == ("meta", before.shape)
                assert before.device.type == "cpu"
    assert seen == {Layout.shared: 12, Layout.padded: 5}[layout]


def test_a_layout_is_that_of_the_attention() -> None:
    assert Layout.of(NAME) is Layout.shared
    assert {Layout.of(name) for name in ("sdpa", "eager", "flash_attention_2")} == {Layout.padded}


@pytest.mark.parametrize("layout", Layout)
def test_an_empty_pack_is_our_own_mistake(layout: Layout) -> None:
    with pytest.raises(ValueError, match="a pack of no pairs"):
        collate([], layout)
