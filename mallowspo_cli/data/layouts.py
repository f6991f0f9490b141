"""What layouts are made of: checked columns, pairs of scored responses, texts cut apart."""

import math
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from typing import Any

from mallowspo_cli.data.pairs import Message, PreferencePair, Skipped, messages
from mallowspo_cli.errors import DataError
from mallowspo_cli.recipe.choices import Pairing
from mallowspo_cli.recipe.schema import DatasetConfig

Row = dict[str, Any]
EQUAL = "responses are equal"
_KINDS = {str: "text", list: "a list", dict: "an object", float: "a number"}
_BLOCKS = {
    *("address", "article", "aside", "blockquote", "dd", "details", "div", "dl", "dt", "figure"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "section", "summary"),
    *("table", "tbody", "thead", "tr", "ul"),
}
"""Tags that begin and end a paragraph."""


def make_pair(
    prompt: tuple[Message, ...],
    chosen: Message,
    rejected: Message,
    where: str,
    theta: float = math.nan,
) -> PreferencePair | Skipped:
    """The pair, or Skipped where both responses are the same: it says nothing.

    Raises:
        DataError: no prompt, a blank response, a response by another role.
    """
    if not any(message.content.strip() for message in prompt):
        raise DataError(f"{where}: the prompt is empty.")
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.content.strip():
            raise DataError(f"{where}: the pair has no {name} response.")
        if response.role != "assistant":
            raise DataError(
                f"{where}: {name} ends in a turn of role {response.role!r}, expected 'assistant'."
            )
    if chosen == rejected:
        return Skipped(EQUAL, where)
    return PreferencePair(prompt, chosen, rejected, where, theta)


def answer(text: str) -> Message:
    """The assistant's message."""
    return Message("assistant", text)


def text_pair(row: Row, chosen: str, rejected: str, where: str) -> PreferencePair | Skipped:
    """The pair of two texts; without a prompt column it is the words they begin with."""
    prompt, start = row.get("prompt"), ""
    if "prompt" not in row:
        if chosen == rejected:
            return Skipped(EQUAL, where)
        prompt = start = shared_start(chosen, rejected)
    turns = history(prompt, where)
    if not turns:
        hint = "" if "prompt" in row else " Chosen and rejected do not begin with the same words."
        raise DataError(f"{where}: there is no prompt; text responses need one.{hint}")
    good, bad = (answer(text[len(start) :]) for text in (chosen, rejected))
    return make_pair(turns, good, bad, where)


def message_pair(row: Row, chosen: Any, rejected: Any, where: str) -> PreferencePair | Skipped:
    """The pair of two lists of messages, with or without the prompt's turns before the last."""
    prompt = history(row.get("prompt"), where)
    good, bad = messages(chosen, where, "chosen"), messages(rejected, where, "rejected")
    if prompt and max(len(good), len(bad)) <= 1:
        return make_pair(prompt, good[-1], bad[-1], where)
    if good[:-1] != bad[:-1]:
        raise DataError(f"{where}: chosen and rejected do not continue the same conversation.")
    repeated = [(m.role, m.content.strip()) for m in good[:-1]]
    turns = [(m.role, m.content.strip()) for m in prompt]
    if len(turns) > len(repeated) and turns[len(turns) - len(repeated) :] == repeated:
        # The prompt has more, such as a system turn.
        return make_pair(prompt, good[-1], bad[-1], where)
    if turns and repeated[len(repeated) - len(turns) :] != turns:
        raise DataError(
            f"{where}: chosen and rejected hold {len(good)} messages, but not the prompt. "
            "Put every turn but the last into the prompt, or leave the prompt out."
        )
    return make_pair(good[:-1], good[-1], bad[-1], where)


def scored_pairs(
    prompt: tuple[Message, ...],
    texts: Sequence[str],
    scores: Sequence[float | None],
    config: DatasetConfig,
    where: str,
    theta: float = math.nan,
) -> Iterator[PreferencePair | Skipped]:
    """Pairs of responses to one prompt, the higher score chosen; Skipped where there are none.

    best_worst takes the first highest and the first lowest. all takes each (i, j) with a larger
    score at i, by i and then by j. A response without a score is in no pair.
    """
    for index, text in enumerate(texts):
        if not text.strip():
            raise DataError(f"{where}: response {index} is blank; expected text.")
    known = {index: score for index, score in enumerate(scores) if score is not None}
    if len(known) < 2:
        yield Skipped("fewer than two scored responses", where)
        return
    unequal = _unequal(known, config.pairing)
    wide = [(i, j) for i, j in unequal if known[i] - known[j] >= config.min_score_gap]
    for i, j in wide:
        yield make_pair(prompt, answer(texts[i]), answer(texts[j]), where, theta)
    if not wide:
        yield Skipped(below("gap", config.min_score_gap) if unequal else "scores are equal", where)


def _unequal(scores: dict[int, float], pairing: Pairing) -> list[tuple[int, int]]:
    if pairing == Pairing.best_worst:
        best, worst = max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)
        return [(best, worst)] if scores[best] > scores[worst] else []
    return [(i, j) for i in scores for j in scores if scores[i] > scores[j]]


def below(what: str, least: float) -> str:
    """The cause of a pair that is left out by its scores."""
    return f"score {what} below {least:g}"


def responses(row: Row, name: str, where: str) -> list[str]:
    """Texts of a list of texts or of the assistant's messages."""
    found = []
    for index, value in enumerate(column(row, name, list, where)):
        place = f"{name}[{index}]"
        if isinstance(value, dict):
            if (role := value.get("role") or "assistant") != "assistant":
                raise DataError(f"{where}: {place} is of role {role!r}, expected 'assistant'.")
            value = value.get("content")
        found.append(checked(value, str, place, where))
    return found


def history(prompt: Any, where: str) -> tuple[Message, ...]:
    """The turns before the response; none where the prompt column is missing or empty."""
    if prompt is None or prompt == "":
        return ()
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    return messages(prompt, where, "prompt")


def column(row: Row, name: str, kind: type, where: str) -> Any:
    """The value under `name`, of that type; float takes whole numbers too, but no truth values.

    Raises:
        DataError: it is missing or of another type.
    """
    return checked(row.get(name), kind, name, where)


def checked(value: Any, kind: type, name: str, where: str) -> Any:
    """`value`, if it is of that type.

    Raises:
        DataError: it is not, or not finite.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number:
        if not math.isfinite(value):
            raise DataError(f"{where}: {name} is {value}; expected a finite number.")
        return float(value)
    if not isinstance(value, kind):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{where}: {name} is {found}; expected {_KINDS[kind]}.")
    return value


def numbers(values: Any, length: int, name: str, where: str) -> list[float | None]:
    """A score for each response, None where it has none.

    Raises:
        DataError: no list, another length, something that is no number.
    """
    found = checked(values, list, name, where)
    if len(found) != length:
        raise DataError(
            f"{where}: {name} holds {len(found)} numbers; expected one for each of {length} "
            "responses (null where there is none)."
        )
    return [None if value is None else checked(value, float, name, where) for value in found]


def common_start(first: str, second: str) -> str:
    """The characters that both texts begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    end = next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
    return first[:end]


def shared_start(first: str, second: str) -> str:
    """The whole words that both texts begin with, without the white space after them."""
    common = common_start(first, second)
    rest = (first[len(common) :], second[len(common) :])
    if common[-1:].isspace() or all(text[:1].isspace() for text in rest):
        return common.rstrip()
    last_word = "".join(common.split()[-1:])
    return common.removesuffix(last_word).rstrip()


def repeats(prompt: str, response: str) -> bool:
    """Whether the response is the prompt and something after it."""
    after = response.removeprefix(prompt)
    return bool(prompt.strip() and after.strip()) and after != response


TURN = re.compile(r"\n\n(Human|Assistant):")


def dialogue_turns(text: str) -> tuple[Message, ...]:
    r"""Messages from HH text: `"\n\nHuman: ...\n\nAssistant: ..."`, contents stripped."""
    _, *parts = TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Message(roles[speaker], content.strip())
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    )


def html_text(html: str) -> str:
    """The text of HTML: a blank line between paragraphs, code as it is, entities as characters."""
    parser = _Text()
    # The parser fails at `<![` before an unknown word.
    parser.feed(html.replace("<![", "&lt;!["))
    parser.close()
    parser.end_block()
    return "\n\n".join(parser.blocks)


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self._pieces: list[str] = []
        self._bullet = ""
        self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self.end_block()
        if tag == "br":
            self._pieces.append("\n")
        self._verbatim += tag == "pre"
        if tag == "li":
            self._bullet = "- "

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS:
            self.end_block()
        if tag == "pre":
            self._verbatim = max(0, self._verbatim - 1)
        if tag == "li":
            self._bullet = ""

    def handle_data(self, data: str) -> None:
        self._pieces.append(data if self._verbatim else re.sub(r"\s+", " ", data))

    def end_block(self) -> None:
        text = "".join(self._pieces)
        if self._verbatim:
            block = text.strip("\n").rstrip()
        else:
            block = "\n".join(" ".join(line.split()) for line in text.split("\n")).strip()
        if block:
            self.blocks.append(self._bullet + block)
            self._bullet = ""
        self._pieces = []
