"""Messages from raw values."""

from typing import Any

import pytest

from mallowspo_cli.data.pairs import Message, messages
from mallowspo_cli.errors import DataError


def test_messages_keep_order_roles_and_content_to_the_letter() -> None:
    value = [{"role": "system", "content": " Be\n"}, {"role": "user", "content": "🙂"}]
    found = messages(value, "f row 0", "prompt")
    assert found == (Message("system", " Be\n"), Message("user", "🙂"))
    assert [message.as_dict() for message in found] == value


@pytest.mark.parametrize("value", ["text", {"role": "user", "content": "x"}, 3, None])
def test_messages_that_are_no_list_are_refused_naming_row_and_column(value: Any) -> None:
    with pytest.raises(DataError, match=r"^f row 7: prompt is .*expected a list of messages") as e:
        messages(value, "f row 7", "prompt")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "item",
    [
        "text",
        None,
        {},
        {"content": "no role"},
        {"role": None, "content": "no role"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "parts"}]},
    ],
)
def test_a_message_without_a_text_role_and_a_text_content_is_refused(item: Any) -> None:
    with pytest.raises(DataError, match=r"^f row 7: chosen holds .*'role' and 'content'") as e:
        messages([{"role": "user", "content": "x"}, item], "f row 7", "chosen")
    assert "\n" not in str(e.value)
