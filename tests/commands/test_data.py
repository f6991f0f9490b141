"""`mallowspo data check` and `data show`: faults are findings, unreadable data is an error."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.report.data_tables import BARS, bar_line
from tests.commands.conftest import Command
from tests.commands.test_bad_input import complaint
from tests.conftest import pair_rows

ROWS = pair_rows(20)
FAULTS = [
    ROWS[2],
    {**ROWS[3], "chosen": ROWS[3]["rejected"], "rejected": ROWS[3]["chosen"]},
    {"prompt": "Who?", "chosen": "user", "rejected": "me"},
    {"prompt": "Which?", "chosen": "this", "rejected": "this"},
    {"prompt": "What?", "chosen": "that"},
]


@pytest.fixture
def words(write_rows: Callable[..., Path]) -> list[str]:
    """Words for 16 training rows and 4 held-out ones."""
    write_rows(ROWS[:16], "train.jsonl")
    place = write_rows(ROWS[16:], "eval.jsonl").parent
    return words_of(place)


def words_of(path: Path) -> list[str]:
    # The option of one's own file holds pairs out by number.
    splits = ["dataset.eval_split=eval", "dataset.eval_size=0"] if path.is_dir() else []
    return ["model=tiny_random", "dataset=local", f"dataset.path={path}", *splits]


def found(mallowspo: Command, words: list[str]) -> dict[str, Any]:
    done = mallowspo("data", "check", *words, "--json")
    findings = json.loads(done.out)
    # Nothing to train on is an error, told after the findings.
    assert done.code == (0 if findings["splits"]["train"]["pairs"] else 2), done.err
    return findings


def cells(out: str, label: str) -> list[str]:
    """The cells of a table's row."""
    (line,) = [line for line in out.splitlines() if line.strip().startswith(f"{label}  ")]
    return re.split(r"\s{2,}", line.strip())[1:]


def test_clean_data_has_nothing_to_complain_of(mallowspo: Command, words: list[str]) -> None:
    done = mallowspo("data", "check", *words)
    assert done.code == 0, done.err
    assert done.out.rstrip().endswith("- nothing to complain of")
    assert "layout of train.jsonl: trl" in done.out
    assert cells(done.out, "rows of the data") == ["16", "4"]


def test_json_holds_the_numbers_of_the_table_and_nothing_else_is_on_stdout(
    mallowspo: Command, words: list[str], write_rows: Callable[..., Path]
) -> None:
    write_rows([*ROWS[:16], *FAULTS], "train.jsonl")
    findings = found(mallowspo, words)
    out = mallowspo("data", "check", *words).out
    train, held_out = (findings["splits"][name] for name in ("train", "eval"))
    assert cells(out, "pairs") == [f"{s['pairs']}" for s in (train, held_out)] == ["19", "4"]
    assert cells(out, "dropped") == ["2", "0"]
    assert cells(out, "pairs that occur more than once") == ["1", "0"]
    assert train["duplicates"]["distinct"] == 1
    assert cells(out, "contradictory labels") == ["1", "0"]
    assert train["contradictions"]["distinct"] == 1
    assert cells(out, "pairs with role name") == ["1", "0"]
    assert cells(out, "equal responses") == [f"{train['equal_responses']['text']}", "0"]
    assert cells(out, "prompts with one BOS") == ["19", "4"]
    share = f"{train['length_bias']['chosen_longer']:.1%}"
    assert cells(out, "chosen is longer")[0] == share
    gain = findings["gain"]
    assert cells(out, "batches of 2 pairs") == [
        f"x{gain['batches']['2']['packing']:.2f}",
        f"x{gain['sharing']:.2f}",
        f"x{gain['batches']['2']['both']:.2f}",
    ]
    lengths = train["lengths"]["row"]
    table = out[out.index("train, tokens") :]
    assert cells(table[: table.index("eval, tokens")], "prompt + longer")[:7] == [
        f"{lengths[key]:.0f}" for key in ("mean", "p5", "p25", "p50", "p75", "p95", "max")
    ]
    for error in ("train.jsonl row 20: the pair has no rejected response", "train.jsonl row 19"):
        assert error in out
    shown = out[out.index("what to look at:") :].splitlines()[1:]
    assert [line.removeprefix("- ") for line in shown] == findings["warnings"]
    assert len(findings["warnings"]) == 5


def test_findings_and_picture_are_written(
    mallowspo: Command, words: list[str], tmp_path: Path
) -> None:
    findings = found(mallowspo, [*words, "to=seen/here"])
    place = tmp_path / "seen" / "here"
    assert sorted(p.name for p in place.iterdir()) == ["findings.json", "lengths.png"]
    assert json.loads((place / "findings.json").read_text()) == findings
    picture = (place / "lengths.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert found(mallowspo, [*words, "to=again"]) == findings
    assert (tmp_path / "again" / "lengths.png").read_bytes() == picture


def test_a_recipe_brings_its_data_and_errors_do_not_stop_it(
    mallowspo: Command, tiny_words: list[str], write_rows: Callable[..., Path]
) -> None:
    write_rows([*FAULTS[-1:], *ROWS])
    findings = found(mallowspo, [*tiny_words, "dataset.format=trl"])
    assert findings["splits"]["train"]["losses"]["dropped: no preference pair"]["count"] == 1
    assert findings["splits"]["eval"]["pairs"] == 4
    assert findings["overlap"]["pairs"] == 0
    assert complaint(mallowspo("train", *tiny_words, "dataset.format=trl"))


def test_no_pair_left_and_none_to_hold_out_are_findings(
    mallowspo: Command, write_rows: Callable[..., Path]
) -> None:
    words = words_of(write_rows(ROWS))
    short = found(mallowspo, [*words, "dataset.eval_size=4", "dataset.max_length=3"])
    assert short["splits"]["train"]["pairs"] == short["splits"]["eval"]["pairs"] == 0
    assert short["gain"] is None
    shown = mallowspo("data", "check", *words, "dataset.eval_size=4", "dataset.max_length=3")
    assert shown.code == 2
    assert "can be trained on; see above" in shown.err
    assert "no pair is left" in shown.out
    # The option's own eval_size is 100.
    few = found(mallowspo, words)
    assert list(few["splits"]) == ["train"]
    assert few["splits"]["train"]["pairs"] == 20
    assert "dataset.eval_size=100 leaves none of 20 pairs" in few["warnings"][0]


def test_parts_of_a_mixture_are_told_apart(
    mallowspo: Command,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = {"first": write_rows(ROWS[:12], "a.jsonl"), "second": write_rows(ROWS[12:], "b.jsonl")}
    (tmp_path / "dataset").mkdir()
    lines = [f"  {name}: {{path: {path}}}" for name, path in parts.items()]
    content = ["path: null", "eval_split: null", "eval_size: 2", "parts:", *lines, ""]
    (tmp_path / "dataset" / "mixed.yaml").write_text("\n".join(content))
    monkeypatch.setenv("MALLOWSPO_RECIPE_PATH", str(tmp_path))
    findings = found(mallowspo, ["model=tiny_random", "dataset=mixed"])
    train = findings["splits"]["train"]
    assert set(train["parts"]) == {"first", "second"}
    assert sum(train["parts"].values()) == train["pairs"] > 8
    assert findings["dataset"] == [str(path) for path in parts.values()]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["dataset.path=missing.jsonl"], "no data at missing.jsonl"),
        (["dataset.eval_split=test"], "no split 'test'"),
        (["dataset.max_lenght=9"], "Did you mean dataset.max_length?"),
        (["to="], "to is empty"),
        (["to=train.jsonl"], "cannot write the findings"),
    ],
)
def test_what_cannot_be_read_or_written_is_one_line(
    mallowspo: Command, words: list[str], extra: list[str], expected: str
) -> None:
    assert expected in complaint(mallowspo("data", "check", *words, *extra))


def test_data_is_asked_for(mallowspo: Command) -> None:
    for verb in ("check", "show"):
        line = complaint(mallowspo("data", verb, "model=tiny_random"))
        assert f"Example: mallowspo data {verb} dataset=local" in line
    assert "recipe=a recipe=b" in complaint(mallowspo("data", "check", "recipe=a", "recipe=b"))


def test_show_prints_the_pairs_text_and_place(mallowspo: Command, words: list[str]) -> None:
    done = mallowspo("data", "show", *words, "index=3")
    assert done.code == 0, done.err
    assert "train pair 3: train.jsonl row 3" in done.out
    assert f"<|user|>{ROWS[3]['prompt']}<|end|>" in done.out
    assert f"{ROWS[3]['chosen']}<|end|>" in done.out
    assert f"{ROWS[3]['rejected']}<|end|>" in done.out
    held_out = mallowspo("data", "show", *words, "split=eval")
    assert f"{ROWS[16]['chosen']}<|end|>" in held_out.out


def test_show_counts_pairs_past_rows_that_are_none(
    mallowspo: Command, words: list[str], write_rows: Callable[..., Path]
) -> None:
    write_rows([*FAULTS[-1:], *ROWS[:4]], "train.jsonl")
    words = [*words, "dataset.format=trl"]
    assert "train pair 0: train.jsonl row 1" in mallowspo("data", "show", *words).out


def test_show_prints_tokens_that_decode_to_the_text(
    mallowspo: Command,
    words: list[str],
    write_rows: Callable[..., Path],
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    row = {"prompt": "Say é", "chosen": 'A "b":7  c\n' + "d e " * 40 + "🙂.", "rejected": "no"}
    write_rows([row], "train.jsonl")
    done = mallowspo("data", "show", *words, "tokens=true")
    assert done.code == 0, done.err
    part = done.out[done.out.index("chosen: (") : done.out.index("rejected: (")]
    tokens = re.findall(r'("(?:[^"\\]|\\.)*"):(\d+)(?=\s)', part)
    ids = [int(number) for _, number in tokens]
    assert tiny_tokenizer.decode(ids) == row["chosen"] + "<|end|>"
    # The texts alone tell the same, where a token is a whole character.
    texts = [json.loads(text) for text, _ in tokens]
    assert "".join(texts).replace("␣", " ").startswith(row["chosen"][:-3])


def test_show_trains_in_colour_and_dims_the_prompt(
    mallowspo: Command, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    out = mallowspo("data", "show", *words).out
    assert f"\x1b[32m{ROWS[0]['chosen']}<|end|>\x1b[0m" in out
    assert f"\x1b[31m{ROWS[0]['rejected']}<|end|>\x1b[0m" in out
    assert "\x1b[2m<|begin|><|user|>" in out


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["index=16"], "expected 0 to 15"),
        (["index=-1"], "expected 0 to 15"),
        (["index=4", "split=eval"], "index=4 is no pair of the eval split; expected 0 to 3"),
        (["index=x"], "index=x"),
        (["split=test"], "expected train or eval"),
        (["tokens=yes"], "tokens=yes"),
        (["split=eval", "dataset.eval_split=null"], "no held-out pairs"),
    ],
)
def test_a_pair_that_is_not_there_is_named_with_the_range(
    mallowspo: Command, words: list[str], extra: list[str], expected: str
) -> None:
    given = {word.partition("=")[0] for word in extra}
    kept = [word for word in words if word.partition("=")[0] not in given]
    assert expected in complaint(mallowspo("data", "show", *kept, *extra))


def test_a_bar_line_shows_every_count() -> None:
    assert bar_line([0, 1, 8]) == f"{BARS[0]}{BARS[1]}{BARS[8]}"
    assert bar_line([0] * 39 + [1]) == BARS[0] * 9 + BARS[8]
    assert bar_line([0, 0]) == "  "
