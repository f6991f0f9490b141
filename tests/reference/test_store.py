"""The store gives back what was put in, and says when it cannot."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from mallowspo_cli.errors import CacheError
from mallowspo_cli.reference.fingerprint import Fingerprint
from mallowspo_cli.reference.store import (
    COLUMNS,
    FORMAT,
    ReferenceRows,
    ReferenceStore,
    read_shard,
)

BUILT = Fingerprint("w", "none", "c", "t", "float32", "sdpa", "2.6", "5.0")
VOCAB_SIZE = 100


def rows(count: int, seed: int = 0) -> ReferenceRows:
    """Values that tell every row and column apart."""
    generator = torch.Generator().manual_seed(seed)

    def column(name: str) -> torch.Tensor:
        if name.endswith("tokens"):
            return torch.randint(1, 99, (count,), generator=generator, dtype=torch.int32)
        return torch.randn(count, generator=generator)

    return ReferenceRows(**{name: column(name) for name in COLUMNS})


def ids(count: int, prefix: str = "pair") -> list[str]:
    return [f"{prefix}-{index}" for index in range(count)]


def new(path: Path) -> ReferenceStore:
    return ReferenceStore.create(path / "store", BUILT, VOCAB_SIZE)


def reopened(store: ReferenceStore) -> ReferenceStore:
    return ReferenceStore.open(store.path, BUILT)


def refusal(path: Path, expected: Fingerprint = BUILT) -> str:
    with pytest.raises(CacheError) as caught:
        ReferenceStore.open(path, expected)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_store_is_empty_and_opens(tmp_path: Path) -> None:
    store = new(tmp_path)
    assert len(store) == len(reopened(store)) == 0
    assert reopened(store).vocab_size == VOCAB_SIZE
    assert store.missing(ids(2)) == ids(2)


def test_rows_come_back_in_any_order_also_after_reopening(tmp_path: Path) -> None:
    store, values = new(tmp_path), rows(9)
    parts = [slice(0, 4), slice(4, 5), slice(5, 9)]
    for part in parts:
        piece = ReferenceRows(**{c: getattr(values, c)[part] for c in COLUMNS})
        store.append(ids(9)[part], piece)
    order = list(range(9)) * 2
    random.Random(0).shuffle(order)
    for place in (store, reopened(store)):
        assert len(place) == 9
        found = place.lookup([ids(9)[i] for i in order])
        for name in COLUMNS:
            assert torch.equal(getattr(found, name), getattr(values, name)[order]), name


def test_sums_are_float32_and_counts_whole_numbers_on_disk_and_in_memory(tmp_path: Path) -> None:
    store = new(tmp_path)
    store.append(ids(3), rows(3))
    (shard,) = store.path.glob("rows-*.parquet")
    kinds = {f.name: str(f.type) for f in pq.read_schema(shard)}
    assert kinds.pop("pair_id") == "string"
    assert kinds == {c: "int32" if c.endswith("tokens") else "float" for c in COLUMNS}
    found = store.lookup(ids(3))
    for name in COLUMNS:
        expected = torch.int64 if name.endswith("tokens") else torch.float32
        assert getattr(found, name).dtype == expected


def test_nothing_is_looked_up_for_no_pairs(tmp_path: Path) -> None:
    assert new(tmp_path).lookup([]).chosen_logp.shape == (0,)


def test_what_is_not_a_number_comes_back_as_such(tmp_path: Path) -> None:
    store, values = new(tmp_path), rows(2)
    values.chosen_entropy_sum[0] = torch.nan
    values.chosen_logp[1] = -torch.inf
    store.append(ids(2), values)
    found = reopened(store).lookup(ids(2))
    assert found.chosen_entropy_sum.isnan().tolist() == [True, False]
    assert found.chosen_logp[1] == -torch.inf


def test_missing_lists_each_absent_id_once_in_order(tmp_path: Path) -> None:
    store = new(tmp_path)
    store.append(ids(2), rows(2))
    assert store.missing(["z", "pair-1", "a", "z"]) == ["z", "a"]


def test_the_missing_pair_is_named(tmp_path: Path) -> None:
    store = new(tmp_path)
    store.append(ids(2), rows(2))
    with pytest.raises(CacheError, match=r"no row for pair pair-7\..*cache-ref"):
        store.lookup(["pair-0", "pair-7", "pair-8"])


def test_a_store_built_otherwise_is_refused_with_what_differs(tmp_path: Path) -> None:
    store = new(tmp_path)
    message = refusal(store.path, replace(BUILT, attention="eager", weights="v"))
    assert "weights: w, now v; attention: sdpa, now eager" in message
    assert "tokenizer" not in message


def test_a_store_that_is_not_there_is_refused_with_the_way_to_build_it(tmp_path: Path) -> None:
    assert "mallowspo cache-ref" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "null", "5", '{"format": 1}', '{"format": 1, "fingerprint": {"a": 1}}'],
)
def test_a_damaged_manifest_is_refused_by_name(tmp_path: Path, text: str) -> None:
    store = new(tmp_path)
    (store.path / "manifest.json").write_text(text)
    assert str(store.path / "manifest.json") in refusal(store.path)


def test_a_manifest_that_is_not_text_is_refused(tmp_path: Path) -> None:
    store = new(tmp_path)
    (store.path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    assert "manifest.json" in refusal(store.path)


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    store = new(tmp_path)
    file = store.path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": FORMAT + 1}))
    assert f"version {FORMAT}" in refusal(store.path)


def test_rows_without_a_manifest_are_not_taken_for_a_new_store(tmp_path: Path) -> None:
    store = new(tmp_path)
    store.append(ids(1), rows(1))
    (store.path / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"manifest\.json"):
        new(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "emptied", "a bit", "other content"])
def test_a_damaged_shard_is_set_aside_and_only_its_rows_are_missing(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, values = new(tmp_path), rows(3, seed=1)
    store.append(ids(5), rows(5))
    (shard,) = store.shards()
    store.append(ids(3, "more"), values)
    content = bytearray(shard.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "emptied":
        content = bytearray()
    elif damage == "a bit":
        content[60] ^= 1
    else:
        content = bytearray(b"words")
    shard.write_bytes(content)
    found = reopened(store)
    assert found.missing([*ids(5), *ids(3, "more")]) == ids(5)
    assert torch.equal(found.lookup(ids(3, "more")).chosen_logp, values.chosen_logp)
    assert found.damaged == [shard]
    assert shard.with_suffix(".damaged").is_file()
    found.append(ids(5), rows(5))
    assert reopened(store).missing(ids(5)) == []


def test_a_flipped_bit_is_never_read_as_another_number(tmp_path: Path) -> None:
    store = new(tmp_path)
    store.append(ids(5), rows(5))
    (shard,) = store.shards()
    content = shard.read_bytes()
    for place in range(0, len(content), 53):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        shard.write_bytes(damaged)
        with pytest.raises(CacheError, match="is damaged"):
            read_shard(shard)


def test_a_shard_with_other_columns_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    store = new(tmp_path)
    pq.write_table(pa.table({"pair_id": ["a"]}), store.path / "rows-other.parquet")
    assert [path.name for path in reopened(store).damaged] == ["rows-other.parquet"]


def test_half_written_files_are_not_read(tmp_path: Path) -> None:
    store = new(tmp_path)
    store.append(ids(2), rows(2))
    (shard,) = store.path.glob("rows-*.parquet")
    (store.path / f".{shard.name}.123.tmp").write_bytes(shard.read_bytes()[:50])
    (store.path / ".manifest.json.123.tmp").write_text("{")
    assert len(reopened(store)) == 2


def test_a_write_that_fails_leaves_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new(tmp_path)
    store.append(ids(2), rows(2))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mallowspo_cli.files.sync", killed)
    with pytest.raises(KeyboardInterrupt):
        store.append(ids(2, "more"), rows(2, seed=1))
    monkeypatch.undo()
    assert len(store) == len(reopened(store)) == 2
    assert len(list(store.path.iterdir())) == 2


def test_where_two_have_scored_a_pair_the_older_row_counts_for_every_reader(
    tmp_path: Path,
) -> None:
    first, values = new(tmp_path), rows(4)
    second = reopened(first)
    first.append(ids(4), values)
    second.append(ids(4), rows(4, seed=1))
    second.reload()
    for store in (first, second, reopened(first)):
        store.refresh()
        assert len(store) == 4
        assert torch.equal(store.lookup(ids(4)).chosen_logp, values.chosen_logp)


def test_a_store_that_another_process_made_meanwhile_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(BUILT, weights="others")
    theirs = ReferenceStore.create(tmp_path / "store", other, VOCAB_SIZE)
    theirs.append(ids(1), rows(1))
    with pytest.raises(CacheError, match="weights: others, now w"):
        new(tmp_path)
    assert len(ReferenceStore.open(theirs.path, other)) == 1
    assert [path.name for path in theirs.path.glob(".*")] == []


def test_refresh_reads_what_others_have_added_since(tmp_path: Path) -> None:
    first = new(tmp_path)
    second = reopened(first)
    first.append(ids(2), rows(2))
    assert second.missing(ids(2)) == ids(2)
    second.refresh()
    assert second.missing(ids(2)) == []
    second.refresh()
    assert len(second) == 2
