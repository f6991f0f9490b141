"""A judge's server on loopback that answers what a test tells it to, also badly."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Request = dict[str, Any]


@dataclass
class Answer:
    """An HTTP response, and how it is sent."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    """Seconds before anything is sent."""
    repeat: bytes = b""
    """Is sent again and again behind the body, until the other side goes away."""
    pause: float = 0.0
    """Seconds between two repetitions."""
    short: int = 0
    """So many bytes of the body are promised but not sent."""
    drop: bool = False
    """Close the connection without a word."""


Script = Callable[[Request, int], Answer]
"""What to answer to the request (its JSON), which is the n-th, from 0."""


@dataclass
class Seen:
    """A request as it came."""

    body: Request
    headers: dict[str, str]
    path: str
    time: float

    @property
    def texts(self) -> list[str]:
        return [message["content"] for message in self.body["messages"]]


class JudgeServer:
    """Answers by a script and remembers what it was asked."""

    def __init__(self, script: Script):
        self.script = script
        self.seen: list[Seen] = []
        self.most_at_once = self._at_once = 0
        self.sent = 0
        """Bytes of repetitions that were sent."""
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def enter(self, seen: Seen) -> int:
        with self._lock:
            self.seen.append(seen)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            return len(self.seen) - 1

    def leave(self) -> None:
        with self._lock:
            self._at_once -= 1


@contextmanager
def serving(script: Script) -> Iterator[JudgeServer]:
    """A running server."""
    judge = JudgeServer(script)
    thread = threading.Thread(target=judge._server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        judge.stopping.set()
        judge._server.shutdown()
        judge._server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is no error here."""


def _handler(judge: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Nothing on stderr."""

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            seen = Seen(json.loads(content), dict(self.headers), self.path, time.monotonic())
            number = judge.enter(seen)
            try:
                answer = judge.script(seen.body, number)
                judge.stopping.wait(answer.delay)
            finally:
                # Before anything is sent: a client may ask again as soon as it has its answer.
                judge.leave()
            self._send(answer)

        def _send(self, answer: Answer) -> None:
            self.close_connection = True
            if answer.drop:
                return
            self.send_response(answer.status)
            for name, value in ({"Content-Type": "application/json"} | answer.headers).items():
                self.send_header(name, value)
            if not answer.repeat:
                self.send_header("Content-Length", str(len(answer.body) + answer.short))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(answer.body)
            while answer.repeat and not judge.stopping.is_set():
                self.wfile.write(answer.repeat)
                self.wfile.flush()
                judge.sent += len(answer.repeat)
                judge.stopping.wait(answer.pause)

    return Handler


def completion(
    content: Any,
    top: dict[str, Any] | None = None,
    arguments: Any = None,
    usage: Any = None,
    finish: str = "stop",
) -> Answer:
    """A chat completion with a text, the top log-probs of its only token, or a function call."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if arguments is not None:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        message["tool_calls"] = [call]
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": finish}
    if top is not None:
        tops = [{"token": token, "logprob": value, "bytes": None} for token, value in top.items()]
        first = tops[0] if tops else {"token": "", "logprob": 0.0}
        choice["logprobs"] = {"content": [{**first, "top_logprobs": tops}]}
    value = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [choice],
        "usage": usage or {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101},
    }
    return Answer(json.dumps(value).encode())
