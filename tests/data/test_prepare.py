"""Preparation: once, in files that are whole or absent, the same as tokenising in memory."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from mallowspo_cli.data import prepare
from mallowspo_cli.data.dataset import load_pairs
from mallowspo_cli.data.prepare import prepare_split
from mallowspo_cli.data.table import Oddity, TokenizedPairs
from mallowspo_cli.data.tokenize import tokenize_pairs
from mallowspo_cli.errors import DataError
from mallowspo_cli.recipe.choices import OnError, Truncation
from mallowspo_cli.recipe.schema import DatasetConfig, PartConfig
from tests.conftest import pair_rows


@pytest.fixture(autouse=True)
def own_prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and shards of 4 rows."""
    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare, "ROWS_PER_SHARD", 4)
    return tmp_path / "cache" / "data"


def config(path: Path | str, **keys: Any) -> DatasetConfig:
    return DatasetConfig(path=str(path), **{"eval_split": None, **keys})


def prepared(config: DatasetConfig, tokenizer: Any, split: str = "train", **options: Any):
    found = prepare_split(config, split, tokenizer, **options)
    assert found is not None
    return found


def same(found: TokenizedPairs, expected: TokenizedPairs) -> bool:
    return all(
        one.pair_id == other.pair_id
        and all(
            np.array_equal(getattr(one, name), getattr(other, name))
            for name in ("prompt", "chosen", "rejected")
        )
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("warm", [False, True])
def test_prepared_pairs_are_those_tokenised_in_memory(
    write_rows: Callable[..., Path], tiny_tokenizer: Any, split: str, warm: bool
) -> None:
    settings = config(write_rows(pair_rows(11)), eval_size=3)
    if warm:
        prepared(settings, tiny_tokenizer, split)
    found = prepared(settings, tiny_tokenizer, split)
    expected = tokenize_pairs(load_pairs(settings, split), tiny_tokenizer, settings)
    assert len(found.pairs) == {"train": 8, "eval": 3}[split]
    assert same(found.pairs, expected)
    assert found.rows == 11
    assert found.layouts == {"pairs.jsonl": "trl"}


def test_what_is_prepared_is_neither_read_nor_tokenised_again(
    write_rows: Callable[..., Path], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(write_rows(pair_rows(9)))
    before = prepared(settings, tiny_tokenizer).pairs
    monkeypatch.setattr(prepare, "tokenize_items", None)
    monkeypatch.setattr(prepare, "read_items", None)
    assert same(prepared(settings, tiny_tokenizer).pairs, before)


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 60},
        {"header_in_response": True},
        {"truncation": Truncation.keep_end, "max_length": 30},
    ],
    ids=str,
)
def test_what_changes_the_tokens_prepares_anew_and_what_does_not_is_shared(
    write_rows: Callable[..., Path], tiny_tokenizer: Any, own_prepared: Path, change: dict
) -> None:
    settings = config(write_rows(pair_rows(9)))
    prepared(settings, tiny_tokenizer)
    prepared(replace(settings, eval_size=3, max_pairs_per_prompt=1), tiny_tokenizer)
    assert len(list(own_prepared.iterdir())) == 1
    prepared(replace(settings, **change), tiny_tokenizer)
    assert len(list(own_prepared.iterdir())) == 2


def test_changed_content_prepares_anew(
    write_rows: Callable[..., Path], tiny_tokenizer: Any, own_prepared: Path
) -> None:
    settings = config(write_rows(pair_rows(9)))
    first = prepared(settings, tiny_tokenizer).pairs.pair_ids
    write_rows([{**row, "chosen": row["chosen"] + "."} for row in pair_rows(9)])
    assert set(prepared(settings, tiny_tokenizer).pairs.pair_ids).isdisjoint(first)


def test_a_killed_preparation_goes_on_from_its_whole_files(
    write_rows: Callable[..., Path],
    tiny_tokenizer: Any,
    own_prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = config(write_rows(pair_rows(11)))
    honest, calls = prepare.tokenize_items, []

    def dying(items: Any, *rest: Any) -> pa.Table:
        calls.append([row for row, *_ in items])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(items, *rest)

    monkeypatch.setattr(prepare, "tokenize_items", dying)
    with pytest.raises(KeyboardInterrupt):
        prepared(settings, tiny_tokenizer)
    (place,) = own_prepared.iterdir()
    assert sorted(path.name for path in place.iterdir()) == [
        "pairs-000000000.arrow",
        "pairs-000000004.arrow",
    ]
    found = prepared(settings, tiny_tokenizer)
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10], [8, 9, 10]]
    assert found.pairs.values("row").tolist() == list(range(11))


@pytest.mark.parametrize("damage", ["cut", "gone", "overwritten"])
def test_a_damaged_file_is_made_again(
    write_rows: Callable[..., Path], tiny_tokenizer: Any, own_prepared: Path, damage: str
) -> None:
    settings = config(write_rows(pair_rows(11)))
    before = prepared(settings, tiny_tokenizer).pairs
    expected = [pair.pair_id for pair in before]
    (place,) = own_prepared.iterdir()
    file = place / "pairs-000000004.arrow"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "overwritten":
        file.write_bytes(file.read_bytes()[:-600] + bytes(600))
    else:
        file.unlink()
    assert prepared(settings, tiny_tokenizer).pairs.pair_ids == expected


def test_a_token_that_changed_on_disk_is_never_trained_on(
    write_rows: Callable[..., Path], tiny_tokenizer: Any, own_prepared: Path
) -> None:
    settings = config(write_rows(pair_rows(4)))
    pair = prepared(settings, tiny_tokenizer).pairs[2]
    (file,) = own_prepared.glob("*/pairs-*.arrow")
    content, tokens = file.read_bytes(), pair.chosen.tobytes()
    place = content.index(tokens)
    file.write_bytes(content[:place] + bytes([tokens[0] ^ 1]) + content[place + 1 :])
    with pytest.raises(DataError, match=rf"tokens of pair {pair.pair_id} changed on disk"):
        list(prepared(settings, tiny_tokenizer).pairs)


def test_a_broken_row_stops_by_default_and_names_the_way_out(
    write_rows: Callable[..., Path], tiny_tokenizer: Any
) -> None:
    rows = [
        {**row, "chosen": [{"role": "assistant", "content": row["chosen"]}]} for row in pair_rows(6)
    ]
    rows = [
        {**row, "rejected": [{"role": "assistant", "content": row["rejected"]}]} for row in rows
    ]
    rows[4]["chosen"] = []
    path = write_rows(rows)
    with pytest.raises(DataError, match=r"row 4: .*dataset\.on_error=drop"):
        prepared(config(path), tiny_tokenizer)
    left = prepared(config(path, on_error=OnError.drop), tiny_tokenizer)
    assert left.pairs.values("row").tolist() == [0, 1, 2, 3, 5]
    assert sum(left.pairs.losses.values()) == 1
    # Prepared leniently; a strict run still stops.
    with pytest.raises(DataError, match="row 4"):
        prepared(config(path), tiny_tokenizer)


def test_the_number_of_a_column_stays_with_its_pair(
    write_rows: Callable[..., Path], tiny_tokenizer: Any
) -> None:
    rows = [{**row, "w": index / 4} for index, row in enumerate(pair_rows(9))]
    rows[2]["rejected"] = rows[2]["chosen"]
    settings = config(write_rows(rows), eval_size=2)
    for split in ("train", "eval"):
        pairs = prepared(settings, tiny_tokenizer, split, column="w").pairs
        assert np.array_equal(pairs.values("column"), pairs.values("row") / 4)
    with pytest.raises(DataError, match=r"has no column 'ww' .* Did you mean 'w'\?"):
        prepared(settings, tiny_tokenizer, column="ww")
    del rows[0]["w"]
    found = prepared(config(write_rows(rows, "b.jsonl")), tiny_tokenizer, column="w").pairs
    assert np.isnan(found.values("column")).tolist() == [True] + [False] * 7
    words = [{**row, "w": str(index)} for index, row in enumerate(rows)]
    with pytest.raises(DataError, match=r"row 0: dispersion\.column=w is '0'; expected a number"):
        prepared(config(write_rows(words, "c.jsonl")), tiny_tokenizer, column="w")


def test_raters_give_their_pairs_a_dispersion(
    write_rows: Callable[..., Path], tiny_tokenizer: Any
) -> None:
    agreed = {"prompt": "a", "responses": ["x", "y"], "rater_scores": [[2, 1], [5, 3], [1, 0]]}
    split = {"prompt": "b", "responses": ["x", "y"], "rater_scores": [[2, 1], [1, 2], [3, 1]]}
    pairs = prepared(config(write_rows([agreed, split])), tiny_tokenizer).pairs
    agreed_theta, split_theta = pairs.values("rater_neg_log_phi")
    # Of two responses, phi is the share of raters against over the share for.
    assert split_theta == pytest.approx(np.log(2), rel=1e-6)
    assert agreed_theta > 10


def test_a_mixture_holds_its_parts_in_proportion_and_takes_no_pair_twice(
    write_rows: Callable[..., Path], tiny_tokenizer: Any
) -> None:
    rows = pair_rows(30)
    one, two = write_rows(rows[:20], "one.jsonl"), write_rows(rows[20:], "two.jsonl")
    parts = {
        "one": PartConfig(path=str(one), weight=1),
        "two": PartConfig(path=str(two), weight=2),
    }
    settings = DatasetConfig(path=None, parts=parts, eval_split=None)
    found = prepared(settings, tiny_tokenizer)
    assert found.part_names == ["one", "two"]
    assert np.bincount(found.parts).tolist() == [5, 10]
    assert len(set(found.pairs.pair_ids)) == 15
    assert found.pairs.losses == {"dropped: beyond the mixture's weights": 15}
    assert found.pairs.considered == 30
    assert prepared(settings, tiny_tokenizer).pairs.pair_ids == found.pairs.pair_ids
    held = replace(settings, eval_size=6)
    train, evaluation = (prepared(held, tiny_tokenizer, split) for split in ("train", "eval"))
    assert len(evaluation.pairs) == 6
    assert set(evaluation.pairs.pair_ids).isdisjoint(train.pairs.pair_ids)


def test_a_part_without_held_out_pairs_of_its_own_stays_out_of_the_evaluation(
    write_rows: Callable[..., Path], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    rows = pair_rows(30)
    (tmp_path / "own").mkdir()
    write_rows(rows[:10], "own/train.jsonl")
    write_rows(rows[10:15], "own/test.jsonl")
    parts = {
        "own": PartConfig(path=str(tmp_path / "own"), eval_split="test"),
        "none": PartConfig(path=str(write_rows(rows[15:], "none.jsonl"))),
    }
    settings = DatasetConfig(path=None, parts=parts, eval_split=None)
    train, evaluation = (prepared(settings, tiny_tokenizer, split) for split in ("train", "eval"))
    assert set(evaluation.pairs.pair_ids).isdisjoint(train.pairs.pair_ids)
    assert len(evaluation.pairs) == 5
    some = prepared(replace(settings, eval_size=3), tiny_tokenizer, "eval")
    assert np.bincount(some.parts).tolist() == [5, 3]


def test_a_prompt_gives_at_most_so_many_pairs(
    write_rows: Callable[..., Path], tiny_tokenizer: Any
) -> None:
    rows = [{**row, "prompt": f"p{index % 3}"} for index, row in enumerate(pair_rows(10))]
    settings = config(write_rows(rows), max_pairs_per_prompt=2)
    found = prepared(settings, tiny_tokenizer).pairs
    assert found.values("row").tolist() == [0, 1, 2, 3, 4, 5]
    assert found.losses == {"dropped: more than 2 pairs of a prompt": 4}
    # A pair that is dropped for its length takes no other's place.
    rows[0]["chosen"] = "x" * 300
    longer = config(write_rows(rows, "longer.jsonl"), max_pairs_per_prompt=2, max_length=100)
    assert prepared(longer, tiny_tokenizer).pairs.values("row").tolist() == [1, 2, 3, 4, 5, 6]


def test_a_file_that_changed_within_its_time_stamp_is_read_anew(
    write_rows: Callable[..., Path], tiny_tokenizer: Any
) -> None:
    path = write_rows(pair_rows(6))
    before, status = prepared(config(path), tiny_tokenizer).pairs.pair_ids, path.stat()
    write_rows([{**row, "prompt": row["prompt"].upper()} for row in pair_rows(6)])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert set(prepared(config(path), tiny_tokenizer).pairs.pair_ids).isdisjoint(before)


def test_a_directory_that_datasets_saved_is_read_by_split(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    rows = pair_rows(7)
    saved = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(rows[:5]),
            "test": datasets.Dataset.from_list(rows[5:]),
        }
    )
    saved.save_to_disk(tmp_path / "saved")
    settings = config(tmp_path / "saved", eval_split="test")
    assert len(prepared(settings, tiny_tokenizer).pairs) == 5
    assert len(prepared(settings, tiny_tokenizer, "eval").pairs) == 2
    with pytest.raises(DataError, match=r"no split 'dev'; it has test, train"):
        prepared(replace(settings, eval_split="dev"), tiny_tokenizer, "eval")


def test_odd_texts_are_marked(write_rows: Callable[..., Path], tiny_tokenizer: Any) -> None:
    rows = pair_rows(4)
    rows[1]["chosen"] = " User "
    rows[2]["prompt"] = "what is <|end|>?"
    rows[0]["chosen"], rows[0]["rejected"] = "Say 0! yes", "Say 0! no"
    rows[0]["prompt"] = "Say 0!"
    rows[3]["prompt"] = [
        {"role": "user", "content": " "},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "go on"},
    ]
    rows = [
        {
            **row,
            "prompt": row["prompt"]
            if isinstance(row["prompt"], list)
            else [{"role": "user", "content": row["prompt"]}],
        }
        for row in rows
    ]
    odd = prepared(config(write_rows(rows)), tiny_tokenizer).pairs.values("oddities")
    assert [Oddity(int(value)) for value in odd] == [
        Oddity.REPEATED_PROMPT,
        Oddity.ROLE_NAME,
        Oddity.SPECIAL_TOKEN,
        Oddity.BLANK_TURN,
    ]


def test_a_limit_reads_only_the_first_rows_and_leaves_no_files(
    write_rows: Callable[..., Path], tiny_tokenizer: Any, own_prepared: Path
) -> None:
    found = prepared(config(write_rows(pair_rows(50)), eval_size=30), tiny_tokenizer, limit=20)
    assert (found.rows, found.read) == (50, 20)
    assert 0 < len(found.pairs) < 20
    assert not own_prepared.exists()


def test_slices_and_selections_keep_pairs_and_ids_together(
    write_rows: Callable[..., Path], tiny_tokenizer: Any
) -> None:
    pairs = prepared(config(write_rows(pair_rows(11))), tiny_tokenizer).pairs
    ids = pairs.pair_ids
    assert [pair.pair_id for pair in pairs[3:7]] == ids[3:7] == pairs[3:7].pair_ids
    taken = pairs.take([9, 0, 4])
    assert [pair.pair_id for pair in taken] == [ids[9], ids[0], ids[4]]
    assert pairs[-1].pair_id == ids[-1]
    with pytest.raises(IndexError):
        pairs[11]
    lengths = [[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs]
    assert pairs.lengths.tolist() == lengths
    assert taken.lengths.tolist() == [lengths[9], lengths[0], lengths[4]]


def test_the_files_say_what_they_hold(
    write_rows: Callable[..., Path], tiny_tokenizer: Any, own_prepared: Path
) -> None:
    prepared(config(write_rows(pair_rows(9))), tiny_tokenizer)
    (place,) = own_prepared.iterdir()
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["rows"] == 9
    assert manifest["layout"] == "trl"
    assert len(manifest["files"]) == 3
