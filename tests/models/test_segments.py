"""Segments: who sees whom, and where the keys of each segment lie."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mallowspo_cli.models.segments import Segments

Lengths = list[tuple[int, int, int]]
PART = st.integers(1, 5)
LENGTHS = st.lists(st.tuples(PART, PART, PART), min_size=1, max_size=4)


def tokens(lengths: Lengths) -> list[tuple[int, str, int]]:
    """Of each token of the row: its pair, its part, its position in its response's sequence."""
    return [
        (pair, part, start + place)
        for pair, (prompt, chosen, rejected) in enumerate(lengths)
        for part, start, count in (
            ("prompt", 0, prompt),
            ("chosen", prompt, chosen),
            ("rejected", prompt, rejected),
        )
        for place in range(count)
    ]


def sees(query: tuple[int, str, int], key: tuple[int, str, int], window: int | None = None) -> bool:
    """By hand: a token sees what comes before it, and itself, where its response is alone."""
    (pair, part, position), (other, other_part, other_position) = query, key
    if pair != other or other_part not in ("prompt", part):
        return False
    distance = position - other_position
    return distance >= 0 and (window is None or distance < window)


@given(LENGTHS, st.none() | st.integers(1, 8))
def test_a_token_sees_its_own_sequence_up_to_itself_and_not_beyond_its_window(
    lengths: Lengths, window: int | None
) -> None:
    row = tokens(lengths)
    places = torch.arange(len(row))
    visible = Segments.of(lengths).sees(window)
    found = visible(None, None, places[:, None], places[None])
    assert found.tolist() == [[sees(query, key, window) for key in row] for query in row]


def test_one_pair_sees_as_in_this_picture() -> None:
    places = torch.arange(6)
    found = Segments.of([(2, 2, 2)]).sees()(None, None, places[:, None], places[None])
    assert ["".join(".x"[seen] for seen in row) for row in found.tolist()] == [
        "x.....",
        "xx....",
        "xxx...",
        "xxxx..",
        "xx..x.",
        "xx..xx",
    ]
    found = Segments.of([(2, 2, 2)]).sees(2)(None, None, places[:, None], places[None])
    assert ["".join(".x"[seen] for seen in row) for row in found.tolist()] == [
        "x.....",
        "xx....",
        ".xx...",
        "..xx..",
        ".x..x.",
        "....xx",
    ]


@given(LENGTHS, st.none() | st.integers(1, 8))
def test_within_a_segment_causal_attention_from_the_bottom_right_is_the_same(
    lengths: Lengths, window: int | None
) -> None:
    """Each query is in one segment; its last key is the segment's last where it is its last."""
    segments, row = Segments.of(lengths), tokens(lengths)
    query_starts, key_starts = segments.query_starts.tolist(), segments.key_starts.tolist()
    key_index = segments.key_index.tolist()
    assert len(query_starts) == len(key_starts) == 2 * len(lengths) + 1
    assert query_starts[0] == key_starts[0] == 0
    assert (query_starts[-1], key_starts[-1]) == (len(row), len(key_index))
    for segment in range(2 * len(lengths)):
        queries = range(query_starts[segment], query_starts[segment + 1])
        keys = key_index[key_starts[segment] : key_starts[segment + 1]]
        assert segments.queries[segment] == len(queries)
        for place, query in enumerate(queries):
            last = len(keys) - len(queries) + place
            first = 0 if window is None else max(0, last - window + 1)
            seen = {key for key in range(len(row)) if sees(row[query], row[key], window)}
            assert sorted(keys[first : last + 1]) == sorted(seen)


@given(LENGTHS)
def test_every_token_is_once_a_key_of_its_own_segment_and_a_prompts_once_more(
    lengths: Lengths,
) -> None:
    segments, row = Segments.of(lengths), tokens(lengths)
    prompts = [place for place, (_, part, _) in enumerate(row) if part == "prompt"]
    assert segments.key_index[segments.own_keys].tolist() == list(range(len(row)))
    assert segments.prompts.tolist() == prompts
    assert segments.key_index[segments.prompt_keys].tolist() == prompts
    # Together they are all keys, and none is in both.
    places = [*segments.own_keys.tolist(), *segments.prompt_keys.tolist()]
    assert sorted(places) == list(range(len(segments.key_index)))
    # A token's own key lies among those of the segment of queries that it is in.
    query_starts, key_starts = segments.query_starts, segments.key_starts
    own_segment = torch.bucketize(torch.arange(len(row)), query_starts[1:], right=True)
    assert (key_starts[own_segment] <= segments.own_keys).all()
    assert (segments.own_keys < key_starts[own_segment + 1]).all()
    # A prompt's second key lies among those of its rejected response.
    pairs = torch.tensor([row[place][0] for place in prompts])
    assert (key_starts[2 * pairs + 1] <= segments.prompt_keys).all()
    assert (segments.prompt_keys < key_starts[2 * pairs + 2]).all()


@given(LENGTHS)
def test_the_longest_segment_is_known_without_looking_at_the_device(lengths: Lengths) -> None:
    segments = Segments.of(lengths)
    queries, keys = (
        max(starts.diff().tolist()) for starts in (segments.query_starts, segments.key_starts)
    )
    assert segments.longest == (queries, keys)
    assert segments.to(torch.device("meta")).longest == (queries, keys)


def test_kernels_get_the_types_that_they_take() -> None:
    segments = Segments.of([(2, 3, 1)])
    for name in ("query_starts", "key_starts"):
        assert getattr(segments, name).dtype == torch.int32
    for name in ("key_index", "own_keys", "prompt_keys", "prompts"):
        assert getattr(segments, name).dtype == torch.int64


def test_what_is_made_for_a_pack_is_made_once_and_not_carried_to_another_device() -> None:
    segments, calls = Segments.of([(2, 3, 1)]), []

    def make() -> object:
        calls.append(1)
        return object()

    first = segments.made_once("mask", make)
    assert segments.made_once("mask", make) is first
    assert segments.made_once("another", make) is not first
    assert len(calls) == 2
    moved = segments.to(torch.device("cpu"))
    assert moved.made_once("mask", make) is not first
    # Another pack's masks are its own.
    assert Segments.of([(2, 3, 1)]).made_once("mask", make) is not first


def test_visibility_is_computed_on_the_device_of_the_segments() -> None:
    segments = Segments.of([(2, 3, 1)]).to(torch.device("meta"))
    places = torch.arange(6, device="meta")
    found = segments.sees(3)(None, None, places[:, None], places[None])
    assert (found.device.type, found.shape) == ("meta", (6, 6))


@pytest.mark.parametrize("window", [None, 2])
def test_pairs_do_not_see_each_other_wherever_they_lie(window: int | None) -> None:
    alone = Segments.of([(2, 1, 3)])
    places = torch.arange(6)
    expected = alone.sees(window)(None, None, places[:, None], places[None])
    between = Segments.of([(3, 1, 1), (2, 1, 3), (1, 4, 2)])
    row = torch.arange(18)
    found = between.sees(window)(None, None, row[:, None], row[None])
    assert found[5:11, 5:11].equal(expected)
    assert not found[5:11, :5].any()
    assert not found[5:11, 11:].any()
