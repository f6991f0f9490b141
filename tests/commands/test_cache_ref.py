"""`mallowspo cache-ref` in several processes: one store, every pair once."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from tests.commands.conftest import Command


def rows_in(store: Path) -> Counter[str]:
    """How often each pair id is in a store's shards."""
    shards = [pq.read_table(path) for path in store.glob("rows-*.parquet")]
    return Counter(pair for shard in shards for pair in shard["pair_id"].to_pylist())


def test_two_processes_of_a_launch_fill_one_store_and_score_no_pair_twice(
    tiny_words: list[str], tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    words = [*tiny_words, "reference.store=store", "reference.pack_tokens=1"]
    done = subprocess.run(
        [*launcher, "--master_port", "29611", "-m", "mallowspo_cli", "cache-ref", *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # One of them talks.
    assert done.stdout.splitlines() == ["store"]
    rows = rows_in(tmp_path / "store")
    assert len(rows) == 16
    assert set(rows.values()) == {1}
    assert list((tmp_path / "store" / "claims").iterdir()) == []


def test_a_grown_file_adds_only_its_new_pairs(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    words = [*tiny_words, "reference.store=store", "dataset.eval_size=0"]
    assert mallowspo("cache-ref", *words).code == 0
    before = rows_in(tmp_path / "store")
    more = {"prompt": "Say more", "chosen": "More", "rejected": "Less"}
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(more) + "\n")
    done = mallowspo("cache-ref", *words)
    assert "reference pass: 1 of 17 pairs are new" in done.err
    after = rows_in(tmp_path / "store")
    assert len(after) == 17
    assert max(after.values()) == 1
    assert before.keys() < after.keys()


def test_truncation_and_header_change_only_the_rows_whose_tokens_they_change(
    mallowspo: Command, tiny_words: list[str]
) -> None:
    words = [*tiny_words, "reference.store=store", "dataset.eval_size=0"]
    assert mallowspo("cache-ref", *words).code == 0
    longer = mallowspo("cache-ref", *words, "dataset.max_length=4096")
    assert "every pair is there" in longer.err
    header = mallowspo("cache-ref", *words, "dataset.header_in_response=true")
    assert "16 of 16 pairs are new" in header.err


def test_a_half_written_shard_costs_its_rows_and_no_more(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    words = [*tiny_words, "reference.store=store", "reference.pack_tokens=1"]
    assert mallowspo("cache-ref", *words).code == 0
    shards = sorted((tmp_path / "store").glob("rows-*.parquet"))
    lost = pq.read_metadata(shards[0]).num_rows
    shards[0].write_bytes(shards[0].read_bytes()[:-7])
    done = mallowspo("cache-ref", *words)
    assert "damaged" in done.err
    assert f"{lost} pairs added" in done.err
    assert len(rows_in(tmp_path / "store")) == 16
