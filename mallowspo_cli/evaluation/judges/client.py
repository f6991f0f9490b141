"""One request to a server of OpenAI's protocol, with limits on what comes back."""

import asyncio
import json
import re
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from mallowspo_cli.errors import EvalError, first_line
from mallowspo_cli.evaluation.judges.options import JudgeOptions, is_loopback, is_openai
from mallowspo_cli.evaluation.judges.replies import Unreadable
from mallowspo_cli.evaluation.outputs import printable

MAX_BYTES = 1_000_000
"""A longer answer is cut off and counts as failed."""
MAX_ERROR_BYTES = 16_384
"""So much of a server's error is read."""
MAX_SAID = 200
"""So many characters of it are shown."""
NO_KEY = "none"
"""What a server gets that needs no key: the client insists on one."""
BODY = "mallowspo.body"
STREAMED = "X-Stainless-Raw-Response"
ESCAPES = 8
"""So many backslashes before a character of the key are known as its escape."""
LONGEST_ESCAPE = ESCAPES + len("U00000061")


class Refused(Exception):  # noqa: N818 - an answer of the server, handled by the caller
    """The server's answer is no success."""

    def __init__(self, code: int, said: str, wait: float | None):
        super().__init__(said)
        self.code, self.said = code, said
        self.wait = wait
        """Seconds, by its Retry-After."""


class NoAnswer(Exception):  # noqa: N818 - as above
    """There is no whole answer: no connection, a lost one, or the time is over."""

    def __init__(self, reason: str, late: bool = False, absent: bool = False):
        super().__init__(reason)
        self.late, self.absent = late, absent


class JudgeClient:
    """An AsyncOpenAI client that reads no more than `MAX_BYTES` and never retries by itself.

    An async context manager, to be made inside the running loop.

    Raises:
        EvalError: the openai package is missing, or the environment's proxy cannot be used.
    """

    def __init__(self, options: JudgeOptions, api_key: str | None):
        self._openai, self._key = openai_package(), api_key
        self._timeout, self.redact = options.timeout, redactor(api_key)
        here = is_loopback(options.base_url)
        try:
            http = self._openai.DefaultAsyncHttpxClient(
                # A proxy from the environment could not reach this machine's own ports.
                trust_env=not here,
                # Reading the certificates takes 0.1 s, and plain http has none.
                verify=not (here and options.base_url.startswith("http:")),
                # Another place may be anybody's; the key is for this one.
                follow_redirects=False,
                event_hooks={
                    "request": [] if is_openai(options.base_url) else [self._only_ours],
                    "response": [self._read],
                },
                timeout=None,
            )
        except (ImportError, ValueError) as error:
            raise EvalError(
                f"cannot use the proxy in the environment: {first_line(error)}"
            ) from error
        self._client = self._openai.AsyncOpenAI(
            base_url=options.base_url,
            api_key=api_key or NO_KEY,
            http_client=http,
            max_retries=0,
            timeout=None,
            default_headers={"Accept-Encoding": "identity"},
        )

    async def __aenter__(self) -> "JudgeClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def complete(self, fields: dict[str, Any]) -> bytes:
        """The body of a chat completion.

        Raises:
            Refused: the server answers with an error.
            NoAnswer: no whole answer in time.
            Unreadable: the answer is too long or compressed.
        """
        create = self._client.chat.completions.with_streaming_response.create
        try:
            async with asyncio.timeout(self._timeout), create(**fields) as response:
                return response.http_response.extensions[BODY]
        except TimeoutError as error:
            reason = f"no whole answer within {self._timeout:g} s (judge.timeout)"
            raise NoAnswer(reason, late=True) from error
        except self._openai.APIConnectionError as error:
            cause = error.__cause__
            if isinstance(cause, Refused | Unreadable):
                # Earlier versions of the client wrap whatever is raised meanwhile.
                raise cause from None
            said = one_line(self.redact(first_line(cause or error)))
            # By its name: which of httpx and httpx2 it is from depends on the client's version.
            absent = type(cause).__name__ == "ConnectError"
            reason = f"{'no connection' if absent else 'the connection is lost'} ({said})"
            raise NoAnswer(reason, absent=absent) from error

    async def _only_ours(self, request: Any) -> None:
        """Leave a request the headers that are written here, and no other.

        The client takes an organization, a project and any header at all (OPENAI_ORG_ID,
        OPENAI_PROJECT_ID, OPENAI_CUSTOM_HEADERS) from the environment. They are for OpenAI alone.
        """
        # By this one the client knows, from the request, that it is not to read the answer itself.
        streamed = request.headers.get(STREAMED)
        for name in list(request.headers):
            del request.headers[name]
        request.headers.update(
            {
                "Host": request.url.netloc.decode("ascii"),
                "Connection": "keep-alive",
                "User-Agent": "mallowspo",
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                "Authorization": f"Bearer {self._key or NO_KEY}",
                "Content-Type": "application/json",
                "Content-Length": str(len(request.content)),
                STREAMED: streamed,
            }
        )

    async def _read(self, response: Any) -> None:
        """Read a response's body into its extensions as soon as its headers are there.

        The client would read an error's body, and a compressed one, without a limit.
        """
        encoding = response.headers.get("content-encoding", "identity")
        if encoding not in ("", "identity"):
            raise Unreadable("the answer is compressed, which was not asked for")
        limit = MAX_BYTES if response.is_success else MAX_ERROR_BYTES
        parts, size = [], 0
        async with aclosing(response.aiter_raw()) as chunks:
            async for chunk in chunks:
                parts.append(chunk)
                size += len(chunk)
                if size > limit:
                    break
        body = b"".join(parts)
        if not response.is_success:
            # What is cut off could end within the key.
            text = self.redact(body.decode("utf-8", "replace"))
            unsure = LONGEST_ESCAPE * len(self._key or "") if size > limit else 0
            wait = _seconds(response.headers.get("retry-after"))
            said = _said(text[: max(0, len(text) - unsure)], self.redact)
            raise Refused(response.status_code, said, wait)
        if size > limit:
            raise Unreadable(f"the answer is longer than {MAX_BYTES:,} bytes")
        response.extensions[BODY] = body


def openai_package() -> Any:
    """The openai package.

    Raises:
        EvalError: it is missing.
    """
    try:
        import openai
    except ImportError as error:
        raise EvalError(
            "a judge's server is asked with the openai package: pip install 'mallowspo[eval]'. "
            "judge.engine=transformers needs no server."
        ) from error
    return openai


def redactor(key: str | None) -> Callable[[str], str]:
    """What takes a key out of a text, also one in escapes of JSON or of Python."""
    # Backslashes may stand before each character anyway, so those of the key need no mention.
    found = [_spelled(character) for character in key or "" if character != "\\"]
    pattern = re.compile("".join(found)) if found else None

    def redact(text: str) -> str:
        text = text.replace(key, "[key]") if key else text
        return pattern.sub("[key]", text) if pattern else text

    return redact


def one_line(text: str) -> str:
    """A server's words as they can be shown: short, without control characters."""
    plain = "".join(c if c.isprintable() else " " for c in printable(text))
    return " ".join(plain.split())[:MAX_SAID]


def _spelled(character: str) -> str:
    """A regular expression for a character or an escape of it."""
    code = ord(character)
    escape = rf"(?i:u(?:0000)?{code:04x}|x{code:02x})|0?{code:o}"
    # A limit, so that a text of backslashes takes no longer than its length.
    return rf"(?:\\{{0,{ESCAPES}}}{re.escape(character)}|\\{{1,{ESCAPES}}}(?:{escape}))"


def _said(text: str, redact: Callable[[str], str]) -> str:
    """The message in the body of an error, with its code; `redact` sees it before it is cut."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    error = value.get("error", value) if isinstance(value, dict) else None
    if isinstance(error, dict):
        found = [error.get(key) for key in ("message", "detail", "code")]
        error = ", ".join(part for part in found if isinstance(part, str))
    said = error if isinstance(error, str) and error else text
    return one_line(redact(said)) or "nothing more"


def _seconds(header: str | None) -> float | None:
    """A Retry-After in seconds; None where there is none, or a date."""
    try:
        value = float(header or "")
    except ValueError:
        return None
    return value if value >= 0 else None
