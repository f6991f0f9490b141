"""Merging changes no lookup, whenever it is killed; only what nobody uses is removed."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mallowspo_cli.errors import CacheError
from mallowspo_cli.reference import maintenance
from mallowspo_cli.reference.claims import STALE_SECONDS, Claims
from mallowspo_cli.reference.fingerprint import Fingerprint
from mallowspo_cli.reference.store import COLUMNS, ReferenceRows, ReferenceStore, read_shard

BUILT = Fingerprint("w", "none", "c", "t", "float32", "sdpa", "2.6", "5.0")


def rows(count: int, seed: int) -> ReferenceRows:
    """Values that tell every row and column apart; one is not a number."""
    generator = torch.Generator().manual_seed(seed)
    columns = {
        name: torch.randint(1, 99, (count,), generator=generator, dtype=torch.int32)
        if name.endswith("tokens")
        else torch.randn(count, generator=generator)
        for name in COLUMNS
    }
    columns["chosen_entropy_sum"][0] = torch.nan
    return ReferenceRows(**columns)


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    """Three shards: the third, by a process that knew of no other, holds doubled rows."""
    first = ReferenceStore.create(tmp_path / "store", BUILT, 100)
    blind = ReferenceStore.open(first.path, BUILT)
    first.append(["a", "b", "c"], rows(3, seed=1), {"device": "cpu", "pack_tokens": "64"})
    first.append(["d", "e"], rows(2, seed=2), {"device": "A card", "pack_tokens": "64"})
    blind.append(["e", "b", "f"], rows(3, seed=3), {"device": "cpu", "pack_tokens": "32"})
    return reopened(first)


def reopened(store: ReferenceStore) -> ReferenceStore:
    return ReferenceStore.open(store.path, BUILT)


def bits(store: ReferenceStore, pair_ids: str = "abcdef") -> list[bytes]:
    found = store.lookup(list(pair_ids))
    return [getattr(found, name).numpy().tobytes() for name in COLUMNS]


def put_claim(store: ReferenceStore, name: str, process: int, host: str, age: float) -> Path:
    file = store.path / "claims" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"host": host, "process": process}))
    os.utime(file, (time.time() - age,) * 2)
    return file


def a_dead_process() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_merging_keeps_every_lookup_bit_for_bit_in_one_shard(store: ReferenceStore) -> None:
    before, order = bits(store), store.pair_ids
    merge = maintenance.merge_shards(store)
    (shard,) = store.shards()
    assert bits(reopened(store)) == before
    assert reopened(store).pair_ids == order
    assert (len(merge.shards), merge.rows, merge.doubled, merge.dropped) == (3, 6, 2, 0)
    assert len(read_shard(shard)) == 6


def test_what_was_freed_is_what_the_directory_lost(store: ReferenceStore) -> None:
    def size() -> int:
        return sum(shard.stat().st_size for shard in store.shards())

    before = size()
    assert maintenance.merge_shards(store).freed == before - size() > 0


def test_a_merged_store_is_left_alone(store: ReferenceStore) -> None:
    maintenance.merge_shards(store)
    (shard,) = store.shards()
    written = shard.stat().st_mtime_ns
    assert maintenance.merge_shards(reopened(store)).shards == []
    assert [s.stat().st_mtime_ns for s in store.shards()] == [written]


def test_an_empty_store_is_left_empty(tmp_path: Path) -> None:
    store = ReferenceStore.create(tmp_path / "store", BUILT, 100)
    assert maintenance.merge_shards(store).shards == []
    assert store.shards() == []


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_killed_while_removing_the_store_gives_the_same_rows(
    store: ReferenceStore, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    before, left, honest = bits(store), [removed], Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("rows-"):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
        honest(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        maintenance.merge_shards(store)
    monkeypatch.undo()
    assert len(store.shards()) == 4 - removed
    assert bits(reopened(store)) == before
    maintenance.merge_shards(reopened(store))
    assert len(store.shards()) == 1
    assert bits(reopened(store)) == before


def test_killed_while_writing_nothing_has_changed(
    store: ReferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, shards = bits(store), store.shards()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mallowspo_cli.files.sync", killed)
    with pytest.raises(KeyboardInterrupt):
        maintenance.merge_shards(store)
    monkeypatch.undo()
    assert store.shards() == shards
    assert bits(reopened(store)) == before


def test_rows_that_a_pass_adds_during_the_merge_stay_the_newer_ones(
    store: ReferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, blind, honest = bits(store), reopened(store), maintenance.write_shard

    def written_meanwhile(*arguments: Any, **named: Any) -> str:
        blind.append(list("abcdefg"), rows(7, seed=9))
        return honest(*arguments, **named)

    monkeypatch.setattr(maintenance, "write_shard", written_meanwhile)
    assert maintenance.merge_shards(store).doubled == 2
    monkeypatch.undo()
    assert len(store.shards()) == 2
    assert bits(reopened(store)) == before
    assert maintenance.merge_shards(reopened(store)).doubled == 6
    assert bits(reopened(store)) == before
    assert "g" in reopened(store).pair_ids


def test_shards_that_add_nothing_go_and_the_oldest_stays(tmp_path: Path) -> None:
    first = ReferenceStore.create(tmp_path / "store", BUILT, 100)
    for _ in range(3):
        first.append(["a", "b"], rows(2, seed=1), {"device": "cpu"})
    merge = maintenance.merge_shards(reopened(first))
    assert (merge.rows, merge.doubled) == (2, 4)
    assert len(first.shards()) == 1
    assert bits(reopened(first), "ab") == bits(first, "ab")


def test_only_wanted_rows_stay_where_that_is_asked(store: ReferenceStore) -> None:
    before = bits(store, "be")
    merge = maintenance.merge_shards(store, {"b", "e", "z"})
    assert (merge.rows, merge.dropped) == (2, 4)
    after = reopened(store)
    assert after.pair_ids == ["b", "e"]
    assert bits(after, "be") == before
    maintenance.merge_shards(after, set())
    assert store.shards() == []


def test_a_merged_shard_says_what_its_parts_said(store: ReferenceStore) -> None:
    expected = {"device": ["cpu", "A card"], "pack_tokens": ["64", "32"]}
    assert maintenance.notes(store) == expected
    maintenance.merge_shards(store)
    assert maintenance.notes(reopened(store)) == expected


def test_a_reader_under_whose_eyes_shards_are_merged_reads_the_same_rows(
    store: ReferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, honest = bits(store), ReferenceStore.shards

    def listed_before_merging(self: ReferenceStore) -> list[Path]:
        found = honest(self)
        monkeypatch.undo()
        maintenance.merge_shards(store)
        return found

    monkeypatch.setattr(ReferenceStore, "shards", listed_before_merging)
    reader = reopened(store)
    assert bits(reader) == expected
    assert reader.damaged == []


def test_the_shard_that_counts_is_named(store: ReferenceStore) -> None:
    shards = store.shards()
    assert maintenance.shard_of(store, "b") == shards[0]
    assert maintenance.shard_of(store, "e") == shards[1]
    with pytest.raises(CacheError, match="no shard"):
        maintenance.shard_of(store, "z")


def test_a_claim_is_live_while_its_process_gives_signs(store: ReferenceStore) -> None:
    assert maintenance.claims_of(store.path) == []
    here, late = socket.gethostname(), STALE_SECONDS + 10
    put_claim(store, "dead", a_dead_process(), here, age=0)
    put_claim(store, "elsewhere", 1, "another", age=1)
    put_claim(store, "silent", 1, "another", age=late)
    put_claim(store, "stuck", os.getpid(), here, age=late)
    (store.path / "claims" / "new").touch()
    with Claims(store.path / "claims").held("ours"):
        found = {claim.file.name: claim for claim in maintenance.claims_of(store.path)}
    live = {name for name, claim in found.items() if claim.live}
    assert live == {"elsewhere", "new", "ours"}
    assert set(found) == live | {"dead", "silent", "stuck"}
    assert found["elsewhere"].owner == "process 1 on another"
    assert len(list((store.path / "claims").iterdir())) == 5


def test_left_over_is_what_no_process_will_read_or_finish(store: ReferenceStore) -> None:
    (store.path / "rows-1-x.damaged").touch()
    for name, age in (("old", 120), ("young", 0)):
        file = store.path / f".rows-1.{name}.tmp"
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    put_claim(store, "live", 1, "another", age=0)
    put_claim(store, "stale", 1, "another", age=STALE_SECONDS + 10)
    names = {path.name for path in maintenance.left_over(store.path)}
    assert names == {"rows-1-x.damaged", ".rows-1.old.tmp", "stale"}


def aged(path: Path, days: float) -> Path:
    """A file, or a directory with a file in it, last used so long ago."""
    if not path.suffix:
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for each in [*path.glob("*"), path]:
        os.utime(each, (time.time() - days * 86400,) * 2)
    return path


def test_only_our_own_files_of_long_ago_are_unused(tmp_path: Path) -> None:
    expected = {
        aged(tmp_path / "reference" / "v2-aa", 40),
        aged(tmp_path / "reference" / "v1-bb", 31),
        aged(tmp_path / "data" / "v1-cc", 40),
        aged(tmp_path / "launches" / "a.json", 40),
        aged(tmp_path / "digests" / "a.digest", 40),
    }
    own = aged(tmp_path / "reference" / "v2-dd", 40)
    aged(tmp_path / "reference" / "v2-ee", 29)
    aged(tmp_path / "reference" / "thesis", 40)
    aged(tmp_path / "data" / "v1-mine", 40)
    aged(tmp_path / "models" / "v1-ff", 40)
    aged(tmp_path / "launches" / "b.json", 29)
    read = aged(tmp_path / "data" / "v1-11", 40)
    os.utime(read / "manifest.json", (time.time(), time.time() - 40 * 86400))
    target = aged(tmp_path / "elsewhere" / "v2-22", 40)
    (tmp_path / "reference" / "v2-33").symlink_to(target)
    assert set(maintenance.unused(tmp_path, 30, [own])) == expected


def test_a_store_that_was_half_removed_is_no_store_and_goes_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = aged(tmp_path / "reference" / "v2-aa", 40)

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(maintenance.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        maintenance.remove([store])
    monkeypatch.undo()
    assert not store.exists()
    (rest,) = maintenance.unused(tmp_path, 30, [])
    os.utime(rest, (time.time() - 40 * 86400,) * 2)
    assert maintenance.remove([rest]) == 2
    assert list((tmp_path / "reference").iterdir()) == []


def test_differences_see_every_column_and_take_nan_for_equal_to_nan() -> None:
    one, other = rows(3, seed=1), rows(3, seed=1)
    assert all(float(delta.max()) == 0 for delta in maintenance.differences(one, other).values())
    for name in COLUMNS:
        getattr(other, name)[2] += 5
    found = maintenance.differences(one, other)
    assert {name: round(float(delta.max()), 4) for name, delta in found.items()} == dict.fromkeys(
        COLUMNS, 5.0
    )
    other.chosen_logp[1] = torch.nan
    assert maintenance.differences(one, other)["chosen_logp"].isnan().tolist() == [0, 1, 0]
