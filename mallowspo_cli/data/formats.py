"""Layouts of preference data: one function turns a raw row into preference pairs."""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mallowspo_cli.data.layouts import (
    EQUAL,
    TURN,
    Row,
    answer,
    below,
    checked,
    column,
    common_start,
    dialogue_turns,
    history,
    html_text,
    make_pair,
    message_pair,
    numbers,
    repeats,
    responses,
    scored_pairs,
    text_pair,
)
from mallowspo_cli.data.pairs import Message, PreferencePair, Skipped
from mallowspo_cli.errors import DataError
from mallowspo_cli.raters import neg_log_phi
from mallowspo_cli.recipe.choices import Pairing
from mallowspo_cli.recipe.schema import DatasetConfig

Found = PreferencePair | Skipped
Format = Callable[[Row, str, DatasetConfig], Iterable[Found]]
"""From a row, its name in messages, and the filters to the row's pairs and what is left out.

Raises:
    DataError: the row does not have this layout.
"""
_FORMATS: dict[str, Format] = {}
_DETECTORS: dict[str, Callable[[Row], bool]] = {}


def register_format(name: str, detect: Callable[[Row], bool]) -> Callable[[Format], Format]:
    """Register a layout under `dataset.format=NAME`; `detect` tells it from a row.

    The last one registered is asked first, so a special layout comes below the general one.
    """

    def keep(function: Format) -> Format:
        if name in _FORMATS:
            raise ValueError(f"two formats are named {name!r}")
        _FORMATS[name], _DETECTORS[name] = function, detect
        return function

    return keep


def format_names() -> list[str]:
    """Names that `dataset.format` takes."""
    return ["auto", *sorted(_FORMATS)]


def format_name(function: Format) -> str:
    """The name that a layout is registered under, for reports."""
    return {known: name for name, known in _FORMATS.items()}[function]


def choose_format(name: str, row: Row, where: str) -> Format:
    """The layout named, or told from a first row.

    Raises:
        DataError: unknown name, or no layout has these columns.
    """
    if name != "auto":
        if name not in _FORMATS:
            raise DataError(
                f"dataset.format={name} is not known.{_nearest(name)} "
                f"Choices: {', '.join(format_names())}."
            )
        return _FORMATS[name]
    for key in reversed(_DETECTORS):
        if _DETECTORS[key](row):
            return _FORMATS[key]
    raise DataError(
        f"{where}: cannot tell the layout from the columns {', '.join(sorted(row))}. "
        "Expected prompt, chosen and rejected, or another layout's: "
        f"dataset.format={'|'.join(sorted(_FORMATS))}."
    )


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, format_names(), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def _has(*names: str) -> Callable[[Row], bool]:
    return lambda row: set(names) <= set(row)


@register_format("trl", _has("chosen", "rejected"))
def trl(row: Row, where: str, config: DatasetConfig) -> Iterator[Found]:
    """Columns prompt, chosen, rejected: strings, or lists of messages.

    Without a prompt, chosen and rejected are whole conversations that agree but for their last
    turn, or texts that begin with the same words. Conversations may repeat the prompt's turns;
    texts that begin with the prompt's text are taken as they are (`data check` counts them).
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if value is None or value == "" or value == []:
            raise DataError(f"{where}: the pair has no {name} response.")
        if not isinstance(value, str | list):
            raise DataError(
                f"{where}: {name} is a {type(value).__name__}; expected text or messages."
            )
    if isinstance(chosen, str) and isinstance(rejected, str):
        yield text_pair(row, chosen, rejected, where)
    else:
        yield message_pair(row, chosen, rejected, where)


@register_format("ultrafeedback", _has("all_generated_responses", "all_rm_scores"))
def ultrafeedback(row: Row, where: str, config: DatasetConfig) -> Iterator[Found]:
    """SimPO's data: chosen and rejected as published, or all responses by reward.

    The published pair is the best against the worst, so `min_score_gap` holds for it too.
    """
    if config.pairing == Pairing.best_worst and config.min_score_gap == 0:
        yield from trl(row, where, config)
        return
    texts = responses(row, "all_generated_responses", where)
    scores = numbers(row.get("all_rm_scores"), len(texts), "all_rm_scores", where)
    if config.pairing == Pairing.all:
        yield from scored_pairs(history(row.get("prompt"), where), texts, scores, config, where)
        return
    known = [score for score in scores if score is not None]
    if known and max(known) - min(known) >= config.min_score_gap:
        yield from trl(row, where, config)
    else:
        yield Skipped(below("gap", config.min_score_gap), where)


@register_format(
    "scored", lambda row: "responses" in row and bool({"scores", "rater_scores"} & set(row))
)
def scored(row: Row, where: str, config: DatasetConfig) -> Iterator[Found]:
    """Columns prompt, responses, scores; or rater_scores, a list of scores for each rater.

    Without scores, the mean over the raters who scored a response is its score.
    """
    texts = responses(row, "responses", where)
    given = checked(row.get("rater_scores") or [], list, "rater_scores", where)
    raters = [
        numbers(scores, len(texts), f"rater_scores[{index}]", where)
        for index, scores in enumerate(given)
    ]
    if row.get("scores") is None and raters:
        scores = [_mean(of_one) for of_one in zip(*raters, strict=True)]
    else:
        scores = numbers(row.get("scores"), len(texts), "scores", where)
    theta = neg_log_phi(raters) if raters else math.nan
    yield from scored_pairs(history(row.get("prompt"), where), texts, scores, config, where, theta)


def _mean(scores: tuple[float | None, ...]) -> float | None:
    given = [score for score in scores if score is not None]
    return sum(given) / len(given) if given else None


@register_format("shp", _has("history", "human_ref_A", "human_ref_B"))
def shp(row: Row, where: str, config: DatasetConfig) -> Iterator[Found]:
    """Stanford Human Preferences: a post and two comments; labels=1 prefers the first."""
    post, first, second = (
        column(row, name, str, where) for name in ("history", "human_ref_A", "human_ref_B")
    )
    label = column(row, "labels", float, where)
    if label not in (0, 1):
        raise DataError(f"{where}: labels is {label:g}; expected 1 (A is preferred) or 0.")
    score_a, score_b = (column(row, name, float, where) for name in ("score_A", "score_B"))
    low, high = sorted((score_a, score_b))
    ratio = high / low if low > 0 else column(row, "score_ratio", float, where)
    if low == high:
        yield Skipped("scores are equal", where)
    elif (score_a > score_b) != (label == 1):
        yield Skipped("the label contradicts the scores", where)
    elif ratio < config.min_score_ratio:
        yield Skipped(below("ratio", config.min_score_ratio), where)
    else:
        good, bad = (first, second) if label == 1 else (second, first)
        yield make_pair((Message("user", post),), answer(good), answer(bad), where)


@register_format("stack_exchange", _has("question", "answers"))
def stack_exchange(row: Row, where: str, config: DatasetConfig) -> Iterator[Found]:
    """A question and its answers in HTML, each with a pm_score, as the H4 team published them."""
    question = html_text(column(row, "question", str, where))
    if not question:
        yield Skipped("the question holds no text", where)
        return
    texts, scores = [], []
    for index, given in enumerate(column(row, "answers", list, where)):
        checked(given, dict, f"answers[{index}]", where)
        score = column(given, "pm_score", float, f"{where}, answer {index}")
        if text := html_text(column(given, "text", str, f"{where}, answer {index}")):
            texts.append(text)
            scores.append(score)
        else:
            yield Skipped("an answer holds no text", where)
    yield from scored_pairs((Message("user", question),), texts, scores, config, where)


_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt"), "assistant"),
    "system": "system",
}


@register_format("sharegpt", _has("conversations", "chosen", "rejected"))
def sharegpt(row: Row, where: str, config: DatasetConfig) -> Iterator[Found]:
    """Columns conversations, chosen, rejected of {"from", "value"}, and maybe a system prompt."""
    turns = tuple(
        _turn(value, f"conversations[{index}]", where)
        for index, value in enumerate(column(row, "conversations", list, where))
    )
    if system := checked(row.get("system") or "", str, "system", where).strip():
        own = [turn.content.strip() for turn in turns if turn.role == "system"]
        if own not in ([], [system]):
            raise DataError(f"{where}: system and conversations differ; expected one of the two.")
        turns = turns if own else (Message("system", system), *turns)
    good, bad = (
        answer(row[name]) if isinstance(row.get(name), str) else _turn(row.get(name), name, where)
        for name in ("chosen", "rejected")
    )
    yield make_pair(turns, good, bad, where)


def _turn(value: Any, name: str, where: str) -> Message:
    checked(value, dict, name, where)
    speaker, content = (column(value, key, str, f"{where}, {name}") for key in ("from", "value"))
    if speaker not in _ROLES:
        raise DataError(f"{where}: {name} is from {speaker!r}; expected {', '.join(_ROLES)}.")
    return Message(_ROLES[speaker], content)


def _is_imdb(row: Row) -> bool:
    start, chosen, rejected = (row.get(name) for name in ("text", "chosen", "rejected"))
    return isinstance(start, str) and any(
        isinstance(text, str) and repeats(start, text) for text in (chosen, rejected)
    )


@register_format("imdb", _is_imdb)
def imdb(row: Row, where: str, config: DatasetConfig) -> Iterator[Found]:
    """Columns text, chosen, rejected: a beginning, and two texts that go on from it.

    The white space after the beginning stays with the response, as the model wrote it.
    """
    start = column(row, "text", str, where)
    for name in ("chosen", "rejected"):
        if not column(row, name, str, where).startswith(start):
            raise DataError(f"{where}: {name} does not begin with the text column, as it should.")
    good, bad = (answer(row[name].removeprefix(start)) for name in ("chosen", "rejected"))
    yield make_pair((Message("user", start),), good, bad, where)


def _is_hh(row: Row) -> bool:
    texts = [row.get(name) for name in ("chosen", "rejected")]
    return all(
        isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text
        for text in texts
    )


@register_format("hh", _is_hh)
def hh(row: Row, where: str, config: DatasetConfig) -> Iterator[Found]:
    r"""Columns chosen, rejected: dialogues `"\n\nHuman: ...\n\nAssistant: ..."`.

    They agree up to the last answer; the few that part earlier are left out.
    """
    chosen, rejected = (_dialogue(row, name, where) for name in ("chosen", "rejected"))
    if chosen == rejected:
        yield Skipped(EQUAL, where)
        return
    head, marker, _ = common_start(chosen, rejected).rpartition("\n\nAssistant:")
    good, bad = (text[len(head) + len(marker) :] for text in (chosen, rejected))
    turns = dialogue_turns(head)
    if not marker or TURN.search(good) or TURN.search(bad):
        yield Skipped("dialogues differ before the last turn", where)
    elif not any(turn.content for turn in turns):
        yield Skipped("the prompt is empty", where)
    elif not good.strip() or not bad.strip():
        yield Skipped("a response is empty", where)
    else:
        yield make_pair(turns, answer(good.strip()), answer(bad.strip()), where)


def _dialogue(row: Row, name: str, where: str) -> str:
    text = "\n\n" + column(row, name, str, where).strip()
    if not TURN.match(text):
        raise DataError(
            f"{where}: {name} is no dialogue; expected 'Human: ...', a blank line and "
            "'Assistant: ...' in turn."
        )
    return text
