"""A verdict is read where it is one; anything else is unreadable, and nothing is slow."""

import json
import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.judges.parsers import find_parser
from mallowspo_cli.evaluation.judges.rankings import Choice, Field, Ranking
from mallowspo_cli.evaluation.judges.replies import NoLogprobs, Reply, Unreadable, read_reply
from mallowspo_cli.evaluation.judges.verdicts import Parser, Pattern, Scores, Weighted
from tests.evaluation.judges.judge_server import completion

LETTERS = Weighted("m", ("m", "M"))
COMPARED = Pattern(((1.0, r"\W*A\W*"), (2.0, r"\W*B\W*")), last_line=True)
OUTPUTS = Pattern(((1.0, r"(?:^|\n) ?Output \(a\)"), (2.0, r"(?:^|\n) ?Output \(b\)")))
CALLED = Field("ordered_models", Ranking("m", "M"))
PARSERS: list[Parser] = [
    LETTERS,
    Weighted("m", ("m", "M"), position=-1, binary=True),
    Weighted("A", ("A", "B"), stripped=True, letter=True),
    Ranking(),
    COMPARED,
    OUTPUTS,
    Scores(),
    CALLED,
    Field("best", Choice(((True, 1.0), (False, 2.0)))),
]


def top(cut: bool = False, **logprobs: float) -> Reply:
    return Reply("m", logprobs=(tuple(logprobs.items()),), cut=cut)


def unreadable(parser: Parser, reply: Reply, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        parser(reply)


@given(st.floats(-50, 0), st.floats(-50, 0))
def test_a_weighted_preference_is_two_minus_the_share_of_the_first(m: float, big: float) -> None:
    share = math.exp(m) / (math.exp(m) + math.exp(big))
    found = LETTERS(top(m=m, M=big, Both=-0.1))
    assert found == pytest.approx(2 - share, abs=1e-12)
    assert 1 <= found <= 2
    assert LETTERS(top(m=big, M=m)) == pytest.approx(3 - found, abs=1e-12)


def test_a_verdict_that_is_not_among_the_top_tokens_has_probability_zero() -> None:
    assert LETTERS(top(m=-20.0, The=-0.1)) == 1.0
    assert LETTERS(top(M=-20.0, The=-0.1)) == 2.0
    assert LETTERS(top(m=-9999.0, M=-20.0)) == 2.0


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (top(The=-0.1, Both=-2.0), "none of 'm', 'M' is among"),
        (top(m=-9999.0, M=-9999.0), "none of"),
        (top(m=math.nan, M=-0.1), "log-prob of 'm' is nan"),
        (top(m=math.inf), "log-prob of 'm' is inf"),
        (top(m=0.5, M=-3.0), "log-prob of 'm' is 0.5"),
        (Reply("m", logprobs=((),)), "none of"),
    ],
)
def test_log_probs_that_are_none_are_no_verdict(reply: Reply, why: str) -> None:
    unreadable(LETTERS, reply, why)


def test_an_answer_without_log_probs_is_told_apart() -> None:
    with pytest.raises(NoLogprobs, match="gives no log-probs"):
        LETTERS(Reply("m"))


def test_a_binary_verdict_is_the_more_probable_one_and_a_tie_is_a_draw() -> None:
    binary = Weighted("m", ("m", "M"), binary=True)
    assert binary(top(m=-0.6, M=-0.8)) == 1
    assert binary(top(m=-0.8, M=-0.6)) == 2
    assert binary(top(m=-0.7, M=-0.7)) == 1.5
    assert binary(top(m=-3.0)) == 1
    assert binary(top(M=-3.0)) == 2


def test_a_verdict_behind_a_comparison_is_the_last_token() -> None:
    last = Weighted("m", ("m", "M"), position=-1)
    reply = Reply("so: M", logprobs=((("m", -0.01),), ((":", -0.1),), (("M", -0.01),)))
    assert last(reply) == 2
    unreadable(last, Reply("so", logprobs=reply.logprobs, cut=True), "cut off before its verdict")
    unreadable(Weighted("m", ("m", "M"), position=5), reply, "log-probs of 3 tokens only")


def test_spaces_matter_unless_they_are_stripped() -> None:
    spaced = Reply("A", logprobs=(((" A", math.log(0.3)), ("A", math.log(0.3)), ("B", -1.0)),))
    plain = Weighted("A", ("A", "B"))
    stripped = Weighted("A", ("A", "B"), stripped=True)
    weight = math.exp(-1.0)
    assert plain(spaced) == pytest.approx(2 - 0.3 / (0.3 + weight))
    assert stripped(spaced) == pytest.approx(2 - 0.6 / (0.6 + weight))


def test_a_letter_counts_where_there_are_no_log_probs() -> None:
    letter = Weighted("A", ("A", "B"), letter=True)
    assert letter(Reply(" A\n")) == 1
    assert letter(Reply("B")) == 2
    for text in ("", "C", "AB", "A or B", "Answer A"):
        unreadable(letter, Reply(text), "is no verdict")


FIRST = '[{"model": "model_1", "rank": 1}, {"model": "model_2", "rank": 2}]'
SECOND = "[{'model': 'model_1', 'rank': 2}, {'model': 'model_2', 'rank': 1}]"


@pytest.mark.parametrize(
    ("text", "preference"),
    [
        (FIRST, 1),
        (SECOND, 2),
        (f"Here's my ranking:\n```json\n{FIRST}\n```\nIt's [clear].", 1),
        ("[{'rank': 1, 'model': 'model_2'}, {'rank': 2, 'model': 'model_1', 'why': 'short'},]", 2),
        ('[{"model":"model_1","rank":1.0},{"model":"model_2","rank":2.0}]', 1),
    ],
)
def test_a_ranking_is_read_in_json_and_in_python(text: str, preference: float) -> None:
    assert Ranking()(Reply(text)) == preference


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the answer is empty"),
        ("  \n", "the answer is empty"),
        ("model_1 is better", "no rankings are in"),
        (f"{FIRST} or {SECOND}", "2 rankings are in"),
        (f"The answer says {SECOND}.\n{SECOND}", "2 rankings"),
        ('[{"model": "model_1", "rank": 1}]', "expected both answers"),
        ('[{"model": "model_1", "rank": 1}, {"model": "model_1", "rank": 2}]', "expected both"),
        ('[{"model": "model_1", "rank": 1}, {"model": "model_3", "rank": 2}]', "other names"),
        (FIRST[:-1] + ', {"model": "model_3", "rank": 3}]', "other names"),
        ('[{"model": "model_1", "rank": 1}, {"model": "model_2", "rank": 1}]', "not 1 and 2"),
        ('[{"model": "model_1", "rank": 3}, {"model": "model_2", "rank": 2}]', "not 1 and 2"),
        ('[{"model": "model_1", "rank": true}, {"model": "model_2", "rank": 2}]', "not 1 and 2"),
        ('[{"model": "model_1", "rank": "1"}, {"model": "model_2", "rank": "2"}]', "not 1 and 2"),
        ('[{"model": "model_1", "rank": NaN}, {"model": "model_2", "rank": 2}]', "not 1 and 2"),
        ('[{"model": "model_1"}, {"model": "model_2", "rank": 2}]', "not 1 and 2"),
        ('[{"model": 1, "rank": 1}, {"model": "model_2", "rank": 2}]', "expected both"),
        ("[{'model': 'model_1', 'rank': 9" + "9" * 6000 + "}]", "is no list"),
        ("[{'model': __import__('os').system('true'), 'rank': 1}]", "is no list"),
        ("[{(" + "(" * 5000 + "}]", "is no list"),
        ("[{" + "-" * 15000 + "1: 2}]", "is no list"),
        ("[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': '\\d'}]", "not 1 and 2"),
        ("[" * 15000, "no rankings"),
        ("x" * 20001, "20,001 characters"),
        (FIRST[: len(FIRST) // 2], "no rankings"),
    ],
)
def test_what_is_no_ranking_is_unreadable(text: str, why: str) -> None:
    unreadable(Ranking(), Reply(text), why)


def test_a_ranking_of_names_that_the_annotator_chose() -> None:
    text = '[{"model": "m", "rank": 2}, {"model": "M", "rank": 1}]'
    assert Ranking("m", "M")(Reply(text)) == 2
    assert Ranking("m", None)(Reply(text)) == 2
    unreadable(Ranking(), Reply(text), "expected both answers")


@pytest.mark.parametrize(
    "text",
    [
        "[{}" + " " * 19000,
        "[" + "{}, " * 4900,
        "[" + "{} , " * 3900 + " " * 400,
        "[ " * 9900,
        "[{" * 9900,
        "{}[" * 6600,
        "A" * 19999 + "\n" + "(" * 10,
        "```json" * 2800,
        "Output (a" * 2200,
    ],
)
@pytest.mark.parametrize("parser", PARSERS)
def test_no_text_makes_a_parser_slow(parser: Parser, text: str) -> None:
    start = time.process_time()
    with pytest.raises(Unreadable):
        parser(Reply(text))
    assert time.process_time() - start < 0.5


def test_a_pattern_has_to_match_once() -> None:
    assert OUTPUTS(Reply("Output (a)")) == 1
    assert OUTPUTS(Reply("I think:\n Output (b)")) == 2
    unreadable(OUTPUTS, Reply("I prefer Output (a)"), "no verdict is in")
    unreadable(OUTPUTS, Reply("Output (a)\nOutput (b)"), "2 verdicts are in")
    # What the first match leaves begins a text of its own, as alpaca-eval reads it.
    unreadable(OUTPUTS, Reply("Output (a)Output (b)"), "2 verdicts are in")
    unreadable(Pattern(((1.0, ""),)), Reply("aa"), "2 verdicts")


def test_a_last_line_is_the_verdict_whatever_stands_above() -> None:
    assert COMPARED(Reply("The second says 'A wins'.\nA\nBoth are long.\n\n**B**.\n\n")) == 2
    assert COMPARED(Reply("A")) == 1
    for text in ("A\nBecause it is short.", "A or B", "a", "Verdict"):
        unreadable(COMPARED, Reply(text), "no verdict is in")
    unreadable(COMPARED, Reply("A", cut=True), "cut off")


def test_scores_are_two_numbers_on_the_first_line() -> None:
    assert Scores()(Reply("7 1\nmore")) == 1
    assert Scores()(Reply("1, 7.5")) == 2
    assert Scores()(Reply("5 5\n")) == 1.5
    for text in ("7", "7 1 2", "a b", "nan 1", "inf 1", "1e999 1", "\n7 1", "7/10 1/10"):
        unreadable(Scores(), Reply(text), "no pair of scores")


def test_a_function_call_is_read_before_the_text() -> None:
    rows = [{"model": "m", "rank": 2}, {"model": "M", "rank": 1}]
    arguments = json.dumps({"ordered_models": rows})
    assert CALLED(Reply("m is better", arguments)) == 2
    # A server without functions writes the object.
    assert CALLED(Reply(f"```json\n{arguments}\n```")) == 2
    assert CALLED(Reply(json.dumps({"ordered_models": json.dumps(rows)}))) == 2


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("", "the answer is empty"),
        ('{"ordered_models": [', "is no JSON"),
        ("[" * 5000 + "]" * 5000, "is no JSON"),
        ('{"a": ' * 2500 + "1" + "}" * 2500, "is no JSON"),
        ('{"models": []}', "has no 'ordered_models'"),
        ("[]", "has no 'ordered_models'"),
        ('{"ordered_models": null}', "no list of objects"),
        ('{"ordered_models": [[1]]}', "no list of objects"),
        ('{"ordered_models": ' + "[" * 900 + "]" * 900 + "}", "no list of objects"),
        ('{"ordered_models": [{"model": ["m"], "rank": 1}, {"model": "M", "rank": 2}]}', "both"),
        ('{"ordered_models": [{"model": "m", "rank": [1]}, {"model": "M", "rank": 2}]}', "1 and 2"),
    ],
)
def test_broken_arguments_are_unreadable(arguments: str, why: str) -> None:
    unreadable(CALLED, Reply("", arguments), why)


def test_a_choice_knows_true_from_one() -> None:
    choice = Field("best", Choice(((True, 1.0), (False, 2.0), ("b", 2.0))))
    assert choice(Reply('{"best": true}')) == 1
    assert choice(Reply('{"best": "b"}')) == 2
    for value in ("1", "0", "null", '"true"', "[true]"):
        unreadable(choice, Reply(f'{{"best": {value}}}'), "the value is none of")


def test_a_reply_is_read_from_a_completion() -> None:
    usage = {"prompt_tokens": 12, "completion_tokens": 3}
    reply = read_reply(completion("m", {"m": -0.1, "M": -2.5}, usage=usage, finish="length").body)
    assert reply == Reply("m", None, ((("m", -0.1), ("M", -2.5)),), True, 12, 3)
    called = read_reply(completion(None, arguments="{}").body)
    assert (called.text, called.arguments, called.content) == ("", "{}", "{}")
    assert called.logprobs == ()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "is no JSON"),
        (b"<html>", "is no JSON"),
        (b'{"choices": [{"message": {"content": "m', "is no JSON"),
        (b"data: {}\n\n", "is no JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "is no JSON"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "is no JSON"),
        (b"1" * 5000, "is no JSON"),
        (b"\xff\xfe\x00\xd8", "is no JSON"),
        (b"null", "has no choices"),
        (b"[]", "has no choices"),
        (b"{}", "has no choices"),
        (b'{"choices": null}', "has no choices"),
        (b'{"choices": []}', "has no choices"),
        (b'{"choices": [null]}', "has no choices"),
        (b'{"choices": [{}]}', "has no message"),
        (b'{"choices": [{"message": "m"}]}', "has no message"),
        (completion(None).body, "content is missing"),
        (completion(3).body, "content is a int"),
        (completion([{"type": "text", "text": "m"}]).body, "content is a list"),
        (completion(None, arguments={"a": 1}).body, "arguments are a dict"),
        (b'{"choices": [{"message": {"content": null, "tool_calls": [null]}}]}', "no tool_calls"),
        (b'{"choices": [{"message": {"content": "m", "tool_calls": [{}]}}]}', "arguments are miss"),
    ],
)
def test_what_is_no_completion_is_unreadable(body: bytes, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        read_reply(body)


@pytest.mark.parametrize(
    "value", ["NaN", "null", '"0"', "true", "[0]", "1" + "0" * 400, "Infinity"]
)
def test_a_log_prob_that_is_no_number_is_not_taken_for_one(value: str) -> None:
    body = completion("m", {"m": -0.5, "M": -7.5}).body.replace(b"-0.5", value.encode())
    unreadable(LETTERS, read_reply(body), "log-prob of 'm' is nan")


def test_counts_of_tokens_that_are_none_are_left_out() -> None:
    for bad in (-1, 1.5, True, "9", None, 10**12, [1]):
        reply = read_reply(completion("m", usage={"prompt_tokens": bad}).body)
        assert reply.input_tokens is None


def test_texts_are_cleaned_and_can_be_written_as_utf8() -> None:
    body = completion("key \ud800!", arguments="key \udfff").body
    reply = read_reply(body, lambda text: text.replace("key", "[key]"))
    assert reply.text == "[key] ?!"
    assert reply.arguments == "[key] ?"
    (reply.text + reply.content).encode()


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested lists and objects."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(deep for key, inner in items for deep in places(inner, (*path, key)))]


WHOLE = json.loads(
    completion(FIRST, {"m": -0.1, "M": -2.5}, json.dumps({"ordered_models": []})).body
)


@settings(max_examples=300)
@given(st.data(), JUNK)
def test_junk_anywhere_in_a_completion_gives_a_preference_or_is_unreadable(
    data: st.DataObject, junk: Any
) -> None:
    path = data.draw(st.sampled_from(places(WHOLE)))
    broken = json.loads(json.dumps(WHOLE))
    if path:
        *way, last = path
        inner = broken
        for key in way:
            inner = inner[key]
        inner[last] = junk
    else:
        broken = junk
    try:
        reply = read_reply(json.dumps(broken).encode())
    except Unreadable:
        return
    for parser in PARSERS:
        try:
            assert 1 <= parser(reply) <= 2
        except Unreadable:
            continue


@given(st.text(max_size=200))
def test_any_text_gives_a_preference_or_is_unreadable(text: str) -> None:
    for parser in PARSERS:
        try:
            assert parser(Reply(text)) in (1, 1.5, 2)
        except Unreadable:
            continue


@pytest.mark.parametrize(
    ("name", "settings", "parser"),
    [
        (
            "logprob_parser",
            {"numerator_token": "m", "denominator_tokens": ["m", "M"]},
            Weighted("m", ("m", "M"), binary=True),
        ),
        (
            "logprob_parser",
            {
                "numerator_token": "A",
                "denominator_tokens": ["A", "B"],
                "is_binarize": False,
                "log_prob_index": -1,
            },
            Weighted("A", ("A", "B"), position=-1),
        ),
        ("ranking_parser", {}, Ranking("model_1", "model_2")),
        ("ranking_parser", {"model_1_name": "m"}, Ranking("m", "M")),
        ("ranking_parser", {"model_1_name": "x"}, Ranking("x", None)),
        ("regex_parser", {"outputs_to_match": {1: "a", 2: "b", 0: "c"}}, None),
        ("lmsys_parser", {}, Scores()),
        (
            "pipeline_meta_parser",
            {"parsers_to_kwargs": {"json_parser": {"annotation_key": "k"}, "ranking_parser": None}},
            Field("k", Ranking()),
        ),
        (
            "pipeline_meta_parser",
            {
                "parsers_to_kwargs": {
                    "json_parser": {"annotation_key": "k"},
                    "replace_parser": {"replacer": {True: 1, False: 2}, "default_replacer": 1},
                }
            },
            Field("k", Choice(((True, 1.0), (False, 2.0)))),
        ),
    ],
)
def test_parsers_have_the_names_and_settings_of_alpaca_eval(
    name: str, settings: dict[str, Any], parser: Parser | None
) -> None:
    found = find_parser(name, settings, "x")
    expected = parser or Pattern(((1.0, "a"), (2.0, "b"), (1.5, "c")))
    assert found == expected


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("eval_parser", {}, "fn_completion_parser=eval_parser, which is not supported"),
        (None, {}, "fn_completion_parser=None"),
        ("ranking_parser", [], "is no mapping"),
        ("ranking_parser", {"model_1_name": 1}, "model_1_name is 1; expected a str"),
        ("ranking_parser", {"models": 1}, "has no setting models"),
        ("logprob_parser", {}, "numerator_token is None"),
        ("logprob_parser", {"numerator_token": "a", "denominator_tokens": ["b", "c"]}, "'a' among"),
        ("logprob_parser", {"numerator_token": "a", "denominator_tokens": ["a"]}, "two or more"),
        (
            "logprob_parser",
            {"numerator_token": "a", "denominator_tokens": ["a", "b"], "log_prob_index": "last"},
            "log_prob_index is 'last'",
        ),
        ("regex_parser", {}, "outputs_to_match is None"),
        ("regex_parser", {"outputs_to_match": {1: "("}}, "is no pattern"),
        ("regex_parser", {"outputs_to_match": {"a": "x"}}, "'a' is no preference"),
        ("regex_parser", {"outputs_to_match": {3: "x"}}, "3 is no preference"),
        ("pipeline_meta_parser", {"parsers_to_kwargs": {"json_parser": {}}}, "not supported"),
        (
            "pipeline_meta_parser",
            {"parsers_to_kwargs": {"json_parser": {}, "regex_parser": {}}},
            "regex_parser is not supported behind json_parser",
        ),
    ],
)
def test_a_parser_that_cannot_be_had_is_named(name: Any, settings: Any, why: str) -> None:
    with pytest.raises(EvalError, match=why):
        find_parser(name, settings, "the annotator x")
