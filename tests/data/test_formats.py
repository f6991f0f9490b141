"""The layouts: what becomes a pair, and what is refused in one line that names the row."""

from typing import Any

import pytest

from mallowspo_cli.data.formats import choose_format, format_names, register_format, trl
from mallowspo_cli.data.pairs import Message, PreferencePair
from mallowspo_cli.errors import DataError

USER, OTHER = {"role": "user", "content": "Hi"}, {"role": "user", "content": "Bye"}
SYSTEM = {"role": "system", "content": "Be brief"}
GOOD, BAD = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
PAIR = PreferencePair(
    (Message("user", "Hi"),), Message("assistant", "yes"), Message("assistant", "no"), "f row 3"
)


def refusal(row: dict[str, Any]) -> str:
    with pytest.raises(DataError) as error:
        trl(row, "f row 3")
    message = str(error.value)
    assert message.startswith("f row 3: ")
    assert "\n" not in message
    return message


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
    assert trl(row, "f row 3") == PAIR


def test_system_prompts_and_earlier_turns_stay_in_the_prompt() -> None:
    history = [SYSTEM, USER, BAD, OTHER]
    expected = tuple(Message(m["role"], m["content"]) for m in history)
    rows: list[dict[str, Any]] = [
        {"prompt": history, "chosen": "yes", "rejected": "no"},
        {"chosen": [*history, GOOD], "rejected": [*history, BAD]},
        {"prompt": "Bye", "chosen": [*history, GOOD], "rejected": [*history, BAD]},
    ]
    for row in rows:
        assert trl(row, "").prompt == expected


def test_contents_are_kept_to_the_letter() -> None:
    pair = trl({"prompt": " p\n", "chosen": "  a ", "rejected": "a"}, "")
    assert (pair.prompt[0].content, pair.chosen.content, pair.rejected.content) == (
        " p\n",
        "  a ",
        "a",
    )


@pytest.mark.parametrize("column", ["chosen", "rejected"])
@pytest.mark.parametrize("value", [None, "", "  \n", [], [{"role": "assistant", "content": " "}]])
def test_a_missing_or_blank_response_is_refused(column: str, value: Any) -> None:
    other = "yes" if isinstance(value, str | None) else [GOOD]
    row = {"prompt": "Hi", "chosen": other, "rejected": other, column: value}
    assert refusal(row).endswith(f"the pair has no {column} response.")
    del row[column]
    assert refusal(row).endswith(f"the pair has no {column} response.")


def test_equal_responses_are_refused() -> None:
    assert "are equal" in refusal({"prompt": "Hi", "chosen": "yes", "rejected": "yes"})
    assert "are equal" in refusal({"chosen": [USER, GOOD], "rejected": [USER, GOOD]})


@pytest.mark.parametrize("prompt", [None, "", []])
def test_text_responses_need_a_prompt(prompt: Any) -> None:
    assert "there is no prompt" in refusal({"prompt": prompt, "chosen": "a", "rejected": "b"})
    assert "there is no prompt" in refusal({"chosen": "a", "rejected": "b"})


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


def test_auto_tells_the_layout_from_the_columns() -> None:
    assert choose_format("auto", {"prompt": "", "chosen": "", "rejected": ""}, "f") is trl
    assert choose_format("auto", {"chosen": "", "rejected": "", "more": 1}, "f") is trl
    assert choose_format("trl", {"anything": 1}, "f") is trl


def test_unknown_columns_and_unknown_formats_are_refused_in_one_line() -> None:
    with pytest.raises(DataError, match=r"^f: cannot tell .* columns answer, question\. ") as error:
        choose_format("auto", {"question": 1, "answer": 2}, "f")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"^dataset.format=tlr is not known") as error:
        choose_format("tlr", {}, "f")
    assert all(name in str(error.value) for name in format_names())
    assert "\n" not in str(error.value)


def test_a_format_name_can_be_taken_once() -> None:
    assert format_names()[0] == "auto"
    with pytest.raises(ValueError, match="'trl'"):
        register_format("trl", lambda row: True)(trl)
