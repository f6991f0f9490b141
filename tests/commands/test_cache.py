"""`mallowspo cache`: what a store holds, whether it is right, and that tidying changes no row."""

import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mallowspo_cli.reference import maintenance
from mallowspo_cli.reference.claims import Claims
from mallowspo_cli.reference.store import COLUMNS, ReferenceStore, read_shard, write_shard
from tests.commands.conftest import Command
from tests.commands.test_bad_input import complaint
from tests.conftest import pair_rows

STORE = Path("mine")


@pytest.fixture
def words(tiny_words: list[str]) -> list[str]:
    """The tiny recipe with a store of its own."""
    return [*tiny_words, f"reference.store={STORE}"]


@pytest.fixture
def filled(mallowspo: Command, words: list[str]) -> list[str]:
    """The same with every row there, in three shards, the pairs where they meet in two of them."""
    assert mallowspo("cache-ref", *words).code == 0
    shards = ReferenceStore.open(STORE, None).shards()
    table = pa.concat_tables(read_shard(shard) for shard in shards)
    for shard in shards:
        shard.unlink()
    for start, stop in ((0, 6), (4, 12), (10, 16)):
        write_shard(STORE, table.slice(start, stop - start))
    return words


def bits() -> dict[str, dict[str, bytes]]:
    """Every row of the store, bit for bit."""
    store = ReferenceStore.open(STORE, None)
    ids = store.pair_ids
    found = store.lookup(ids)
    return {
        pair: {c: getattr(found, c)[index].numpy().tobytes() for c in COLUMNS}
        for index, pair in enumerate(ids)
    }


def falsify(column: str, by: float) -> tuple[str, float, Path]:
    """Change a value of the oldest shard; returns the pair's id, the value and the new shard."""
    shard = ReferenceStore.open(STORE, None).shards()[0]
    table = read_shard(shard)
    values = table[column].to_pylist()
    values[3] += by
    index = table.schema.get_field_index(column)
    field = table.schema.field(index)
    shard.unlink()
    wrong = table.set_column(index, field, pa.array(values, field.type))
    name = write_shard(STORE, wrong, place=shard.name.rpartition("-")[0])
    return str(table["pair_id"][3]), values[3], STORE / name


def cells(out: str) -> list[list[str]]:
    """The rows of the tables in `out`."""
    return [
        [cell.strip() for cell in line.strip("│┃").split("│")]
        for line in out.splitlines()
        if line.startswith("│")
    ]


def test_inspect_counts_what_is_missing_before_and_after_the_pass(
    mallowspo: Command, words: list[str]
) -> None:
    assert "no reference store at mine" in complaint(mallowspo("cache", "inspect", *words))
    assert not STORE.exists()
    assert mallowspo("cache-ref", *words).code == 0
    for shard in STORE.glob("rows-*.parquet"):
        shard.unlink()
    before = mallowspo("cache", "inspect", *words)
    assert before.code == 0, before.err
    assert ["train", "12", "12", "0", "12"] in cells(before.out)
    assert ["eval", "4", "4", "0", "4"] in cells(before.out)
    assert "unknown until every training pair has a row: mallowspo cache-ref" in before.out
    assert mallowspo("cache-ref", *words).code == 0
    after = mallowspo("cache", "inspect", *words).out
    assert ["train", "12", "12", "12", "0"] in cells(after)
    assert ["eval", "4", "4", "4", "0"] in cells(after)
    scale = re.search(r"auto scale (\S+); with scale (\S+) w has mean 1\.0000", after)
    assert scale is not None
    assert float(scale[1]) == float(scale[2]) > 1


def test_inspect_says_what_built_the_store_and_what_lies_there(
    mallowspo: Command, filled: list[str]
) -> None:
    (STORE / "rows-1-x.damaged").touch()
    with Claims(STORE / "claims").held("a_block"):
        out = mallowspo("cache", "inspect", *filled).out
    facts = {row[0]: row[1] for row in cells(out) if len(row) == 2}
    store = ReferenceStore.open(STORE, None)
    assert facts["weights"] == store.fingerprint.weights
    assert facts["compute"] == "float32"
    assert facts["vocabulary"] == str(store.vocab_size)
    assert facts["rows"] == "16"
    size = sum(shard.stat().st_size for shard in store.shards())
    assert facts["shards"] == f"3 of {size:,} bytes"
    assert facts["damaged shards"] == "rows-1-x"
    assert facts["device"] == "cpu"
    assert f"process {os.getpid()} on" in facts["claims held"]


def test_inspect_and_diff_load_no_model(
    mallowspo: Command, filled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("mallowspo_cli.reference.build.load_model", refuse)
    assert mallowspo("cache", "inspect", *filled).code == 0
    assert mallowspo("cache", "diff", *filled).code == 0
    assert mallowspo("cache", "gc", *filled).code == 0
    assert mallowspo("cache", "export", *filled, "to=rows.parquet").code == 0


def test_inspect_tells_a_scale_that_the_recipe_sets_from_the_automatic_one(
    mallowspo: Command, filled: list[str]
) -> None:
    auto = mallowspo("cache", "inspect", *filled).out
    scale = float(re.search(r"auto scale (\S+);", auto)[1])  # type: ignore[index]
    out = mallowspo("cache", "inspect", *filled, "dispersion.scale=2").out
    assert f"auto scale {scale:.4f}; with scale 2.0000 w has mean {2 / scale:.4f}" in out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_verify_passes_on_what_the_model_gave(
    mallowspo: Command, words: list[str], precision: str
) -> None:
    words = [*words, f"train.precision={precision}"]
    assert mallowspo("cache-ref", *words).code == 0
    done = mallowspo("cache", "verify", *words)
    assert done.code == 0, done.err
    assert "16 of 16 rows, scored again" in done.out
    assert {row[0] for row in cells(done.out)} == set(COLUMNS)
    assert "3 of 16 rows" in mallowspo("cache", "verify", *words, "rows=3").out


@pytest.mark.parametrize(
    ("column", "by"),
    [
        ("chosen_logp", 0.1),
        ("rejected_logp", -0.1),
        ("rejected_logp", float("nan")),
        ("chosen_tokens", 1),
        ("rejected_entropy_sum", 0.1),
        ("chosen_first_entropy", 0.1),
    ],
)
def test_verify_names_the_pair_the_values_and_the_shard_of_a_wrong_row(
    mallowspo: Command, filled: list[str], column: str, by: float
) -> None:
    pair, value, shard = falsify(column, by)
    done = mallowspo("cache", "verify", *filled)
    line = complaint(done)
    assert f"{column} of pair {pair} is stored as {value:.6g}" in line
    assert f"scoring it again gives {value - by:.6g}" in line or by != by
    assert f"rm {shard} && mallowspo cache-ref recipe=quickstart" in line
    # The table comes first.
    assert column in done.out


def test_what_verify_says_to_do_mends_the_store(mallowspo: Command, filled: list[str]) -> None:
    falsify("chosen_logp", 0.1)
    line = complaint(mallowspo("cache", "verify", *filled))
    found = re.search(r"again: rm (\S+) && mallowspo (.*)$", line)
    assert found is not None
    Path(found[1]).unlink()
    assert mallowspo(*found[2].split()).code == 0
    assert mallowspo("cache", "verify", *filled).code == 0


def test_verify_draws_with_the_recipes_seed(
    mallowspo: Command, filled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mallowspo_cli.commands import cache_rows as cache

    drawn: list[str] = []
    honest = cache.score_rows

    def counting(scorer, batch, autocast):
        drawn.extend(batch.pair_ids)
        return honest(scorer, batch, autocast)

    monkeypatch.setattr(cache, "score_rows", counting)
    for seed in (1, 1, 2):
        assert mallowspo("cache", "verify", *filled, "rows=8", f"seed={seed}").code == 0
    first, again, other = drawn[:8], drawn[8:16], drawn[16:]
    assert first == again
    assert len(set(first)) == 8
    assert set(first) != set(other)


def test_verify_of_an_empty_store_says_how_to_fill_it(mallowspo: Command, words: list[str]) -> None:
    line = complaint(mallowspo("cache", "verify", *words, "rows=4"))
    assert "no reference store at mine. Build it" in line
    assert "mallowspo cache-ref recipe=quickstart" in line
    assert "rows=4" not in line


def test_diff_lists_what_built_two_stores_and_how_far_rows_are_apart(
    mallowspo: Command, words: list[str], write_rows: Callable[..., Path]
) -> None:
    less = f"dataset.path={write_rows(pair_rows(13), 'less.jsonl')}"
    assert mallowspo("cache-ref", *words).code == 0
    other = [*words, less, "reference.store=other", "train.precision=bf16"]
    assert mallowspo("cache-ref", *other).code == 0
    done = mallowspo("cache", "diff", *words, "with=other")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert "compute: float32 here, bfloat16 autocast over float32 there" in lines
    assert not any(line.startswith(("weights:", "torch:", "vocabulary:")) for line in lines)
    assert "rows: 3 only here, 0 only there, 13 in both" in lines
    here, there = ReferenceStore.open(STORE, None), ReferenceStore.open(Path("other"), None)
    ids = there.pair_ids
    delta = (here.lookup(ids).chosen_logp - there.lookup(ids).chosen_logp).abs().max()
    found = {row[0]: row[1] for row in cells(done.out)}
    assert set(found) == set(COLUMNS)
    assert found["chosen_logp"] == f"{float(delta):.3g}" != "0"
    assert found["chosen_tokens"] == "0"


def test_diff_of_a_store_with_itself_finds_nothing(mallowspo: Command, filled: list[str]) -> None:
    out = mallowspo("cache", "diff", *filled, f"with={STORE}").out
    assert "built alike" in out
    assert {row[1] for row in cells(out)} == {"0"}


def test_diff_without_another_lists_the_stores_of_the_cache(
    mallowspo: Command, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path / "cache"))
    bare = [word for word in words if not word.startswith("reference.store=")]
    assert mallowspo("cache-ref", *bare).code == 0
    assert "no other store in" in mallowspo("cache", "diff", *bare).out
    assert mallowspo("cache-ref", *bare, "train.precision=bf16", "dataset.eval_size=5").code == 0
    (tmp_path / "cache" / "reference" / "v1-00").mkdir()
    (tmp_path / "cache" / "reference" / "v1-00" / "manifest.json").write_text('{"format": 1}')
    done = mallowspo("cache", "diff", *bare)
    assert done.code == 0
    _, old, other = done.out.splitlines()
    assert old.startswith("v1-00: not a store of version")
    assert other.startswith("v2-")
    assert other.endswith(": 16 rows, differs in compute")


def test_gc_leaves_one_shard_and_every_row_as_it_was(mallowspo: Command, filled: list[str]) -> None:
    before = bits()
    assert len(before) == 16
    done = mallowspo("cache", "gc", *filled)
    assert done.code == 0, done.err
    assert "3 shards merged, 16 rows stay" in done.out
    assert "left out 4 rows that an older shard has" in done.out
    assert bits() == before
    assert len(ReferenceStore.open(STORE, None).shards()) == 1
    assert "nothing to merge" in mallowspo("cache", "gc", *filled).out


def test_gc_removes_damaged_shards_left_over_files_and_stale_claims(
    mallowspo: Command, filled: list[str]
) -> None:
    (STORE / "claims").mkdir(exist_ok=True)
    rubbish = [STORE / "rows-1-x.damaged", STORE / ".rows-1.tmp", STORE / "claims" / "stale"]
    for file in rubbish:
        file.write_text("12345")
        os.utime(file, (time.time() - 120,) * 2)
    young = STORE / ".rows-2.tmp"
    young.touch()
    size = sum(shard.stat().st_size for shard in STORE.glob("rows-*.parquet"))
    done = mallowspo("cache", "gc", *filled)
    assert [file for file in rubbish if file.exists()] == []
    assert young.exists()
    for file in rubbish:
        assert f"removed {file}" in done.out
    (merged,) = STORE.glob("rows-*.parquet")
    assert f"{size - merged.stat().st_size + 15:,} bytes freed" in done.out


def test_gc_drops_rows_of_other_data_only_where_that_is_asked(
    mallowspo: Command, filled: list[str], write_rows: Callable[..., Path]
) -> None:
    before = bits()
    less = f"dataset.path={write_rows(pair_rows(13), 'less.jsonl')}"
    for word in ("unused=keep", "seed=1"):
        assert mallowspo("cache", "gc", *filled, less, word).code == 0
        assert bits() == before
    done = mallowspo("cache", "gc", *filled, less, "unused=drop")
    assert "dropped 3 rows" in done.out
    after = bits()
    assert len(after) == 13
    assert after == {pair: before[pair] for pair in after}
    assert ["train", "9", "9", "9", "0"] in cells(mallowspo("cache", "inspect", *filled, less).out)


def test_gc_killed_between_writing_and_removing_leaves_the_store_whole(
    mallowspo: Command, filled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, honest = bits(), Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("rows-"):
            raise KeyboardInterrupt
        honest(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        assert mallowspo("cache", "gc", *filled).code != 0
    assert len(list(STORE.glob("rows-*.parquet"))) == 4
    assert bits() == before
    assert mallowspo("cache", "gc", *filled).code == 0
    assert len(list(STORE.glob("rows-*.parquet"))) == 1
    assert bits() == before


def test_gc_refuses_and_touches_nothing_while_a_pass_runs(
    mallowspo: Command, filled: list[str]
) -> None:
    (STORE / "rows-1-x.damaged").touch()
    before = sorted(STORE.iterdir())
    with Claims(STORE / "claims").held("a_block"):
        line = complaint(mallowspo("cache", "gc", *filled))
    assert f"process {os.getpid()} on" in line
    assert sorted(STORE.iterdir()) == before
    assert mallowspo("cache", "gc", *filled).code == 0


def test_gc_removes_what_the_cache_holds_unused_but_never_the_recipes_own(
    mallowspo: Command, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("MALLOWSPO_CACHE", str(cache))
    bare = [word for word in words if not word.startswith("reference.store=")]
    assert mallowspo("cache-ref", *bare).code == 0
    own = [*(cache / "reference").iterdir(), *(cache / "data").iterdir()]
    assert len(own) == 2
    other = ["train.precision=bf16", "dataset.max_length=4000"]
    assert mallowspo("cache-ref", *bare, *other).code == 0
    others = [*(cache / "reference").iterdir(), *(cache / "data").iterdir()]
    others = [place for place in others if place not in own]
    assert len(others) == 2
    assert "unused for" not in mallowspo("cache", "gc", *bare, "days=1").out
    assert all(place.is_dir() for place in [*own, *others])
    # As if all had lain there for ages; reading its own would have made them new.
    monkeypatch.setattr(maintenance, "last_used", lambda _: 0.0)
    done = mallowspo("cache", "gc", *bare, "days=30")
    assert done.code == 0, done.err
    for place in others:
        assert f"removed {place}, unused for 30 days" in done.out
        assert not place.exists()
    assert all(place.is_dir() for place in own)
    assert len(list((cache / "models").iterdir())) >= 1
    assert ["train", "12", "12", "12", "0"] in cells(mallowspo("cache", "inspect", *bare).out)


def test_export_gives_the_rows_of_the_store_with_their_place_in_the_file(
    mallowspo: Command, words: list[str], write_rows: Callable[..., Path]
) -> None:
    # Row 9 is row 2 once more.
    data = [*pair_rows(9), pair_rows(3)[2], *pair_rows(16)[9:]]
    words = [*words, f"dataset.path={write_rows(data, 'doubled.jsonl')}"]
    done = mallowspo("cache", "export", *words, "to=out/rows.parquet")
    assert done.code == 0, done.err
    assert done.out.strip() == "out/rows.parquet"
    table = pq.read_table("out/rows.parquet")
    lines = table.to_pylist()
    assert sorted(line["row"] for line in lines) == list(range(17))
    assert {line["split"] for line in lines} == {"train", "eval"}
    assert len({line["pair_id"] for line in lines if line["row"] in (2, 9)}) == 1
    assert len({line["pair_id"] for line in lines}) == 16
    store = ReferenceStore.open(STORE, None)
    rows = store.lookup(table["pair_id"].to_pylist())
    for column in COLUMNS:
        assert table[column].to_pylist() == getattr(rows, column).tolist(), column
    for line in lines:
        # The tiny tokenizer has a token for each byte, and one that ends a response.
        for side in ("chosen", "rejected"):
            text = data[line["row"]][side]
            assert line[f"{side}_tokens"] == len(text) + 1, (line["row"], side)
        one, two = (line[f"{s}_entropy_sum"] / line[f"{s}_tokens"] for s in ("chosen", "rejected"))
        share = (one + two) / 2 / math.log(store.vocab_size)
        assert line["normalised_entropy"] == pytest.approx(share, rel=1e-6)
        assert line["raw_weight"] == pytest.approx(-math.log(share), rel=1e-5)
    prompts = {line["row"]: line["prompt_tokens"] for line in lines}
    spare = {prompts[row] - len(data[row]["prompt"]) for row in prompts}
    assert len(spare) == 1


def test_export_weighs_as_the_recipe_does(mallowspo: Command, filled: list[str]) -> None:
    def weights(*words: str) -> dict[int, float]:
        done = mallowspo("cache", "export", *filled, "to=rows.parquet", *words)
        assert done.code == 0, done.err
        lines = pq.read_table("rows.parquet").to_pylist()
        return {line["row"]: line["w"] for line in lines if line["split"] == "train"}

    auto = weights()
    assert sum(auto.values()) / 12 == pytest.approx(1, abs=1e-6)
    lines = pq.read_table("rows.parquet").to_pylist()
    raw = {line["row"]: line["raw_weight"] for line in lines}
    assert weights("dispersion.scale=3") == pytest.approx({row: 3 * raw[row] for row in auto})
    assert set(weights("dispersion.mode=constant").values()) == {1}
    shuffled = weights("dispersion.mode=shuffled")
    assert shuffled != auto
    assert sorted(shuffled.values()) == sorted(auto.values())


def test_export_fills_what_is_missing_first(mallowspo: Command, words: list[str]) -> None:
    assert mallowspo("cache", "export", *words, "to=rows.parquet").code == 0
    assert pq.read_table("rows.parquet").num_rows == 16
    assert len(ReferenceStore.open(STORE, None)) == 16


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        ([], "found no to="),
        (["to="], "to is empty"),
        (["to=rows.csv"], "to=rows.csv does not end in .parquet"),
        (["to=there.parquet"], "to=there.parquet is a directory"),
        (["to=pairs.jsonl/rows.parquet"], "cannot write the export"),
    ],
)
def test_export_to_a_bad_place_scores_and_writes_nothing(
    mallowspo: Command, words: list[str], tmp_path: Path, to: list[str], expected: str
) -> None:
    (tmp_path / "there.parquet").mkdir()
    assert expected in complaint(mallowspo("cache", "export", *words, *to))
    assert list(tmp_path.rglob("rows*")) == []
    assert list(tmp_path.rglob("*.tmp")) == []


def test_an_export_that_fails_leaves_the_older_file(
    mallowspo: Command, filled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("rows.parquet").write_text("older")

    def killed(_table: object, target: Path) -> None:
        target.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr("mallowspo_cli.commands.cache_rows.pq.write_table", killed)
    assert mallowspo("cache", "export", *filled, "to=rows.parquet").code != 0
    assert Path("rows.parquet").read_text() == "older"
    assert list(Path.cwd().glob(".*.tmp")) == []


@pytest.mark.parametrize(
    ("verb", "word", "expected"),
    [
        ("inspect", "to=x", "to is not a key"),
        ("verify", "rows=0", "rows=0 is not a whole number"),
        ("verify", "rows=many", "rows=many is not a whole number"),
        ("verify", "rows=", "rows is empty"),
        ("diff", "with=nowhere", "no reference store at nowhere"),
        ("diff", "with=.", "no reference store at"),
        ("diff", "with=foreign", "manifest.json is not a manifest of version"),
        ("gc", "unused=dorp", "Did you mean 'drop'?"),
        ("gc", "days=-1", "days=-1 is not a whole number"),
        ("gc", "train.epochs=0", "train.epochs=0 is out of range"),
    ],
)
def test_a_wrong_word_is_named(
    mallowspo: Command, words: list[str], verb: str, word: str, expected: str
) -> None:
    Path("foreign").mkdir()
    Path("foreign/manifest.json").write_text('{"mine": 1}')
    assert expected in complaint(mallowspo("cache", verb, *words, word))


@pytest.mark.parametrize("verb", ["inspect", "verify", "diff", "gc", "export"])
def test_a_store_built_otherwise_is_refused_without_the_verbs_own_words(
    mallowspo: Command, filled: list[str], verb: str
) -> None:
    own = {
        "verify": ["rows=5"],
        "diff": ["with=mine"],
        "gc": ["days=5"],
        "export": ["to=x.parquet"],
    }
    line = complaint(mallowspo("cache", verb, *filled, *own.get(verb, []), "train.precision=bf16"))
    assert "compute: float32, now bfloat16 autocast over float32" in line
    assert "mallowspo cache-ref recipe=quickstart" in line
    assert not any(word in line for word in ("rows=5", "with=mine", "days=5", "to=x.parquet"))
