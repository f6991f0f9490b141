"""Reading pairs: every kind of file, splits, and refusals in one line that name the place."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from mallowspo_cli.data.dataset import load_pairs
from mallowspo_cli.data.pairs import PreferencePair
from mallowspo_cli.errors import DataError
from mallowspo_cli.recipe.schema import DatasetConfig
from tests.conftest import pair_rows

ROWS = pair_rows(7)


def config(path: Path | str, **keys: Any) -> DatasetConfig:
    return DatasetConfig(path=str(path), **{"eval_split": None, **keys})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format of the path's ending."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(pairs: list[PreferencePair]) -> list[dict[str, str]]:
    return [
        {
            "prompt": pair.prompt[0].content,
            "chosen": pair.chosen.content,
            "rejected": pair.rejected.content,
        }
        for pair in pairs
    ]


def refusal(config: DatasetConfig, split: str = "train") -> str:
    with pytest.raises(DataError) as error:
        load_pairs(config, split)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_a_file_of_any_kind_gives_its_rows_in_order_and_says_where_each_is(
    tmp_path: Path, ending: str
) -> None:
    path = write(tmp_path / f"pairs.{ending}", ROWS)
    pairs = load_pairs(config(path), "train")
    assert contents(pairs) == ROWS
    assert [pair.row for pair in pairs] == [f"pairs.{ending} row {i}" for i in range(7)]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_words_that_look_like_missing_values_and_line_ends_survive(
    tmp_path: Path, ending: str
) -> None:
    rows = [
        {"prompt": "NA", "chosen": "None", "rejected": "null"},
        {"prompt": 'a "b",\nc', "chosen": "🙂 é", "rejected": " nan "},
    ]
    path = write(tmp_path / f"pairs.{ending}", rows)
    assert contents(load_pairs(config(path), "train")) == rows


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_messages_are_read_from_files(tmp_path: Path, ending: str) -> None:
    user = {"role": "user", "content": "Hi"}
    row = {side: [user, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    (pair,) = load_pairs(config(write(tmp_path / f"pairs.{ending}", [row])), "train")
    assert contents([pair]) == [{"prompt": "Hi", "chosen": "chosen", "rejected": "rejected"}]


def test_a_directory_holds_a_file_for_each_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS[:4])
    write(tmp_path / "held.csv", ROWS[4:])
    both = config(tmp_path, eval_split="held")
    assert contents(load_pairs(both, "train")) == ROWS[:4]
    assert contents(load_pairs(both, "eval")) == ROWS[4:]
    assert "has no split 'test'" in refusal(config(tmp_path, eval_split="test"), "eval")


def test_a_glob_reads_its_files_in_name_order(tmp_path: Path) -> None:
    write(tmp_path / "part-1.jsonl", ROWS[3:])
    write(tmp_path / "part-0.jsonl", ROWS[:3])
    pairs = load_pairs(config(tmp_path / "part-*.jsonl"), "train")
    assert contents(pairs) == ROWS
    assert pairs[5].row == f"{tmp_path}/part-*.jsonl row 5"
    write(tmp_path / "part-2.csv", ROWS)
    assert "mixes .jsonl and .csv" in refusal(config(tmp_path / "part-*"))


def test_the_quickstart_pairs_ship_with_the_package() -> None:
    both = config("package:quickstart_pairs", eval_split="eval")
    train, held_out = load_pairs(both, "train"), load_pairs(both, "eval")
    assert min(len(train), len(held_out)) > 100
    assert "no data at package:nothing" in refusal(config("package:nothing"))


def test_held_out_pairs_are_a_fixed_share_disjoint_from_training_and_cover_the_rest(
    write_rows: Callable[..., Path],
) -> None:
    path = write_rows(pair_rows(40))
    held = config(path, eval_size=9)
    train, evaluation = load_pairs(held, "train"), load_pairs(held, "eval")
    assert (len(train), len(evaluation)) == (31, 9)
    rows = [pair.row for pair in (*train, *evaluation)]
    assert sorted(rows) == sorted(pair.row for pair in load_pairs(config(path), "train"))
    assert load_pairs(held, "train") == train
    assert load_pairs(held, "eval") == evaluation
    # The data's order, which is what `train.order=sequential` means.
    assert [int(pair.row.split()[-1]) for pair in train] == sorted(
        int(pair.row.split()[-1]) for pair in train
    )


def test_without_an_eval_split_and_size_nothing_is_held_out(
    write_rows: Callable[..., Path],
) -> None:
    path = write_rows(ROWS)
    assert load_pairs(config(path), "eval") == []
    assert len(load_pairs(config(path), "train")) == 7


def test_holding_out_every_pair_is_refused(write_rows: Callable[..., Path]) -> None:
    path = write_rows(ROWS)
    for size in (7, 8):
        assert f"dataset.eval_size={size} leaves none of 7" in refusal(config(path, eval_size=size))


def test_a_file_is_never_its_own_held_out_split(write_rows: Callable[..., Path]) -> None:
    path = write_rows(ROWS)
    for place in (path, path.with_name("pair*.jsonl")):
        own = config(place, eval_split="eval")
        assert len(load_pairs(own, "train")) == 7
        assert "has no split 'eval'. Set dataset.eval_split=null" in refusal(own, "eval")


@pytest.mark.parametrize(
    "path", ["./nothing", "/no/where/pairs.jsonl", "pairs.parquet", "~/no/such/place.csv"]
)
def test_a_missing_path_is_refused(path: str) -> None:
    assert refusal(config(path)) == f"no data at {path}."


@pytest.mark.parametrize("name", ["someone/nothing", "nothing", "a/b/c", "what is this"])
def test_a_hub_data_set_that_cannot_be_reached_is_refused(name: str) -> None:
    assert refusal(config(name)).startswith(f"{name} is not a file or directory here, and cannot")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "cho\n'),
        ("b.jsonl", b"hello\n"),
        ("c.json", b"[1, 2"),
        ("d.json", b"[]"),
        ("e.jsonl", b"\n\n"),
        ("f.jsonl", b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}\n'),
        ("g.csv", b"prompt,chosen,rejected\ncaf\xe9,a,b\n"),
        ("h.csv", b'prompt,chosen,rejected\n"p,a,b\n'),
        ("i.csv", b"prompt,chosen,rejected\n"),
        ("j.parquet", b"PAR1 not really PAR1"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert name in refusal(config(tmp_path / name))


def test_a_broken_line_is_named_by_its_row(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + '{"prompt" 3}\n')
    assert "row 1" in refusal(config(tmp_path / "x.jsonl"))


def test_an_empty_file_and_an_unknown_ending_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    assert refusal(config(tmp_path / "pairs.jsonl")) == "pairs.jsonl is empty."
    (tmp_path / "pairs.txt").write_text("hello")
    assert refusal(config(tmp_path / "pairs.txt")).startswith("cannot read pairs.txt; expected")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": None}, "pairs.jsonl row 2: the pair has no rejected response."),
        ({"chosen": ""}, "pairs.jsonl row 2: the pair has no chosen response."),
        ({"prompt": None}, "pairs.jsonl row 2: there is no prompt; text responses need one."),
    ],
)
def test_a_row_that_is_no_pair_is_refused_by_file_and_row(
    write_rows: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    rows = [ROWS[0], ROWS[1], {**ROWS[2], **change}, ROWS[3]]
    assert refusal(config(write_rows(rows))).startswith(message)


def test_a_missing_column_is_refused_by_file_and_row(write_rows: Callable[..., Path]) -> None:
    rows = [ROWS[0], {key: ROWS[1][key] for key in ("prompt", "chosen")}]
    expected = "pairs.jsonl row 1: the pair has no rejected response."
    assert refusal(config(write_rows(rows))) == expected


def test_unknown_columns_and_unknown_formats_are_refused(
    write_rows: Callable[..., Path],
) -> None:
    path = write_rows([{"question": "x", "answer": "y"}])
    assert "pairs.jsonl: cannot tell the layout from the columns answer, question." in refusal(
        config(path)
    )
    assert "dataset.format=hhh is not known" in refusal(config(path, format="hhh"))


def test_pairs_of_one_prompt_never_stand_on_both_sides(write_rows: Callable[..., Path]) -> None:
    rows = [
        {"prompt": f"Say {index // 4}", "chosen": f"Good {index}", "rejected": f"Bad {index}"}
        for index in range(40)
    ]
    held = config(write_rows(rows), eval_size=9)
    train, evaluation = load_pairs(held, "train"), load_pairs(held, "eval")
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in evaluation}
    # Whole prompts of 4 pairs, until there are at least 9.
    assert (len(train), len(evaluation)) == (28, 12)
