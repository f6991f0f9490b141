"""The layouts: what becomes a pair, what is left out, what is refused in one line with the row."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mallowspo_cli.data.formats import (
    choose_format,
    format_name,
    format_names,
    hh,
    imdb,
    register_format,
    scored,
    sharegpt,
    shp,
    stack_exchange,
    trl,
    ultrafeedback,
)
from mallowspo_cli.data.layouts import html_text
from mallowspo_cli.data.pairs import Message, PreferencePair, Skipped
from mallowspo_cli.errors import DataError
from mallowspo_cli.raters import neg_log_phi
from mallowspo_cli.recipe.choices import Pairing
from mallowspo_cli.recipe.schema import DatasetConfig

WHERE = "f row 3"
DEFAULT = DatasetConfig(path="f")
ALL = DatasetConfig(path="f", pairing=Pairing.all)
USER, OTHER = {"role": "user", "content": "Hi"}, {"role": "user", "content": "Bye"}
SYSTEM = {"role": "system", "content": "Be brief"}
GOOD, BAD = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
PAIR = PreferencePair(
    (Message("user", "Hi"),), Message("assistant", "yes"), Message("assistant", "no"), WHERE
)


def found(layout: Any, row: dict[str, Any], config: DatasetConfig = DEFAULT) -> list[Any]:
    return list(layout(row, WHERE, config))


def only_pair(layout: Any, row: dict[str, Any], config: DatasetConfig = DEFAULT) -> PreferencePair:
    (pair,) = found(layout, row, config)
    assert isinstance(pair, PreferencePair)
    assert pair.row == WHERE
    return pair


def texts(pair: PreferencePair) -> tuple[str, str, str]:
    (prompt,) = pair.prompt
    assert (prompt.role, pair.chosen.role, pair.rejected.role) == ("user", "assistant", "assistant")
    return prompt.content, pair.chosen.content, pair.rejected.content


def responses(layout: Any, row: dict[str, Any], config: DatasetConfig) -> list[str]:
    """Chosen and rejected of each pair as "a > b"."""
    return [
        f"{pair.chosen.content} > {pair.rejected.content}" for pair in found(layout, row, config)
    ]


def left_out(layout: Any, row: dict[str, Any], config: DatasetConfig = DEFAULT) -> str:
    (skipped,) = found(layout, row, config)
    assert isinstance(skipped, Skipped)
    assert skipped.row == WHERE
    assert "row" not in skipped.cause
    return skipped.cause


def refusal(row: dict[str, Any], layout: Any = trl, config: DatasetConfig = DEFAULT) -> str:
    with pytest.raises(DataError) as error:
        found(layout, row, config)
    message = str(error.value)
    assert message.startswith(WHERE)
    assert "\n" not in message
    return message


# trl


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi", "chosen": "yes", "rejected": "no", "score": 3, "id": "x"},
    ],
)
def test_strings_messages_and_whole_conversations_become_the_same_pair(row: dict) -> None:
    assert found(trl, row) == [PAIR]
    assert math.isnan(PAIR.rater_neg_log_phi)


def test_system_prompts_and_earlier_turns_stay_in_the_prompt() -> None:
    history = [SYSTEM, USER, BAD, OTHER]
    expected = tuple(Message(m["role"], m["content"]) for m in history)
    rows: list[dict[str, Any]] = [
        {"prompt": history, "chosen": "yes", "rejected": "no"},
        {"chosen": [*history, GOOD], "rejected": [*history, BAD]},
        {"prompt": "Bye", "chosen": [*history, GOOD], "rejected": [*history, BAD]},
    ]
    for row in rows:
        assert only_pair(trl, row).prompt == expected


def test_contents_are_kept_to_the_letter() -> None:
    row = {"prompt": " p\n", "chosen": "  a ", "rejected": "a"}
    assert texts(only_pair(trl, row)) == (" p\n", "  a ", "a")


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue", "The sky is grey", ("The sky is", " blue", " grey")),
        ("A cat sat", "A car sat", ("A", " cat sat", " car sat")),
        ("Q: now?\n\nA: yes", "Q: now?\n\nA: no", ("Q: now?\n\nA:", " yes", " no")),
        ("Now? yes", "Now?\nno", ("Now?", " yes", "\nno")),
        ("It is", "It is so", ("It", " is", " is so")),
        ("Où  été", "Où  étage", ("Où", "  été", "  étage")),
    ],
)
def test_without_a_prompt_column_texts_share_the_words_they_begin_with(
    chosen: str, rejected: str, expected: tuple[str, str, str]
) -> None:
    pair = only_pair(trl, {"chosen": chosen, "rejected": rejected})
    assert texts(pair) == expected
    assert pair.prompt[0].content + pair.chosen.content == chosen


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Go", "chosen": "Go on", "rejected": "Stop"},
        {"prompt": "Go", "chosen": "Stop", "rejected": "Go on"},
        {"prompt": "Go", "chosen": "Go", "rejected": "Go on"},
        {"prompt": "Go", "chosen": "Go on", "rejected": "Go, now"},
        {"prompt": [{"role": "user", "content": "Go"}], "chosen": "Go on", "rejected": "Go, now"},
    ],
)
def test_a_text_that_happens_to_begin_like_the_prompt_keeps_its_beginning(row: dict) -> None:
    assert texts(only_pair(trl, row)) == ("Go", row["chosen"], row["rejected"])


@pytest.mark.parametrize("column", ["chosen", "rejected"])
@pytest.mark.parametrize("value", [None, "", "  \n", [], [{"role": "assistant", "content": " "}]])
def test_a_missing_or_blank_response_is_refused(column: str, value: Any) -> None:
    other = "yes" if isinstance(value, str | None) else [GOOD]
    row = {"prompt": "Hi", "chosen": other, "rejected": other, column: value}
    assert refusal(row).endswith(f"the pair has no {column} response.")
    del row[column]
    assert refusal(row).endswith(f"the pair has no {column} response.")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "yes", "rejected": "yes"},
        {"chosen": "yes", "rejected": "yes"},
        {"chosen": [USER, GOOD], "rejected": [USER, GOOD]},
        {"prompt": "Hi", "chosen": "Hi yes", "rejected": "Hi yes"},
    ],
)
def test_equal_responses_are_left_out_and_counted(row: dict[str, Any]) -> None:
    assert left_out(trl, row) == "responses are equal"


@pytest.mark.parametrize("prompt", [None, "", []])
def test_text_responses_need_a_prompt(prompt: Any) -> None:
    row = {"prompt": prompt, "chosen": "so a", "rejected": "so b"}
    assert refusal(row).endswith("there is no prompt; text responses need one.")


@pytest.mark.parametrize(("chosen", "rejected"), [("a", "b"), ("ab", "ac"), ("It", "It is")])
def test_texts_that_begin_with_different_words_need_a_prompt(chosen: str, rejected: str) -> None:
    message = refusal({"chosen": chosen, "rejected": rejected})
    assert "there is no prompt" in message
    assert "do not begin with the same words" in message


@pytest.mark.parametrize("prompt", [" \n", [{"role": "user", "content": " "}]])
def test_a_blank_prompt_is_refused(prompt: Any) -> None:
    row = {"prompt": prompt, "chosen": "a", "rejected": "b"}
    assert refusal(row).endswith("the prompt is empty.")


def test_a_conversation_of_the_response_alone_has_an_empty_prompt() -> None:
    assert "the prompt is empty" in refusal({"chosen": [GOOD], "rejected": [BAD]})


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, GOOD], "rejected": [OTHER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        {"prompt": "Hi", "chosen": [GOOD], "rejected": [USER, BAD]},
    ],
)
def test_responses_to_different_conversations_are_refused(row: dict[str, Any]) -> None:
    assert "do not continue the same conversation" in refusal(row)


def test_a_prompt_that_whole_conversations_would_hide_is_refused() -> None:
    turns = [GOOD, OTHER]
    row = {"prompt": "Hi", "chosen": [*turns, GOOD], "rejected": [*turns, BAD]}
    assert "3 messages, but not the prompt" in refusal(row)


def test_a_response_by_another_role_is_refused() -> None:
    assert "role 'user'" in refusal({"chosen": [USER, OTHER], "rejected": [USER, BAD]})


@pytest.mark.parametrize("value", [4, 4.5, True, {"text": "a"}])
def test_a_response_that_is_neither_text_nor_messages_is_refused(value: Any) -> None:
    row = {"prompt": "2 + 2", "chosen": value, "rejected": "5"}
    assert f"chosen is a {type(value).__name__}" in refusal(row)


@pytest.mark.parametrize("prompt", [4, {"text": "a"}, ["a"]])
def test_a_prompt_that_is_neither_text_nor_messages_is_refused(prompt: Any) -> None:
    assert ": prompt " in refusal({"prompt": prompt, "chosen": "a", "rejected": "b"})


def test_text_against_messages_is_refused() -> None:
    assert "expected a list" in refusal({"prompt": "Hi", "chosen": "a", "rejected": [BAD]})


# ultrafeedback

FEEDBACK = {
    "prompt_id": "0",
    "prompt": "Hi",
    "all_generated_responses": ["so-so", "yes", "no", "hm"],
    "all_rm_scores": [0.5, 0.75, 0.25, 0.5],
    "chosen": [USER, GOOD],
    "rejected": [USER, BAD],
}


def test_ultrafeedback_takes_the_published_pair() -> None:
    assert found(ultrafeedback, FEEDBACK) == [PAIR]


def test_ultrafeedback_pairs_all_responses_by_reward_but_for_ties() -> None:
    pairs = found(ultrafeedback, FEEDBACK, ALL)
    assert responses(ultrafeedback, FEEDBACK, ALL) == [
        "so-so > no",
        "yes > so-so",
        "yes > no",
        "yes > hm",
        "hm > no",
    ]
    assert pairs[2] == PAIR


def test_the_score_gap_holds_for_the_published_pair_too() -> None:
    wide = DatasetConfig(path="f", min_score_gap=0.5)
    assert found(ultrafeedback, FEEDBACK, wide) == [PAIR]
    wider = DatasetConfig(path="f", min_score_gap=0.6)
    assert left_out(ultrafeedback, FEEDBACK, wider) == "score gap below 0.6"


# hh

DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello, friend.\nAll well?\n\nHuman: No.\n\nAssistant:"


def test_hh_text_becomes_turns_and_two_last_answers() -> None:
    row = {
        "chosen": DIALOGUE + " I am sorry.\n\nTell me:\n- when?\n- where?",
        "rejected": DIALOGUE + " I am glad.",
    }
    pair = only_pair(hh, row)
    assert pair.prompt == (
        Message("user", "Hi"),
        Message("assistant", "Hello, friend.\nAll well?"),
        Message("user", "No."),
    )
    assert pair.chosen == Message("assistant", "I am sorry.\n\nTell me:\n- when?\n- where?")
    assert pair.rejected == Message("assistant", "I am glad.")


def test_names_within_a_line_of_hh_text_are_no_turns() -> None:
    start = "\n\nHuman: Who says Assistant: or\nHuman: here?\n\nAssistant:"
    pair = only_pair(hh, {"chosen": start + " Human: I do", "rejected": start + " Assistant: I"})
    assert texts(pair) == (
        "Who says Assistant: or\nHuman: here?",
        "Human: I do",
        "Assistant: I",
    )


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (f"{DIALOGUE} a\n\nHuman: b\n\nAssistant: c", f"{DIALOGUE} d"),
        (f"{DIALOGUE} a", f"{DIALOGUE} a\n\nHuman: b\n\nAssistant: c"),
        (f"{DIALOGUE} a\n\nHuman: b", f"{DIALOGUE} a\n\nHuman: c"),
        (f"{DIALOGUE} a\n\nAssistant: b", f"{DIALOGUE} c"),
        ("\n\nHuman: a\n\nAssistant: c", "\n\nHuman: b\n\nAssistant: c"),
        ("\n\nHuman: a", "\n\nHuman: b"),
    ],
)
def test_hh_dialogues_that_part_early_are_left_out(chosen: str, rejected: str) -> None:
    row = {"chosen": chosen, "rejected": rejected}
    assert left_out(hh, row) == "dialogues differ before the last turn"


@pytest.mark.parametrize(
    ("chosen", "rejected", "cause"),
    [
        (DIALOGUE, f"{DIALOGUE} a", "a response is empty"),
        (f"{DIALOGUE} a", f"{DIALOGUE} \n", "a response is empty"),
        (f"{DIALOGUE} a", f"{DIALOGUE} a", "responses are equal"),
        (f"{DIALOGUE} a", f"{DIALOGUE}  a\n", "responses are equal"),
        (DIALOGUE, DIALOGUE, "responses are equal"),
        ("\n\nHuman: \n\nAssistant: a", "\n\nHuman: \n\nAssistant: b", "the prompt is empty"),
    ],
)
def test_hh_rows_that_say_nothing_are_left_out(chosen: str, rejected: str, cause: str) -> None:
    assert left_out(hh, {"chosen": chosen, "rejected": rejected}) == cause


def test_text_that_is_no_dialogue_is_refused_as_hh() -> None:
    assert "rejected is no dialogue" in refusal({"chosen": DIALOGUE, "rejected": "so"}, hh)
    assert "rejected is missing; expected text" in refusal({"chosen": DIALOGUE}, hh)


PIECES = ["Human:", "Assistant:", "\n", "\n\n", " ", "a", "b", "é", "漢🙂", "\u2028", ": "]
TURN_TEXT = (
    st.lists(st.sampled_from(PIECES), max_size=8)
    .map(lambda pieces: "".join(pieces).strip())
    .filter(lambda text: "\n\nHuman:" not in text and "\n\nAssistant:" not in text)
)


@settings(deadline=None, derandomize=True)
@given(
    questions=st.lists(st.tuples(TURN_TEXT.filter(bool), TURN_TEXT), min_size=1, max_size=4),
    chosen=TURN_TEXT.filter(bool),
    rejected=TURN_TEXT.filter(bool),
)
def test_hh_text_parses_back_to_the_turns_it_was_made_of(
    questions: list[tuple[str, str]], chosen: str, rejected: str
) -> None:
    contents = [content for both in questions for content in both][:-1]
    speakers = ["Human", "Assistant"] * len(questions)
    start = "".join(f"\n\n{s}: {c}" for s, c in zip(speakers, contents, strict=False))
    start += "\n\nAssistant: "
    row = {"chosen": start + chosen, "rejected": start + rejected}
    if chosen == rejected:
        assert left_out(hh, row) == "responses are equal"
        return
    pair = only_pair(hh, row)
    roles = ["user", "assistant"] * len(questions)
    expected = [Message(r, c) for r, c in zip(roles, contents, strict=False)]
    assert list(pair.prompt) == expected
    assert (pair.chosen.content, pair.rejected.content) == (chosen, rejected)


# shp

POST = {
    "post_id": "x",
    "domain": "askbakers_train",
    "history": "Why did it sink?",
    "human_ref_A": "Too wet.",
    "human_ref_B": "Bad luck.",
    "labels": 1,
    "score_A": 9,
    "score_B": 3,
    "score_ratio": 3.0,
}
STRONG = DatasetConfig(path="f", min_score_ratio=2)


def test_the_shp_label_says_which_comment_is_chosen() -> None:
    assert texts(only_pair(shp, POST)) == ("Why did it sink?", "Too wet.", "Bad luck.")
    other = POST | {"labels": 0, "score_A": 3, "score_B": 9}
    assert texts(only_pair(shp, other)) == ("Why did it sink?", "Bad luck.", "Too wet.")


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"score_A": 6}, True),
        ({"score_A": 5}, False),
        # The scores are believed, not the column.
        ({"score_A": 5, "score_ratio": 4.0}, False),
        ({"score_A": 5, "score_B": 0, "score_ratio": 4.0}, True),
        ({"score_A": 5, "score_B": -1, "score_ratio": 1.5}, False),
    ],
)
def test_shp_pairs_below_the_score_ratio_are_left_out(change: dict, kept: bool) -> None:
    if kept:
        assert only_pair(shp, POST | change, STRONG)
    else:
        assert left_out(shp, POST | change, STRONG) == "score ratio below 2"


def test_shp_rows_that_contradict_themselves_are_left_out() -> None:
    assert left_out(shp, POST | {"labels": 0}) == "the label contradicts the scores"
    assert left_out(shp, POST | {"score_A": 3}) == "scores are equal"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history": None}, "history is missing; expected text"),
        ({"human_ref_B": 4}, "human_ref_B is a int; expected text"),
        ({"human_ref_B": " "}, "the pair has no rejected response"),
        ({"labels": 2}, "labels is 2; expected 1 (A is preferred) or 0"),
        ({"labels": "A"}, "labels is a str; expected a number"),
        ({"score_A": None}, "score_A is missing; expected a number"),
        ({"score_A": math.nan}, "score_A is nan; expected a finite number"),
        ({"score_B": 0, "score_ratio": None}, "score_ratio is missing; expected a number"),
    ],
)
def test_shp_rows_without_their_columns_are_refused(change: dict, message: str) -> None:
    assert message in refusal(POST | change, shp)


# stack_exchange


def answers(*scores: int, text: str = "<p>a{index}</p>") -> list[dict[str, Any]]:
    return [
        {"answer_id": index, "text": text.format(index=index), "pm_score": score, "selected": False}
        for index, score in enumerate(scores)
    ]


def question(*scores: int, text: str = "<p>a{index}</p>") -> dict[str, Any]:
    return {"qid": 1, "question": "<p>Why &lt;b&gt;?</p>", "answers": answers(*scores, text=text)}


def test_stack_exchange_pairs_the_best_with_the_worst() -> None:
    row = question(2, 5, 0, 5, 0)
    assert texts(only_pair(stack_exchange, row)) == ("Why <b>?", "a1", "a2")


def test_stack_exchange_pairs_all_answers_of_different_scores() -> None:
    assert responses(stack_exchange, question(1, 2, 1), ALL) == ["a1 > a0", "a1 > a2"]
    far = DatasetConfig(path="f", pairing=Pairing.all, min_score_gap=2)
    assert responses(stack_exchange, question(0, 1, 3), far) == ["a2 > a0", "a2 > a1"]


@pytest.mark.parametrize("config", [DEFAULT, ALL])
def test_questions_without_unequal_answers_are_left_out(config: DatasetConfig) -> None:
    assert left_out(stack_exchange, question(3, 3, 3), config) == "scores are equal"
    assert left_out(stack_exchange, question(3), config) == "fewer than two scored responses"
    assert left_out(stack_exchange, question(), config) == "fewer than two scored responses"
    same = question(3, 2, text="<p>a</p>")
    assert left_out(stack_exchange, same, config) == "responses are equal"


def test_answers_without_text_are_left_out_and_counted() -> None:
    row = question(4, 2, 1)
    row["answers"][0]["text"] = '<p><img src="plot.png" alt="plot"></p>'
    skipped, pair = found(stack_exchange, row)
    assert skipped == Skipped("an answer holds no text", WHERE)
    assert texts(pair)[1:] == ("a1", "a2")
    row["question"] = "<p> </p>"
    assert left_out(stack_exchange, row) == "the question holds no text"


def test_stack_exchange_rows_without_their_columns_are_refused() -> None:
    assert "question is missing" in refusal({"answers": answers(1, 2)}, stack_exchange)
    assert "answers is a str" in refusal(question(1) | {"answers": "a"}, stack_exchange)
    assert "answers[0] is a str" in refusal(question(1) | {"answers": ["a"]}, stack_exchange)
    row = question(1, 2)
    del row["answers"][1]["pm_score"]
    assert f"{WHERE}, answer 1: pm_score is missing" in refusal(row, stack_exchange)


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>One\n  line</p>\n\n<p>and <em>an</em>other</p>", "One line\n\nand another"),
        ("a &amp; b &lt;c&gt; &eacute;&#39;&nbsp;&#x6f22;", "a & b <c> é' 漢"),
        ("one<br>two<br/> three", "one\ntwo\nthree"),
        (
            "<p>Do:</p><pre><code>if a &lt; b:\n    go()\n\n\n# end\n</code></pre><p>Done</p>",
            "Do:\n\nif a < b:\n    go()\n\n\n# end\n\nDone",
        ),
        ("<p>call <code>f( x )</code></p>", "call f( x )"),
        ("<ul><li>a</li><li><p>b</p><p>c</p></li></ul>", "- a\n\n- b\n\nc"),
        ("<ul><li></li></ul><p>after</p>", "after"),
        ("<!-- language: c --><p>x</p>", "x"),
        ("<p>unclosed <b>tags", "unclosed tags"),
        ("</pre><p>a  b</p>", "a b"),
        ("1 < 2 and a<b", "1 < 2 and a<b"),
        ("<![foo[x]]>", "<![foo[x]]>"),
        ("plain", "plain"),
        ("", ""),
        ("<p> \n </p>", ""),
    ],
)
def test_html_becomes_paragraphs_code_and_characters(html: str, text: str) -> None:
    assert html_text(html) == text


@settings(deadline=None, derandomize=True)
@given(st.text(st.sampled_from("<>/!&;[]-#\"'= \npreliabrcode1x"), max_size=60))
def test_no_html_is_too_broken_to_read(html: str) -> None:
    assert html_text(html) == html_text(html).strip("\n")


# imdb


def test_imdb_responses_lose_the_beginning_and_keep_their_space() -> None:
    row = {"text": "We saw it", "chosen": "We saw it  twice. ", "rejected": "We saw it's bad"}
    assert texts(only_pair(imdb, row)) == ("We saw it", "  twice. ", "'s bad")


def test_imdb_takes_off_a_prefix_and_not_its_letters() -> None:
    row = {"text": "ab ", "chosen": "ab abba", "rejected": "ab baab"}
    assert texts(only_pair(imdb, row)) == ("ab ", "abba", "baab")


def test_imdb_responses_that_do_not_continue_the_text_are_refused() -> None:
    row = {"text": "We saw", "chosen": "We saw it", "rejected": "we saw it"}
    assert "rejected does not begin with the text column" in refusal(row, imdb)
    assert "no chosen response" in refusal({**row, "chosen": "We saw", "rejected": "We saw."}, imdb)
    assert "text is missing" in refusal({"chosen": "a", "rejected": "b"}, imdb)


# scored

RATED = {"prompt": "Hi", "responses": ["so-so", "yes", "no"], "scores": [2, 3.5, 1]}


def test_scored_responses_are_paired_by_their_scores() -> None:
    assert found(scored, RATED) == [PAIR]
    assert responses(scored, RATED, ALL) == ["so-so > no", "yes > so-so", "yes > no"]
    assert found(scored, RATED | {"prompt": [USER]}) == [PAIR]


def test_scored_responses_may_be_messages() -> None:
    row = RATED | {"responses": [{"content": "so-so"}, GOOD, {"role": None, "content": "no"}]}
    assert found(scored, row) == [PAIR]


def test_of_equal_scores_the_first_response_is_taken() -> None:
    row = {"prompt": "Hi", "responses": list("abcdef"), "scores": [1, 2, 0, 2, 0, 1]}
    assert responses(scored, row, DEFAULT) == ["b > c"]
    assert left_out(scored, row | {"scores": [1] * 6}, ALL) == "scores are equal"


def test_scores_too_close_together_are_left_out() -> None:
    for pairing in Pairing:
        config = DatasetConfig(path="f", pairing=pairing, min_score_gap=3)
        assert left_out(scored, RATED, config) == "score gap below 3"
    config = DatasetConfig(path="f", pairing=Pairing.all, min_score_gap=1.5)
    assert responses(scored, RATED, config) == ["yes > so-so", "yes > no"]


def test_a_response_without_a_score_is_in_no_pair() -> None:
    row = RATED | {"scores": [2, None, 1]}
    assert responses(scored, row, ALL) == ["so-so > no"]
    assert left_out(scored, RATED | {"scores": [2, None, None]}) == (
        "fewer than two scored responses"
    )


def test_without_scores_the_mean_over_those_who_rated_counts() -> None:
    raters = [[1, 5, None], [3, 4, None], [None, 4.5, 2]]
    row = {"prompt": "Hi", "responses": ["so-so", "yes", "no"], "rater_scores": raters}
    # Means 2, 4.5, 2.
    (first, second) = found(scored, row, ALL)
    assert responses(scored, row, ALL) == ["yes > so-so", "yes > no"]
    assert first.rater_neg_log_phi == second.rater_neg_log_phi == neg_log_phi(raters)
    assert math.isfinite(first.rater_neg_log_phi)
    raters[2][2] = None
    assert responses(scored, row, ALL) == ["yes > so-so"]


def test_scores_of_their_own_come_before_the_raters() -> None:
    raters = [[1, 2, 3], [1, 2, 3]]
    pair = only_pair(scored, RATED | {"rater_scores": raters})
    assert (pair.chosen, pair.rejected) == (PAIR.chosen, PAIR.rejected)
    assert pair.rater_neg_log_phi == neg_log_phi(raters)


def test_raters_who_contradict_each_other_leave_no_pair() -> None:
    row = {"prompt": "Hi", "responses": ["a", "b"], "rater_scores": [[1, 2], [2, 1]]}
    assert left_out(scored, row) == "scores are equal"


def test_equal_texts_of_different_scores_are_left_out_and_counted() -> None:
    row = {"prompt": "Hi", "responses": ["a", "a", "b"], "scores": [3, 2, 1]}
    equal, first, second = found(scored, row, ALL)
    assert equal == Skipped("responses are equal", WHERE)
    assert (first.rejected.content, second.rejected.content) == ("b", "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "the prompt is empty"),
        ({"responses": "yes"}, "responses is a str; expected a list"),
        ({"responses": ["a", "b", 3]}, "responses[2] is a int; expected text"),
        ({"responses": ["a", "b", {"text": "c"}]}, "responses[2] is missing; expected text"),
        ({"responses": ["a", "b", USER]}, "responses[2] is of role 'user'"),
        ({"responses": ["a", " ", "c"]}, "response 1 is blank"),
        ({"scores": [1, 2]}, "scores holds 2 numbers; expected one for each of 3 responses"),
        ({"scores": None}, "scores is missing; expected a list"),
        ({"scores": [1, 2, "3"]}, "scores is a str; expected a number"),
        ({"scores": [1, 2, True]}, "scores is a bool; expected a number"),
        ({"scores": [1, 2, math.inf]}, "scores is inf; expected a finite number"),
        ({"rater_scores": [[1, 2, 3], [1, 2]]}, "rater_scores[1] holds 2 numbers"),
        ({"rater_scores": [1, 2, 3]}, "rater_scores[0] is a int; expected a list"),
    ],
)
def test_scored_rows_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    assert message in refusal(RATED | change, scored)


# sharegpt


def said(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": said("gpt", "yes"), "rejected": said("chatgpt", "no")},
        {"chosen": "yes", "rejected": "no", "system": None},
        {"chosen": said("assistant", "yes"), "rejected": "no", "system": " "},
    ],
)
@pytest.mark.parametrize("speaker", ["human", "user"])
def test_sharegpt_rows_become_the_same_pair(row: dict[str, Any], speaker: str) -> None:
    assert found(sharegpt, {"conversations": [said(speaker, "Hi")], **row}) == [PAIR]


def test_a_sharegpt_system_prompt_comes_first_and_once() -> None:
    turns = [said("human", "Hi"), said("gpt", "no"), said("human", "Bye")]
    rest = {"chosen": "yes", "rejected": "no"}
    expected = tuple(Message(m["role"], m["content"]) for m in (SYSTEM, USER, BAD, OTHER))
    own = [said("system", "Be brief"), *turns]
    for row in (
        {"conversations": turns, "system": "Be brief"},
        {"conversations": own},
        {"conversations": own, "system": "Be brief"},
    ):
        assert only_pair(sharegpt, row | rest).prompt == expected
    row = {"conversations": own, "system": "Be long", **rest}
    assert "system and conversations differ" in refusal(row, sharegpt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": "Hi"}, "conversations is a str; expected a list"),
        ({"conversations": []}, "the prompt is empty"),
        ({"conversations": [USER]}, "conversations[0]: from is missing; expected text"),
        ({"conversations": [said("tool", "x")]}, "conversations[0] is from 'tool'; expected human"),
        ({"chosen": said("human", "yes")}, "role 'user'"),
        ({"chosen": said("gpt", " ")}, "no chosen response"),
        ({"rejected": None}, "rejected is missing; expected an object"),
    ],
)
def test_sharegpt_rows_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    row = {"conversations": [said("human", "Hi")], "chosen": "yes", "rejected": "no", **change}
    assert message in refusal(row, sharegpt)


# Which layout


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("trl", {"prompt": "", "chosen": "", "rejected": ""}),
        ("trl", {"chosen": "", "rejected": "", "more": 1}),
        ("trl", {"chosen": "It is so", "rejected": "It is not"}),
        ("trl", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}),
        ("trl", {"prompt": "Hi", "chosen": "Human: a", "rejected": "Human: b"}),
        ("trl", {"text": "all of it", "prompt": "Hi", "chosen": "a", "rejected": "b"}),
        ("trl", {"text": "", "prompt": "Hi", "chosen": "a", "rejected": "b"}),
        ("trl", {"text": None, "prompt": "Hi", "chosen": "a", "rejected": "b"}),
        ("ultrafeedback", FEEDBACK),
        ("hh", {"chosen": f"{DIALOGUE} a", "rejected": f"{DIALOGUE} b"}),
        ("hh", {"chosen": f"{DIALOGUE} a".strip(), "rejected": f"{DIALOGUE} b".strip()}),
        ("shp", POST),
        ("stack_exchange", question(1, 2)),
        ("imdb", {"text": "We saw", "chosen": "We saw it", "rejected": "We saw."}),
        ("imdb", {"text": "We saw", "chosen": "We saw it", "rejected": "we saw."}),
        ("scored", RATED),
        ("scored", {"prompt": "", "responses": [], "rater_scores": []}),
        ("sharegpt", {"conversations": [], "chosen": "", "rejected": ""}),
    ],
)
def test_auto_tells_the_layout_from_the_row(name: str, row: dict[str, Any]) -> None:
    assert format_name(choose_format("auto", row, "f")) == name


def test_a_named_layout_is_taken_whatever_the_row() -> None:
    for name in format_names()[1:]:
        assert format_name(choose_format(name, {"anything": 1}, "f")) == name
    assert choose_format("trl", FEEDBACK, "f") is trl


def test_unknown_columns_and_unknown_formats_are_refused_in_one_line() -> None:
    with pytest.raises(DataError, match=r"^f: cannot tell .* columns answer, question\. ") as error:
        choose_format("auto", {"question": 1, "answer": 2}, "f")
    assert all(name in str(error.value) for name in format_names()[1:])
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"^dataset.format=tlr is not known") as error:
        choose_format("tlr", {}, "f")
    assert all(name in str(error.value) for name in format_names())
    assert "\n" not in str(error.value)


def test_a_format_name_can_be_taken_once() -> None:
    assert format_names()[0] == "auto"
    with pytest.raises(ValueError, match="'trl'"):
        register_format("trl", lambda row: True)(trl)
