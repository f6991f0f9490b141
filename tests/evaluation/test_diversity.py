"""Diversity by hand-computed values and by what must not change it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.diversity import (
    FIRST_WORDS,
    Answer,
    distinct,
    ends_in_loop,
    prompt_values,
    read_answers,
    self_bleu,
    tfidf_diversity,
    words_of,
)

WORDS = st.lists(st.sampled_from("abcd"), max_size=12)


def values_of(*texts: str) -> dict[str, float]:
    """Metrics of the answers to one prompt."""
    answers = [Answer(text, len(text), False) for text in texts]
    return {name: column.item() for name, column in prompt_values([answers]).items()}


def test_words_are_runs_of_letters_and_single_marks_in_lower_case() -> None:
    assert words_of("It's 42, «Ärger»…") == ["it", "'", "s", "42", ",", "«", "ärger", "»", "…"]
    assert words_of(" \n") == []


def test_distinct_n_by_hand() -> None:
    words = ["a", "b", "a", "b", "a"]
    # a b; ab ba of 4; aba bab of 3.
    assert [distinct([words], order) for order in (1, 2, 3)] == [2 / 5, 2 / 4, 2 / 3]
    assert math.isnan(distinct([["a"]], 2))


def test_distinct_n_over_answers_counts_them_together_and_spans_none() -> None:
    # ab, ab and cd; b c, which only stands across, is none.
    assert distinct([["a", "b"], ["a", "b"], ["c", "d"]], 2) == 2 / 3
    one, two = ["a", "b", "c"], ["d", "e", "f"]
    assert distinct([one, two], 2) == 1
    assert distinct([one, one], 2) == 1 / 2


@given(WORDS)
def test_repetition_is_the_share_of_4_grams_that_came_before(words: list[str]) -> None:
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    seen = [gram in grams[:place] for place, gram in enumerate(grams)]
    found = values_of(" ".join(words))["repeated"]
    assert found == pytest.approx(np.mean(seen)) if grams else math.isnan(found)


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("one two three four " * 3, True),
        ("so it began and then " + "no " * 12, True),
        ("no " * 11, False),
        ("one two three four five six " * 2, False),
        # The last round is cut short.
        ("once upon a time a b c d a b c d a b c d a b", True),
        ("a b c d " * 5 + "and then it ended", False),
        ("", False),
    ],
)
def test_an_answer_ends_in_a_loop(text: str, loops: bool) -> None:
    assert ends_in_loop(words_of(text)) is loops


def test_self_bleu_by_hand() -> None:
    # Of "a b c d" against "a b c e": 3 of 4 words; 2 of 3 pairs, 1 of 2 triples and 0 of 1
    # fourfolds, each plus one.
    expected = (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    assert self_bleu([["a", "b", "c", "d"], ["a", "b", "c", "e"]]) == pytest.approx(expected)
    # Two words against four: their only pair plus one, and the penalty of brevity; the other way
    # round 2 of 4, 1 of 3, 0 of 2, 0 of 1.
    short = math.exp(1 - 4 / 2)
    long = (2 / 4 * 2 / 4 * 1 / 3 * 1 / 2) ** (1 / 4)
    found = self_bleu([["a", "b"], ["a", "b", "c", "d"]])
    assert found == pytest.approx((short + long) / 2)


def test_a_word_matches_as_often_as_in_the_one_reference_that_has_it_most() -> None:
    # "a a a" against "a a" and "b": two of three words.
    grams = self_bleu([["a", "a", "a"], ["a", "a"], ["b"]])
    first = (2 / 3 * 2 / 3 * 1 / 2) ** (1 / 3)
    # "a a" against "a a a" (as far away as "b", which is shorter and counts as closest): all.
    second, third = 1.0, 0.0
    assert grams == pytest.approx((first + second + third) / 3)


@given(st.lists(WORDS, min_size=2, max_size=4), st.randoms())
def test_self_bleu_lies_between_0_and_1_and_the_order_of_answers_does_not_matter(
    answers: list[list[str]], random
) -> None:
    found = self_bleu(answers)
    assert 0 <= found <= 1 + 1e-12
    random.shuffle(answers)
    assert self_bleu(answers) == pytest.approx(found)


@given(WORDS, st.integers(2, 4))
def test_equal_answers_have_no_diversity(words: list[str], count: int) -> None:
    text = " ".join(words)
    values = values_of(*[text] * count)
    assert values["self_bleu"] == pytest.approx(1)
    if words:
        assert values["tfidf_diversity"] == pytest.approx(0, abs=1e-12)
        assert values["between_1"] == pytest.approx(values["distinct_1"] / count)


def test_answers_without_a_common_word_are_as_diverse_as_can_be() -> None:
    values = values_of("one two three four five", "six seven eight nine ten")
    assert values["self_bleu"] == 0
    assert values["tfidf_diversity"] == pytest.approx(1)
    assert values["between_1"] == values["between_2"] == 1


def test_tfidf_diversity_by_hand() -> None:
    # Of four texts two have x and three have y; the vectors are (x, 0) and (x, y) in these weights.
    x, y = math.log(5 / 3) + 1, math.log(5 / 4) + 1
    expected = [1 - x / math.hypot(x, y), 0]
    assert tfidf_diversity([["x", "x y"], ["y", "Y"]]) == pytest.approx(expected, abs=1e-12)


def test_one_answer_to_a_prompt_says_nothing_of_the_diversity_between_answers() -> None:
    values = values_of("a b c d e")
    between = ("self_bleu", "tfidf_diversity", "between_1", "between_2", "between_1_start")
    assert all(math.isnan(values[name]) for name in between)
    assert values["distinct_1"] == 1


def test_empty_answers_are_counted_and_break_nothing() -> None:
    values = values_of("", "")
    assert values["words"] == 0
    assert math.isnan(values["distinct_1"])
    assert math.isnan(values["tfidf_diversity"])
    assert values["self_bleu"] == 1


def test_the_first_words_take_length_out_of_distinct_n() -> None:
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in rng.integers(60, size=4 * FIRST_WORDS)]
    short, long = values_of(" ".join(words[:FIRST_WORDS])), values_of(" ".join(words))
    assert long["distinct_1"] < short["distinct_1"]
    assert long["distinct_1_start"] == short["distinct_1_start"] == short["distinct_1"]


def test_answers_shorter_than_the_first_words_are_left_out_there() -> None:
    long = " ".join(f"w{i % 40}" for i in range(FIRST_WORDS))
    values = values_of("far too short", long)
    assert values["distinct_1_start"] == 40 / FIRST_WORDS
    # Over the answers of a prompt all have to have them.
    assert math.isnan(values["between_1_start"])
    assert values_of(long, long)["between_1_start"] == 20 / FIRST_WORDS


def test_length_and_cut_answers_are_means_over_a_prompts_answers() -> None:
    prompts = [[Answer("a b", 3, True), Answer("a b c d", 5, False)], [Answer("a", 2, False)] * 2]
    values = prompt_values(prompts)
    assert values["tokens"].tolist() == [4, 2]
    assert values["words"].tolist() == [3, 1]
    assert values["cut"].tolist() == [0.5, 0]


def test_a_prompts_values_do_not_depend_on_the_others_but_for_the_weights_of_words() -> None:
    first = [Answer("a b c", 3, False), Answer("a b d", 3, False)]
    second = [Answer("x y", 2, False), Answer("x z", 2, False)]
    both, alone = prompt_values([first, second]), prompt_values([first])
    for name in alone:
        if name != "tfidf_diversity":
            np.testing.assert_equal(both[name][0], alone[name][0])


def line(index: int, sample: int, output: str = "An answer.", finish: str = "stop") -> str:
    row = {"index": index, "sample": sample, "instruction": f"Say {index}", "output": output}
    return json.dumps(row | {"tokens": 3, "finish": finish}) + "\n"


def test_generations_are_read_by_instruction_in_order(tmp_path: Path) -> None:
    file = tmp_path / "generations.jsonl"
    rows = [line(1, 0), line(0, 1, "second", "length"), line(0, 0, "first")]
    file.write_text('{"seed": 7}\n' + "".join(rows) + '{"index": 1, "sam')
    settings, answers = read_answers(file)
    assert settings == {"seed": 7}
    assert list(answers) == ["Say 0", "Say 1"]
    assert [(a.text, a.cut) for a in answers["Say 0"]] == [("first", False), ("second", True)]


@pytest.mark.parametrize("content", ["", "[]\n", "{}\n", '{}\n{"index": 0}\n', "{}\n[1]\n", "?\n"])
def test_a_file_without_generations_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "generations.jsonl"
    file.write_text(content)
    with pytest.raises(EvalError, match="generations"):
        read_answers(file)
    with pytest.raises(EvalError, match="cannot read"):
        read_answers(tmp_path / "none.jsonl")
