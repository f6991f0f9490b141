"""Each planted fault is found with its count and its row; clean data gives no complaint."""

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.data import prepare
from mallowspo_cli.data.advice import warnings
from mallowspo_cli.data.prepare import prepare_split
from mallowspo_cli.data.report import (
    find,
    length_bias,
    length_table,
    padded_tokens,
    predicted_gain,
    read_marks,
)
from mallowspo_cli.models.tiny import CHAT_TEMPLATE
from mallowspo_cli.recipe.choices import OnError, Truncation
from mallowspo_cli.recipe.schema import DatasetConfig
from tests.conftest import pair_rows

LENGTHS = Path(__file__).parents[2] / "benchmarks" / "lengths"
CLEAN, HELD_OUT = pair_rows(20)[:16], pair_rows(20)[16:]
Row = dict[str, Any]
Check = Callable[..., dict[str, Any]]


@pytest.fixture
def check(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> Check:
    """A function that gives the findings of rows, after 16 clean ones; `only` leaves those out."""

    def run(
        *rows: Row,
        held_out: list[Row] = HELD_OUT,
        only: bool = False,
        tokenizer: PreTrainedTokenizerBase = tiny_tokenizer,
        directory: Path = tmp_path,
        **keys: Any,
    ) -> dict[str, Any]:
        for name, part in (("train", [*([] if only else CLEAN), *rows]), ("eval", held_out)):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (tmp_path / f"{name}.jsonl").write_text(lines)
        config = DatasetConfig(path=str(tmp_path), on_error=OnError.drop, **keys)
        splits = {
            name: prepare_split(config, name, tokenizer, keep_empty=True)
            for name in ("train", "eval")
        }
        found = find(splits, config, read_marks(tokenizer, directory))  # type: ignore[arg-type]
        return {**found, "warnings": warnings(found)}

    return run


def changed(
    tokenizer: PreTrainedTokenizerBase, template: str, bos: str | None = None
) -> PreTrainedTokenizerBase:
    new = copy.deepcopy(tokenizer)
    new.chat_template = template
    if bos is not None:
        new.bos_token = bos
    return new


def the_warning(found: dict[str, Any]) -> str:
    """The only one: a fault is not taken for another."""
    (line,) = found["warnings"]
    assert "\n" not in line
    return line


def test_clean_data_gives_no_complaint(check: Check) -> None:
    found = check()
    assert found["warnings"] == []
    train = found["splits"]["train"]
    assert (train["rows"], train["pairs"], train["losses"]) == (16, 16, {})
    assert train["layouts"] == {"train.jsonl": "trl"}
    assert found["overlap"] == {"pairs": 0, "prompts": 0, "share": 0.0, "examples": []}
    assert train["bos"]["one"] == 16
    assert train["end"]["last"] == [
        {"token": "<|end|>", "id": train["end"]["last"][0]["id"], "count": 32, "ends": True}
    ]


def test_a_pair_that_occurs_twice(check: Check) -> None:
    found = check(CLEAN[3], CLEAN[5], CLEAN[3])
    repeated = found["splits"]["train"]["duplicates"]
    assert repeated["pairs"] == 5
    assert repeated["distinct"] == 2
    rows = [
        [f"train.jsonl row {i}" for i in (3, 16, 18)],
        ["train.jsonl row 5", "train.jsonl row 17"],
    ]
    assert repeated["examples"] == rows
    assert "more than once: 2, 3 too many (first: train.jsonl row 3," in the_warning(found)


def test_a_label_that_another_pair_contradicts(check: Check) -> None:
    swapped = {**CLEAN[7], "chosen": CLEAN[7]["rejected"], "rejected": CLEAN[7]["chosen"]}
    found = check(swapped)
    assert found["splits"]["train"]["contradictions"] == {
        "pairs": 2,
        "distinct": 1,
        "examples": [["train.jsonl row 7", "train.jsonl row 16"]],
    }
    assert "(first: train.jsonl row 7 and train.jsonl row 16)" in the_warning(found)


def test_the_same_responses_under_another_prompt_contradict_nothing(check: Check) -> None:
    other = {"prompt": "Other", "chosen": CLEAN[7]["rejected"], "rejected": CLEAN[7]["chosen"]}
    assert check(other)["warnings"] == []


def test_repeats_and_contradictions_are_those_of_a_plain_count_over_several_files(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "ROWS_PER_SHARD", 7)
    draw = np.random.default_rng(5)
    rows = []
    for _ in range(80):
        good, bad = draw.choice(6, 2, replace=False)
        rows.append({"prompt": f"{draw.integers(4)}", "chosen": f"{good}", "rejected": f"{bad}"})
    train = check(*rows, only=True)["splits"]["train"]
    counts = Counter((r["prompt"], r["chosen"], r["rejected"]) for r in rows)
    repeated = [n for n in counts.values() if n > 1]
    assert train["duplicates"]["pairs"] == sum(repeated)
    assert train["duplicates"]["distinct"] == len(repeated)
    both = [key for key in counts if (key[0], key[2], key[1]) in counts]
    assert train["contradictions"]["pairs"] == sum(counts[key] for key in both)
    assert train["contradictions"]["distinct"] == len(both) // 2 > 3
    for places in train["contradictions"]["examples"]:
        first, second = (rows[int(place.split()[-1])] for place in places)
        assert first["prompt"] == second["prompt"]
        assert first["chosen"] == second["rejected"] != second["chosen"]


def test_a_prompt_in_both_splits(check: Check) -> None:
    shared = {"prompt": CLEAN[4]["prompt"], "chosen": "one", "rejected": "two"}
    # The training row that is named is the prompt's first.
    found = check(
        {**shared, "chosen": "ten"}, held_out=[*HELD_OUT, shared, {**shared, "chosen": "six"}]
    )
    assert found["overlap"] == {
        "pairs": 2,
        "prompts": 1,
        "share": pytest.approx(2 / 6),
        "examples": [
            {"eval": "eval.jsonl row 4", "train": "train.jsonl row 4"},
            {"eval": "eval.jsonl row 5", "train": "train.jsonl row 4"},
        ],
    }
    assert "in the training split too: 2 (33.3%" in the_warning(found)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "Who?", "chosen": " Human", "rejected": "nobody"}, "role_name"),
        ({"prompt": "Who?", "chosen": "<|user|> says", "rejected": "nobody"}, "special_token"),
        (
            {
                "prompt": [{"role": "system", "content": " "}, {"role": "user", "content": "Who?"}],
                "chosen": [{"role": "assistant", "content": "me"}],
                "rejected": [{"role": "assistant", "content": "you"}],
            },
            "blank_turn",
        ),
    ],
)
def test_an_odd_text(check: Check, row: Row, kind: str) -> None:
    # A file cannot hold prompts of both kinds, text and messages.
    messages = isinstance(row["prompt"], list)
    place = "train.jsonl row 0" if messages else "train.jsonl row 16"
    found = check(row, only=messages)
    odd = found["splits"]["train"]["oddities"]
    assert odd.pop(kind) == {"count": 1, "examples": [place]}
    assert {other["count"] for other in odd.values()} == {0}
    assert f"(first: {place})" in the_warning(found)


def test_equal_responses(check: Check) -> None:
    found = check({"prompt": "Which?", "chosen": "this", "rejected": "this"})
    train = found["splits"]["train"]
    assert train["equal_responses"] == {"text": 1, "tokens": 0}
    (of_cause,) = train["losses"].values()
    assert of_cause["count"] == 1
    assert of_cause["share"] == 1 / 17
    assert of_cause["examples"] == [{"where": "train.jsonl row 16", "error": None}]
    assert (train["rows"], train["pairs"]) == (17, 16)
    assert "responses are equal: 1 (first: train.jsonl row 16)" in the_warning(found)


def test_responses_that_are_equal_once_they_are_cut(check: Check) -> None:
    same = "x" * 60
    row = {"prompt": "Go", "chosen": f"{same}a", "rejected": f"{same}b"}
    found = check(row, truncation=Truncation.keep_start, max_length=40)
    assert found["splits"]["train"]["equal_responses"] == {"text": 0, "tokens": 1}
    assert "(first: train.jsonl row 16). They may differ further on" in the_warning(found)


def test_responses_that_were_cut_have_no_end_token(check: Check) -> None:
    row = {"prompt": "Go", "chosen": "y" * 60, "rejected": "z"}
    found = check(row, truncation=Truncation.keep_start, max_length=40)
    end = found["splits"]["train"]["end"]
    assert (end["missing"], end["responses"]) == (1, 34)
    assert end["examples"] == ["train.jsonl row 16"]
    assert [(t["token"], t["count"], t["ends"]) for t in end["last"]] == [
        ("<|end|>", 33, True),
        ("y", 1, False),
    ]
    assert "dataset.truncation=drop" in the_warning(found)


def test_rows_that_are_no_pair_are_named_by_their_error(check: Check) -> None:
    broken = [{"prompt": f"{i}", "chosen": "a"} for i in range(5)]
    found = check(*broken)
    ((cause, of_cause),) = found["splits"]["train"]["losses"].items()
    assert cause == "dropped: no preference pair"
    assert of_cause["count"] == 5
    assert of_cause["share"] == pytest.approx(5 / 21)
    errors = [example["error"] for example in of_cause["examples"]]
    assert errors == [
        f"train.jsonl row {i}: the pair has no rejected response." for i in (16, 17, 18)
    ]
    assert "train.jsonl row 16: the pair has no rejected" in the_warning(found)


def test_pairs_over_the_limit_are_worth_a_line_when_they_are_many(check: Check) -> None:
    long = {"prompt": "Go", "chosen": "y" * 99, "rejected": "z"}
    assert "longer than 60 tokens: 1 (5.9%)" in the_warning(check(long, max_length=60))
    few = check(*pair_rows(60)[20:], long, max_length=60)
    assert few["splits"]["train"]["losses"]["dropped: longer than 60 tokens"]["count"] == 1
    assert few["warnings"] == []


def test_a_template_that_writes_bos_twice(
    check: Check, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    twice = changed(tiny_tokenizer, "{{ bos_token }}" + CHAT_TEMPLATE)
    found = check(tokenizer=twice)
    assert found["splits"]["train"]["bos"]["several"]["count"] == 16
    assert found["splits"]["train"]["bos"]["one"] == 0
    assert found["splits"]["train"]["bos"]["inside"]["count"] == 0
    lines = found["warnings"]
    assert [line.split(":")[0] for line in lines] == ["train", "eval"]
    assert "more than one <|begin|>: 16 (first: train.jsonl row 0)" in lines[0]


def test_bos_inside_a_text(check: Check) -> None:
    row = {"prompt": "Go", "chosen": "on <|begin|><|begin|>", "rejected": "z"}
    found = check(row)
    bos = found["splits"]["train"]["bos"]
    assert bos["inside"] == {"count": 1, "examples": ["train.jsonl row 16"]}
    assert (bos["one"], bos["several"]["count"]) == (17, 0)


def test_a_template_without_the_bos_that_the_tokenizer_puts(
    check: Check, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    without = changed(tiny_tokenizer, CHAT_TEMPLATE.removeprefix("{{ bos_token }}"))
    assert check(tokenizer=without)["warnings"] == []
    begin = without.bos_token_id
    without.backend_tokenizer.post_processor = TemplateProcessing(  # type: ignore[attr-defined]
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    found = check(tokenizer=without)
    assert found["splits"]["train"]["bos"]["none"]["count"] == 16
    assert "begin without <|begin|>: 16 (first: train.jsonl row 0)" in found["warnings"][0]


def test_prompts_whose_bos_was_cut_away(check: Check) -> None:
    row = {"prompt": "w" * 60, "chosen": "a", "rejected": "b"}
    found = check(row, truncation=Truncation.keep_end, max_length=60)
    none = found["splits"]["train"]["bos"]["none"]
    assert none == {"count": 1, "examples": ["train.jsonl row 16"]}
    assert "keep_end cuts it away" in the_warning(found)


def test_bos_that_opens_every_turn_is_no_fault(
    check: Check, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    # As SmolLM2 has it: <|im_start|> is BOS, and stands before each role.
    template = CHAT_TEMPLATE.replace("{{ bos_token }}", "").replace("'<|'", "bos_token + '<|'")
    template = template.replace("{{ '<|assistant|>' }}", "{{ bos_token + '<|assistant|>' }}")
    found = check(tokenizer=changed(tiny_tokenizer, template))
    assert found["warnings"] == []
    assert found["splits"]["train"]["bos"]["one"] == 16
    assert found["splits"]["train"]["bos"]["expected_inside"]


def test_responses_end_where_generation_stops(
    check: Check, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    other = changed(tiny_tokenizer, CHAT_TEMPLATE.replace("<|end|>", "<|pad|>"))
    found = check(tokenizer=other)
    assert found["splits"]["train"]["end"]["missing"] == 32
    assert "Generation stops at <|end|>" in found["warnings"][0]
    stops = [other.eos_token_id, other.pad_token_id]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    again = check(tokenizer=other)
    assert again["warnings"] == []
    assert again["splits"]["train"]["end"]["tokens"] == ["<|end|>", "<|pad|>"]


def test_a_split_of_which_nothing_is_left_is_a_finding(check: Check) -> None:
    found = check(max_length=4)
    train = found["splits"]["train"]
    assert train["pairs"] == 0
    assert train["lengths"] is train["length_bias"] is found["gain"] is None
    assert train["losses"]["dropped: prompt longer than 4 tokens"]["count"] == 16
    assert "train: no pair is left; rows: 16." in found["warnings"][0]
    assert json.loads(json.dumps(found)) == found


def test_a_preference_for_length_is_told_from_chance(check: Check) -> None:
    rows = [
        {"prompt": f"p {i}", "chosen": f"long {i} answer", "rejected": f"short {i}"}
        for i in range(40)
    ]
    found = check(*rows, only=True)
    assert "chosen response is the longer one in 100% of the pairs" in the_warning(found)
    assert "+6.0 tokens" in the_warning(found)
    assert check(*rows[:4], only=True)["warnings"] == []


def test_length_bias_and_table_of_three_pairs() -> None:
    lengths = np.asarray([[10, 5, 3], [2, 4, 8], [6, 1, 1]])
    assert length_bias(lengths) == {
        "chosen_longer": 1 / 3,
        "rejected_longer": 1 / 3,
        "mean_difference": pytest.approx((2 - 4 + 0) / 3),
    }
    table = length_table(lengths)
    assert (table["prompt"]["mean"], table["prompt"]["p50"], table["prompt"]["max"]) == (6, 6, 10)
    assert (table["row"]["p50"], table["row"]["max"]) == (10, 15)
    assert (table["pair"]["p50"], table["pair"]["max"]) == (14, 18)
    for numbers in table.values():
        histogram = numbers["histogram"]
        assert sum(histogram["counts"]) == 3
        assert histogram["edges"][-1] > numbers["max"]
        assert len(histogram["edges"]) == len(histogram["counts"]) + 1
    counts = table["chosen"]["histogram"]["counts"]
    assert [counts[i] for i in (1, 4, 5)] == [1, 1, 1]


def test_a_histogram_of_long_texts_has_few_bins_and_all_pairs() -> None:
    lengths = np.random.default_rng(0).integers(1, 5000, (300, 3))
    for numbers in length_table(lengths).values():
        assert 20 < len(numbers["histogram"]["counts"]) <= 40
        assert sum(numbers["histogram"]["counts"]) == 300


def test_predicted_gain_of_three_pairs_by_hand() -> None:
    lengths = np.asarray([[10, 5, 3], [2, 4, 8], [6, 1, 1]])
    gain = predicted_gain(lengths)
    # 2P + C + R: 28, 16, 14. P + C + R: 18, 14, 8.
    assert (gain["packed_tokens"], gain["shared_tokens"]) == (58, 40)
    assert gain["sharing"] == 58 / 40
    # One batch of 3 pairs whatever the order: 6 rows as long as the longest, 15.
    for size in ("4", "8"):
        assert gain["batches"][size] == {
            "padded_tokens": 90,
            "packing": 90 / 58,
            "both": 90 / 40,
        }
    # Pairs of the rows 15, 10, 7 in twos: 4 x 15 + 2 x 7, 4 x 15 + 2 x 10, or 4 x 10 + 2 x 15.
    assert padded_tokens(np.asarray([15, 10, 7]), 2) == 74
    assert padded_tokens(np.asarray([15, 7, 10]), 2) == 80
    assert padded_tokens(np.asarray([10, 7, 15]), 2) == 70
    assert 70 < gain["batches"]["2"]["padded_tokens"] < 80
    assert predicted_gain(lengths) == gain


@pytest.mark.parametrize(
    ("name", "limit", "sharing", "packing"),
    [
        ("dpo_en_demo", None, 1.40, None),
        ("dpo_en_demo", 1024, 1.33, (1.45, 1.68, 1.83)),
        ("dpo_en_demo", 2048, 1.39, (1.51, 1.88, 2.21)),
        ("hh_harmless_test", 1024, 1.58, (1.52, 1.98, 2.47)),
    ],
)
def test_predicted_gain_of_real_lengths_is_that_of_an_independent_count(
    name: str, limit: int | None, sharing: float, packing: tuple[float, ...] | None
) -> None:
    """Expected are ratios counted before this code was written (padding waste of 31 % is x1.45).

    They were counted from other lengths of the same pairs, whose prompts are some 15 tokens shorter
    (mean 412 against 428 at 2048): hence the tolerance.
    """
    lengths = np.asarray(json.loads((LENGTHS / f"lengths_{name}.json").read_text())["lengths"])
    if limit is not None:
        lengths = lengths[lengths[:, 0] < limit]
        lengths[:, 1:] = np.minimum(lengths[:, 1:], limit - lengths[:, :1])
    gain = predicted_gain(lengths)
    assert gain["sharing"] == pytest.approx(sharing, abs=0.015)
    if packing is not None:
        found = [numbers["packing"] for numbers in gain["batches"].values()]
        assert found == pytest.approx(list(packing), rel=0.03)
