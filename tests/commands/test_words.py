"""A command's own words: told apart from the recipe's, each once, with a hint for a typo."""

import pytest

from mallowspo_cli.commands.prepare import default_device
from mallowspo_cli.commands.words import own_words, whole_number
from mallowspo_cli.errors import RecipeError


def test_own_words_are_told_apart_from_the_recipes() -> None:
    words = ["to=x=y", "model=tiny_random", "train.epochs=2", "recipe=quickstart"]
    assert own_words(words, ("to", "rows")) == ({"to": "x=y"}, words[1:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rows="], "rows is empty. Give a value: rows=..."),
        (["rows=1", "rows=2"], "rows is given twice: 1 and 2."),
        (["row=1"], "'row=1' is no word of this command. Did you mean 'rows'?"),
        (["rows"], "'rows' is no word of this command. Did you mean 'rows'?"),
    ],
)
def test_what_is_wrong_with_one_is_said(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        own_words(words, ("rows", "to"))
    assert str(error.value) == message


def test_a_count_is_a_whole_number_of_at_least_so_much() -> None:
    assert whole_number({}, "rows", 16) == 16
    assert whole_number({"rows": "3"}, "rows", 16) == 3
    for text in ("0", "-1", "2.5", "many"):
        with pytest.raises(RecipeError, match=f"rows={text} is not a whole number of at least 1"):
            whole_number({"rows": text}, "rows", 16)


@pytest.mark.parametrize(("local", "expected"), [(None, 0), ("3", 3), ("5", 1)])
def test_each_process_of_a_machine_has_a_device_of_its_own(
    monkeypatch: pytest.MonkeyPatch, local: str | None, expected: int
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert default_device().index == expected
