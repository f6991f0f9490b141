"""Parsers by the names and settings that alpaca-eval gives them."""

import re
from collections.abc import Mapping
from typing import Any

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.judges.rankings import OTHER_NAMES, Choice, Field, Ranking
from mallowspo_cli.evaluation.judges.verdicts import Parser, Pattern, Scores, Weighted
from mallowspo_cli.evaluation.outputs import BASE_WINS, MODEL_WINS

NAMES = ("logprob_parser", "ranking_parser", "regex_parser", "lmsys_parser", "pipeline_meta_parser")


def find_parser(name: Any, settings: Any, where: str) -> Parser:
    """The parser of an annotator.

    Args:
        settings: `completion_parser_kwargs`. Beyond alpaca-eval's: logprob_parser takes
            `is_stripped` and `is_letter`, ranking_parser `model_2_name`, regex_parser
            `is_last_line`.
        where: names the annotator in errors.

    Raises:
        EvalError: a parser or a setting that is not supported.
    """
    if name not in NAMES:
        raise EvalError(
            f"{where} uses fn_completion_parser={name}, which is not supported; supported are: "
            f"{', '.join(NAMES)}."
        )
    if not isinstance(settings, Mapping):
        raise EvalError(f"{where}: completion_parser_kwargs is no mapping.")
    known = _Settings(dict(settings), f"{where}: {name}")
    match name:
        case "logprob_parser":
            parser: Parser = _weighted(known)
        case "ranking_parser":
            parser = _ranking(known)
        case "regex_parser":
            parser = _pattern(known)
        case "lmsys_parser":
            parser = Scores()
        case _:
            parser = _pipeline(known)
    known.end()
    return parser


class _Settings:
    """Settings that are taken one by one, so that what nobody took is found."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values, self.where = values, where

    def take(self, key: str, kind: type, default: Any) -> Any:
        value = self.values.pop(key, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise EvalError(f"{self.where}: {key} is {value!r}; expected a {kind.__name__}.")
        return value

    def end(self) -> None:
        if self.values:
            raise EvalError(f"{self.where} has no setting {sorted(map(str, self.values))[0]}.")


def _weighted(settings: _Settings) -> Weighted:
    first = settings.take("numerator_token", str, None)
    tokens = tuple(settings.take("denominator_tokens", list, None))
    if first not in tokens or len(set(tokens)) < 2 or not all(isinstance(t, str) for t in tokens):
        raise EvalError(
            f"{settings.where}: denominator_tokens are {list(tokens)}; expected two or more, "
            f"{first!r} among them."
        )
    place = settings.values.pop("log_prob_index", "batch")
    if place != "batch" and (isinstance(place, bool) or not isinstance(place, int)):
        raise EvalError(f"{settings.where}: log_prob_index is {place!r}; expected a number.")
    return Weighted(
        first,
        tokens,
        # A batch of one question has its verdict in the first token.
        0 if place == "batch" else place,
        binary=settings.take("is_binarize", bool, True),
        stripped=settings.take("is_stripped", bool, False),
        letter=settings.take("is_letter", bool, False),
    )


def _ranking(settings: _Settings) -> Ranking:
    first = settings.take("model_1_name", str, "model_1")
    return Ranking(first, settings.values.pop("model_2_name", OTHER_NAMES.get(first)))


def _pattern(settings: _Settings) -> Pattern:
    patterns = settings.take("outputs_to_match", dict, None)
    for value, pattern in patterns.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise EvalError(f"{settings.where}: {pattern!r} is no pattern: {error}.") from error
        _verdict(value, settings.where)
    return Pattern(
        tuple((_verdict(value, settings.where), text) for value, text in patterns.items()),
        settings.take("is_last_line", bool, False),
    )


def _pipeline(settings: _Settings) -> Parser:
    """json_parser, then ranking_parser or replace_parser."""
    steps = settings.take("parsers_to_kwargs", dict, None)
    settings.values.pop("is_squeeze", None)
    names = list(steps)
    if len(names) != 2 or names[0] != "json_parser":
        raise EvalError(f"{settings.where} of {', '.join(map(str, names))} is not supported.")
    inner = [_Settings(dict(steps[name] or {}), f"{settings.where}: {name}") for name in names]
    key = inner[0].values.pop("annotation_key", None)
    match names[1]:
        case "ranking_parser":
            field = Field(key, _ranking(inner[1]))
        case "replace_parser":
            field = Field(key, _choice(inner[1]))
        case _:
            raise EvalError(f"{settings.where}: {names[1]} is not supported behind json_parser.")
    for step in inner:
        step.end()
    return field


def _choice(settings: _Settings) -> Choice:
    values = settings.take("replacer", dict, None)
    settings.values.pop("default_replacer", None)
    return Choice(tuple((name, _verdict(v, settings.where)) for name, v in values.items()))


def _verdict(value: Any, where: str) -> float:
    """A preference between the answers; 0 is an older way to write a draw."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and value == 0:
        return (BASE_WINS + MODEL_WINS) / 2
    if not number or not BASE_WINS <= value <= MODEL_WINS:
        raise EvalError(f"{where}: {value!r} is no preference; expected 1 to 2.")
    return float(value)
