"""A judge's server gets what it should, and nothing that it answers hangs, crashes or wins."""

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.judges.annotators import Annotator, find_annotator
from mallowspo_cli.evaluation.judges.client import MAX_BYTES, STREAMED, redactor
from mallowspo_cli.evaluation.judges.endpoint import Endpoint
from mallowspo_cli.evaluation.judges.options import JudgeOptions
from mallowspo_cli.evaluation.judges.replies import Messages, Reply, Unreadable
from tests.evaluation.judges.judge_server import (
    Answer,
    JudgeServer,
    Request,
    Script,
    completion,
    serving,
)

KEY = "sk-loop/back-0123456789abcdefghij"
GOOD = completion("A", {"A": -0.2, "B": -2.0})
ESCAPED = [
    KEY.replace("/", "\\/"),
    "".join(f"\\u{ord(character):04x}" for character in KEY),
    KEY.replace("s", "\\u0073").replace("/", "\\u002F"),
]
"""How JSON may spell the key."""
Found = dict[int, Reply | Unreadable]


def questions(count: int) -> list[Messages]:
    return [[{"role": "user", "content": f"question {number}"}] for number in range(count)]


def number_of(request: Request) -> int:
    return int(request["messages"][0]["content"].split()[1])


def options_for(server: JudgeServer, **changes: Any) -> JudgeOptions:
    values = {"model": "judge", "backoff": 0.001, "timeout": 10.0, "retries": 2} | changes
    return JudgeOptions(base_url=server.url, **values)


def endpoint_for(server: JudgeServer, key: str | None = KEY, **changes: Any) -> Endpoint:
    return Endpoint(find_annotator("pairwise_choice"), options_for(server, **changes), key)


def asked(endpoint: Endpoint, count: int) -> Found:
    """Ask so many questions and collect the answers."""
    found: Found = {}

    def on_reply(number: int, answer: Reply | Unreadable) -> None:
        assert number not in found
        found[number] = answer

    endpoint.ask(questions(count), range(count), on_reply)
    return found


def reasons(found: Found) -> list[str]:
    return [str(answer) for answer in found.values() if isinstance(answer, Unreadable)]


def test_each_pending_question_is_answered_once() -> None:
    with serving(lambda request, _: completion(f"{number_of(request)}")) as server:
        found: Found = {}
        endpoint_for(server).ask(questions(30), range(3, 30), found.__setitem__)
    assert sorted(found) == list(range(3, 30))
    assert all(isinstance(r, Reply) and r.text == str(n) for n, r in found.items())
    assert sorted(number_of(seen.body) for seen in server.seen) == list(range(3, 30))


def test_the_request_is_the_annotators_with_the_key_in_its_header() -> None:
    with serving(lambda *_: GOOD) as server:
        (reply,) = asked(endpoint_for(server), 1).values()
    (seen,) = server.seen
    assert seen.path == "/v1/chat/completions"
    assert seen.body == {
        "model": "judge",
        "messages": questions(1)[0],
        "max_tokens": 1,
        "temperature": 0,
        "top_p": 1.0,
        "logprobs": True,
        "top_logprobs": 5,
    }
    headers = {name.lower(): value for name, value in seen.headers.items()}
    assert headers["authorization"] == f"Bearer {KEY}"
    assert headers["accept-encoding"] == "identity"
    assert isinstance(reply, Reply)
    assert reply.seconds is not None
    assert replace(reply, seconds=None) == Reply(
        "A", None, ((("A", -0.2), ("B", -2.0)),), False, 100, 1
    )


def test_function_calls_are_asked_for_and_read() -> None:
    base = find_annotator("pairwise_ranking")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    annotator = replace(base, request=base.request | {"tools": tools})
    with serving(lambda *_: completion(None, arguments='{"a": 1}')) as server:
        (reply,) = asked(Endpoint(annotator, options_for(server)), 1).values()
    assert isinstance(reply, Reply)
    assert reply.content == '{"a": 1}'
    assert server.seen[0].body["tools"] == tools


def test_a_server_without_a_key_gets_none_of_the_environments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(lambda *_: GOOD) as server:
        endpoint = endpoint_for(server, None)
        assert endpoint.options.key_variable is None
        asked(endpoint, 1)
    assert KEY not in json.dumps(server.seen[0].headers)
    assert JudgeOptions().key_variable == "OPENAI_API_KEY"
    assert JudgeOptions(base_url="https://api.elsewhere.org/v1").key_variable is None
    assert JudgeOptions(base_url=server.url, api_key_env="MINE").key_variable == "MINE"
    assert JudgeOptions(engine="transformers").key_variable is None


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(lambda *_: GOOD) as server:
        assert not reasons(asked(endpoint_for(server), 2))


def test_as_many_questions_are_on_their_way_as_is_set() -> None:
    with serving(lambda *_: replace(GOOD, delay=0.05)) as server:
        assert not reasons(asked(endpoint_for(server, concurrency=4), 24))
        assert 2 <= server.most_at_once <= 4
    with serving(lambda *_: replace(GOOD, delay=0.01)) as server:
        assert not reasons(asked(endpoint_for(server, concurrency=1), 4))
        assert server.most_at_once == 1


def test_requests_keep_to_their_rate_and_so_do_further_attempts() -> None:
    def script(_: Request, number: int) -> Answer:
        return Answer(status=503) if number % 2 else GOOD

    with serving(script) as server:
        found = asked(endpoint_for(server, requests_per_minute=1200, retries=9), 8)
    assert not reasons(found)
    times = sorted(seen.time for seen in server.seen)
    assert len(times) > 8
    # 50 ms apart, but for what the scheduler adds to one and takes from the next.
    assert times[-1] - times[0] > 0.9 * 0.05 * (len(times) - 1)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_what_may_go_away_is_tried_again(status: int) -> None:
    def script(_: Request, number: int) -> Answer:
        return GOOD if number == 2 else Answer(b"busy", status)

    with serving(script) as server:
        assert not reasons(asked(endpoint_for(server), 1))
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("answer", "requests", "reason"),
    [
        (Answer(b'{"error": {"message": "too long"}}', 400), 1, "the server says 400: too long"),
        (Answer(b'{"detail": "no"}', 422), 1, "422: no"),
        (Answer(b'{"error": "teapot"}', 418), 1, "418: teapot"),
        (Answer(b"", 500), 3, "500: nothing more"),
        (Answer(b"<h1>\x1b[2J\n\n gone</h1>", 503), 3, "503: <h1> \\[2J gone</h1>"),
        (Answer(b"{" * 5000, 500), 3, "500: {{{"),
        (Answer(drop=True), 3, "the connection is lost"),
        (replace(GOOD, short=10), 3, "the connection is lost"),
        (replace(GOOD, status=204, body=b""), 1, "is no JSON"),
        (Answer(b"m"), 1, "is no JSON"),
        (Answer(GOOD.body[:-20]), 1, "is no JSON"),
        (Answer(b"[" * 200_000), 1, "is no JSON"),
        (completion(None), 1, "content is missing"),
        (Answer(b"x" * 10_000_000), 1, "longer than 1,000,000 bytes"),
        (Answer(b'{"choices": "' + b"x" * MAX_BYTES + b'"}'), 1, "longer than 1,000,000 bytes"),
        (replace(GOOD, headers={"Content-Encoding": "gzip"}), 1, "is compressed"),
        (Answer(b"", 400, {"Retry-After": "86400"}), 1, "the server says 400"),
        (Answer(b"", 500, {"Retry-After": "nan"}), 3, "the server says 500"),
        (Answer(b"", 500, {"Retry-After": "soon"}), 3, "the server says 500"),
        (Answer(b"", 500, {"Retry-After": "-5"}), 3, "the server says 500"),
    ],
)
def test_a_bad_answer_is_a_counted_failure(answer: Answer, requests: int, reason: str) -> None:
    """And the next question is answered as if nothing had been."""

    def script(request: Request, _: int) -> Answer:
        return answer if number_of(request) == 1 else GOOD

    with serving(script) as server:
        found = asked(endpoint_for(server, concurrency=1), 3)
    assert isinstance(found[0], Reply)
    assert isinstance(found[2], Reply)
    with pytest.raises(Unreadable, match=reason):
        raise found[1]  # type: ignore[misc]
    assert len(server.seen) == 2 + requests


def test_an_error_of_any_length_is_cut_off() -> None:
    def script(request: Request, _: int) -> Answer:
        return Answer(b"x", 500, repeat=b"y" * 65536) if number_of(request) else GOOD

    with serving(script) as server:
        found = asked(endpoint_for(server, concurrency=1, retries=0), 2)
        assert len(str(found[1])) < 300
        # What lies in the buffers of a connection has been sent, but not much more.
        assert server.sent < 20_000_000


def test_an_endless_answer_is_cut_off() -> None:
    def script(request: Request, _: int) -> Answer:
        return Answer(b"{", repeat=b" " * 65536) if number_of(request) else GOOD

    with serving(script) as server:
        found = asked(endpoint_for(server, concurrency=1), 2)
        assert "longer than" in str(found[1])
        assert server.sent < 20_000_000


@pytest.mark.parametrize(
    "answer",
    [replace(GOOD, delay=30), Answer(b"{", repeat=b" ", pause=0.02)],
    ids=["silent", "dripping"],
)
def test_an_answer_that_takes_too_long_is_given_up_after_a_second_try(answer: Answer) -> None:
    def script(request: Request, _: int) -> Answer:
        return answer if number_of(request) == 0 else GOOD

    start = time.monotonic()
    with serving(script) as server:
        found = asked(endpoint_for(server, timeout=0.7, retries=5), 6)
        seen = [number_of(seen.body) for seen in server.seen]
    assert time.monotonic() - start < 15
    assert reasons(found) == ["no whole answer within 0.7 s (judge.timeout)"]
    assert isinstance(found[0], Unreadable)
    assert seen.count(0) == 2


def test_a_servers_wish_to_wait_is_granted_to_all_requests() -> None:
    def script(_: Request, number: int) -> Answer:
        return Answer(b"slow down", 429, {"Retry-After": "0.3"}) if number == 0 else GOOD

    with serving(script) as server:
        assert not reasons(asked(endpoint_for(server, concurrency=1), 3))
    assert server.seen[1].time - server.seen[0].time >= 0.3


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize(("asked_for", "told"), [("600", "600 s"), ("inf", "inf s")])
def test_a_longer_wait_than_is_granted_ends_the_run_and_is_named(
    status: int, asked_for: str, told: str
) -> None:
    def script(_: Request, number: int) -> Answer:
        return Answer(b"busy", status, {"Retry-After": asked_for}) if number else GOOD

    found: Found = {}
    with serving(script) as server:
        endpoint = endpoint_for(server, concurrency=1, retries=0)
        with pytest.raises(EvalError, match=f"asks to wait {told} .*{status}: busy.*goes on then"):
            endpoint.ask(questions(40), range(40), found.__setitem__)
    assert list(found) == [0]
    assert len(server.seen) == 2


@pytest.mark.parametrize("status", [301, 307, 401, 402, 403, 404, 405])
def test_what_every_request_would_meet_ends_the_run_at_once(status: int) -> None:
    body = json.dumps({"error": {"message": f"no such thing\nfor {KEY}", "code": "x"}}).encode()
    headers = {"Location": "http://127.0.0.1:9/v1/chat/completions"}
    with (
        serving(lambda *_: Answer(body, status, headers)) as server,
        pytest.raises(EvalError, match=f"says {status}: no such thing for \\[key\\], x"),
    ):
        asked(endpoint_for(server), 40)
    assert len(server.seen) <= 8


def test_a_key_is_looked_for_where_it_was_named() -> None:
    with serving(lambda *_: Answer(b"", 401)) as server:
        with pytest.raises(EvalError, match="key: from JUDGE_KEY"):
            asked(endpoint_for(server, api_key_env="JUDGE_KEY"), 1)
        with pytest.raises(EvalError, match=r"key: none \(judge.api_key_env names its variable\)"):
            asked(endpoint_for(server, None), 1)


def test_an_account_without_money_ends_the_run_at_once() -> None:
    body = json.dumps({"error": {"message": "You are over it", "code": "insufficient_quota"}})
    with (
        serving(lambda *_: Answer(body.encode(), 429)) as server,
        pytest.raises(EvalError, match="insufficient_quota"),
    ):
        asked(endpoint_for(server, concurrency=1), 40)
    assert len(server.seen) == 1


@pytest.mark.parametrize("answer", [Answer(b"", 500), Answer(b"junk"), Answer(drop=True)])
def test_sixteen_failures_in_a_row_end_the_run(answer: Answer) -> None:
    found: Found = {}
    with serving(lambda *_: answer) as server:
        endpoint = endpoint_for(server, retries=0)
        with pytest.raises(EvalError, match="16 questions in a row got no answer"):
            endpoint.ask(questions(100), range(100), found.__setitem__)
    assert len(found) == 16
    assert len(server.seen) <= 16 + 8


def test_failures_that_are_not_in_a_row_do_not() -> None:
    with serving(lambda _, number: GOOD if number % 4 == 0 else Answer(b"junk")) as server:
        assert len(reasons(asked(endpoint_for(server, concurrency=1), 60))) == 45


def test_a_server_that_is_not_there_is_told_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    options = JudgeOptions(model="j", base_url=url, backoff=0.001, retries=2)
    endpoint = Endpoint(find_annotator("dialogue"), options)
    with pytest.raises(EvalError, match=f"no judge answers at judge.base_url={url}"):
        asked(endpoint, 40)


def test_what_the_caller_raises_ends_the_run_and_leaves_no_request_behind() -> None:
    taken = []

    def on_reply(number: int, answer: Reply | Unreadable) -> None:
        taken.append(number)
        if len(taken) == 5:
            raise RuntimeError("enough")

    with serving(lambda *_: GOOD) as server:
        with pytest.raises(RuntimeError, match="enough"):
            endpoint_for(server).ask(questions(200), range(200), on_reply)
        time.sleep(0.05)
        seen = len(server.seen)
        time.sleep(0.1)
        assert len(server.seen) == seen < 40
    assert len(taken) == 5
    assert threading.active_count() < 20


def test_a_key_that_comes_back_is_stored_nowhere(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)

    def script(request: Request, _: int) -> Answer:
        echoes = [
            completion(f"the key is {KEY}", arguments=KEY),
            Answer(json.dumps({"error": {"message": f"bad key {KEY}"}}).encode(), 400),
            Answer(b" " * 150 + f"{'x' * 190} {KEY}".encode(), 400),
            Answer(b" " * 16_370 + KEY.encode() * 3000, 400),
            Answer(KEY.encode(), 500),
            Answer(f'{{"error": "{KEY}\\n{KEY}"}}'.encode(), 429),
            Answer(f'{{"choices": [{{"message": {{"content": ["{KEY}"]}}}}]}}'.encode()),
            *(Answer(f'{{"error": {{"message": "{e}"}}}}'.encode(), 400) for e in ESCAPED),
            *(Answer(f'{{"error": "{e}" and no JSON}}'.encode(), 400) for e in ESCAPED),
            # Decoded, the key would stand where a long message is cut.
            *(Answer(f'{{"error": "{"x" * 185}{e}"}}'.encode(), 500) for e in ESCAPED),
            *(Answer(b" " * 16_300 + e.encode() * 3000, 400) for e in ESCAPED),
            *(completion(json.dumps({"a": "b"}).replace("b", e)) for e in ESCAPED),
        ]
        # A good answer after each, or they would be too many in a row.
        number, good = divmod(number_of(request), 2)
        return GOOD if good else echoes[number]

    with serving(script) as server:
        found = asked(endpoint_for(server, concurrency=1), 2 * (7 + 5 * len(ESCAPED)))
    told = " ".join([*map(repr, found.values()), caplog.text, *capfd.readouterr()])
    for spelled in (KEY, *ESCAPED):
        assert spelled[:12] not in told
    assert "[key]" in told


@pytest.mark.parametrize("key", [KEY, "a/b\\c'd", "\\\\", "/"])
def test_a_key_is_taken_out_in_any_spelling(key: str) -> None:
    redact = redactor(key)
    for spelled in (key, json.dumps(key)[1:-1], repr(key)[1:-1], key.replace("/", "\\/")):
        assert "[key]" in redact(f"<{spelled}>")
        assert key not in redact(f"<{spelled}>")
    assert redact("plain") == redactor(None)(redactor("")("plain")) == "plain"


def test_no_text_makes_taking_a_key_out_slow() -> None:
    start = time.process_time()
    for text in ("\\" * MAX_BYTES, KEY[:-1] * (MAX_BYTES // len(KEY)), "\\u0073" * 160_000):
        assert redactor(KEY)(text) == text
    assert time.process_time() - start < 5


@pytest.mark.parametrize("key", ["two words", "sk-\u00e9", "sk-\x00", "sk\nx"])
def test_a_key_that_is_none_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(EvalError, match="holds a character that no key has") as error:
        Endpoint(find_annotator("dialogue"), JudgeOptions(model="j"), key)
    assert key not in str(error.value)


def test_white_space_around_a_key_is_no_part_of_it() -> None:
    with serving(lambda *_: completion(f"<{KEY}>")) as server:
        (reply,) = asked(endpoint_for(server, f" {KEY}\n"), 1).values()
    assert isinstance(reply, Reply)
    assert reply.text == "<[key]>"


def test_a_key_over_plain_http_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    def made(url: str, key: str | None) -> None:
        Endpoint(find_annotator("dialogue"), JudgeOptions(model="j", base_url=url), key)

    made("https://judge.example/v1", KEY)
    made("http://127.0.0.1:8000/v1", KEY)
    made("http://judge.example/v1", None)
    assert not caplog.records
    made("http://judge.example/v1", KEY)
    assert "unencrypted" in caplog.text
    assert KEY not in caplog.text


def test_a_judge_needs_a_name_and_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    annotator: Annotator = find_annotator("dialogue")
    with pytest.raises(EvalError, match=r"names no judge\. Add judge\.model=NAME"):
        Endpoint(annotator, JudgeOptions())
    assert Endpoint(replace(annotator, model="own"), JudgeOptions()).name == "own"
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(EvalError, match=r"pip install 'mallowspo\[eval\]'"):
        Endpoint(annotator, JudgeOptions(model="j"))


@pytest.mark.parametrize(
    "url",
    [
        *("https://me:secret@host/v1", "https://secret@host/v1", "https://host/v1?key=secret"),
        "https://host/v1#secret",
    ],
)
def test_an_address_with_a_secret_in_it_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(EvalError, match="holds a user, a password or a query") as error:
        JudgeOptions(base_url=url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("url", ["", "host:8000/v1", "ftp://host/v1", "http://", "http://h:x/v1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(EvalError, match=r"judge\.base_url"):
        JudgeOptions(base_url=url)


@pytest.mark.parametrize("name", [KEY, "", "1KEY", "MY KEY", "MY=KEY", "KEY\n", "K\u00c9Y"])
def test_a_key_in_place_of_its_variable_is_refused_without_showing_it(name: str) -> None:
    with pytest.raises(EvalError, match=r"judge\.api_key_env is no name of a variable") as error:
        JudgeOptions(api_key_env=name)
    assert not name or name not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"swap": "none"}, "judge.swap=none"),
        ({"engine": "vllm"}, "judge.engine=vllm"),
        ({"concurrency": 0}, "judge.concurrency=0"),
        ({"requests_per_minute": 0.0}, "judge.requests_per_minute"),
        ({"timeout": 0.0}, "judge.timeout"),
        ({"retries": -1}, "judge.retries"),
        ({"max_failures": 1.5}, "judge.max_failures"),
        ({"max_cost": -1.0}, "judge.max_cost"),
        ({"price": "1"}, "judge.price=1"),
        ({"price": "1,nan"}, "judge.price=1,nan"),
        ({"price": "-1,2"}, "judge.price=-1,2"),
    ],
)
def test_an_option_out_of_range_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(EvalError, match=named):
        JudgeOptions(**changes)


def test_the_environment_sets_no_other_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "OPENAI_API_KEY" not in os.environ
    with serving(lambda *_: GOOD) as server:
        assert not reasons(asked(endpoint_for(server, None), 1))


def test_what_the_environment_adds_for_openai_goes_to_no_other_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-secret")
    named = ("X-Mine", "Authorization", "authorization", "User-Agent", "Host", "Cookie", STREAMED)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "\n".join(f"{name}: secret" for name in named))
    with serving(lambda *_: GOOD) as server:
        assert not reasons(asked(endpoint_for(server), 1))
        assert not reasons(asked(endpoint_for(server, None), 1))
    for seen, key in zip(server.seen, (KEY, "none"), strict=True):
        assert "secret" not in json.dumps(seen.headers)
        headers = {name.lower(): value for name, value in seen.headers.items()}
        assert "openai-organization" not in headers
        assert "openai-project" not in headers
        assert headers["authorization"] == f"Bearer {key}"
        assert headers["host"] in server.url


SCRIPTS: dict[str, Script] = {
    "headers": lambda *_: replace(GOOD, headers={f"x-{n}": "y" * 900 for n in range(300)}),
    "cookies": lambda *_: replace(GOOD, headers={"Set-Cookie": "a=b; expires=\x01; max-age=x"}),
    "charset": lambda *_: replace(GOOD, headers={"Content-Type": "text/html; charset=nonsense"}),
    "stream": lambda *_: Answer(b"data: {}\n\n", headers={"Content-Type": "text/event-stream"}),
    "slow headers": lambda *_: replace(GOOD, delay=30),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_other_bad_manners_end_in_an_answer_or_a_failure(name: str) -> None:
    with serving(SCRIPTS[name]) as server:
        found = asked(endpoint_for(server, timeout=0.5), 2)
    assert len(found) == 2


BODY = GOOD.body.decode()
RAW = [
    "",
    "\r\n\r\n",
    "junk" * 100_000,
    "HTTP/0.9 200\r\n\r\n",
    "HTTP/1.1 999 \r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.1 abc OK\r\n\r\n",
    "HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\nmore",
    "HTTP/1.1 100 Continue\r\n\r\n" * 5000,
    "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n" + BODY,
    "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"a":\r\n',
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n" + BODY,
    "HTTP/1.1 200 OK\r\nContent-Encoding: br, gzip, x\r\n\r\n" + BODY,
    "HTTP/1.1 302 Found\r\nLocation: \x7f://[\r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.1 200 OK\r\nName\r\n\r\n" + BODY,
    "HTTP/1.1 200 OK\r\nX: " + "y" * 300_000,
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]


@pytest.mark.parametrize("raw", RAW, ids=range(len(RAW)))
def test_what_is_hardly_http_is_a_failure_or_ends_the_run(raw: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=speak, args=(listening, raw.encode()), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        options = JudgeOptions(model="j", base_url=url, backoff=0.001, retries=1, timeout=1.0)
        told = ""
        try:
            told = repr(asked(Endpoint(find_annotator("dialogue"), options), 1)[0])
        except EvalError as error:
            told = str(error)
        assert told.startswith("the server says 302" if " 302 " in raw else "Unreadable(")
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def speak(listening: socket.socket, raw: bytes) -> None:
    """Send the same bytes to everybody who asks, until the socket is shut."""
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(raw)
