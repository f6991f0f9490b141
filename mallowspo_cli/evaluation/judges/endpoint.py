"""A judge behind a server of OpenAI's protocol, which may be slow, broken or hostile."""

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import monotonic

from mallowspo_cli.distributed import log
from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.judges.annotators import Annotator
from mallowspo_cli.evaluation.judges.client import (
    JudgeClient,
    NoAnswer,
    Refused,
    openai_package,
    redactor,
)
from mallowspo_cli.evaluation.judges.options import JudgeOptions, is_loopback
from mallowspo_cli.evaluation.judges.replies import Messages, OnReply, Reply, Unreadable, read_reply

MAX_IN_A_ROW = 16
"""So many questions in a row without an answer end the run."""
MAX_WAIT = 120.0
"""Longest time, in seconds, that a server's Retry-After may ask for; a longer one ends the run."""
MAX_BACKOFF = 30.0
"""Longest time between two attempts otherwise."""
RETRIED = {408, 409, 425, 429}
"""Codes of errors that may go away, beside 5xx."""
FATAL = {301, 302, 303, 307, 308, 401, 402, 403, 404, 405}
"""Codes that every further request would meet."""
QUOTA = "insufficient_quota"
"""OpenAI's word for an account without money, which it sends as a rate limit."""


class Endpoint:
    """Asks a judge's server, several questions at a time."""

    def __init__(self, annotator: Annotator, options: JudgeOptions, api_key: str | None = None):
        """Say who is asked.

        Args:
            api_key: the key itself, which the caller has read from the environment.

        Raises:
            EvalError: no model is named, the key is none, or the openai package is missing.
        """
        name = options.model or annotator.model
        if name is None:
            raise EvalError(f"the annotator {annotator.name} names no judge. Add judge.model=NAME.")
        openai_package()
        self.name, self.options, self.request = name, options, annotator.request
        self._key = _checked(api_key)
        self._redact = redactor(self._key)
        if self._key and options.base_url.startswith("http:") and not is_loopback(options.base_url):
            log.warning("the judge's key goes to %s unencrypted (http)", options.base_url)

    def ask(self, questions: Sequence[Messages], pending: Sequence[int], on_reply: OnReply) -> None:
        """Ask the pending questions and hand on each answer as soon as it is there, in any order.

        Raises:
            EvalError: the server will answer none (wrong key, model or address; nothing is there;
                `MAX_IN_A_ROW` failures; it asks to wait longer than `MAX_WAIT`). Answers handed on
                before stay good.
        """
        if pending:
            asyncio.run(self._ask_all(questions, pending, on_reply))

    def redact(self, text: str) -> str:
        """The text without the key."""
        return self._redact(text)

    async def _ask_all(
        self, questions: Sequence[Messages], pending: Sequence[int], on_reply: OnReply
    ) -> None:
        todo = iter(pending)
        async with JudgeClient(self.options, self._key) as client:
            round_ = _Round(self, client)
            workers = [
                asyncio.create_task(round_.work(questions, todo, on_reply))
                for _ in range(min(self.options.concurrency, len(pending)))
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)


@dataclass(frozen=True)
class _Trouble:
    """Why an attempt has failed."""

    reason: str
    retries: int
    """How many further attempts the question may have."""
    wait: float | None = None
    """Seconds that the server asks to wait."""
    everyone: bool = False
    """Whether that holds for other questions too."""
    absent: bool = False
    """Whether no server may be there at all."""


class _Round:
    """What the workers of one call share."""

    def __init__(self, endpoint: Endpoint, client: JudgeClient):
        self.endpoint, self.client, self.options = endpoint, client, endpoint.options
        self.random = random.Random(self.options.seed)
        self.failures = 0
        """In a row."""
        self.answered = self.ended = False
        self.next_start = monotonic()
        """When the next request may begin."""

    async def work(
        self, questions: Sequence[Messages], todo: Iterator[int], on_reply: OnReply
    ) -> None:
        """Take questions one by one until none is left, or one worker has ended in an error."""
        try:
            for index in todo:
                answer = await self._answer_or_failure(questions[index])
                if self.ended:
                    return
                self._hand_on(index, answer, on_reply)
        except BaseException:
            self.ended = True
            raise

    async def _answer_or_failure(self, question: Messages) -> Reply | Unreadable:
        try:
            return await self._answer(question)
        except Unreadable as error:
            return error

    def _hand_on(self, index: int, answer: Reply | Unreadable, on_reply: OnReply) -> None:
        good = isinstance(answer, Reply)
        self.answered, self.failures = self.answered or good, 0 if good else self.failures + 1
        on_reply(index, answer)
        if self.failures >= MAX_IN_A_ROW:
            raise EvalError(
                f"{MAX_IN_A_ROW} questions in a row got no answer from {self.options.base_url}; "
                f"the last one: {answer}. Answers so far are kept: the same command goes on."
            )

    async def _answer(self, question: Messages) -> Reply:
        """The reply to one question, after as many attempts as it takes."""
        for attempt in range(self.options.retries + 1):
            await self._turn()
            start = monotonic()
            found = await self._attempt(question)
            if isinstance(found, Reply):
                return replace(found, seconds=round(monotonic() - start, 3))
            asked = found.wait or 0.0
            if asked > MAX_WAIT:
                raise EvalError(
                    f"the judge's server asks to wait {asked:.0f} s ({found.reason}); answers so "
                    "far are kept, and the same command goes on then."
                )
            if attempt >= found.retries:
                break
            backoff = self.options.backoff * 2 ** min(attempt, 10) * self.random.uniform(0.5, 1.0)
            await self._pause(max(asked, min(backoff, MAX_BACKOFF)), found.everyone)
        if found.absent and not self.answered:
            raise EvalError(
                f"no judge answers at judge.base_url={self.options.base_url}: {found.reason}. Is "
                "its server running?"
            )
        raise Unreadable(found.reason)

    async def _attempt(self, question: Messages) -> Reply | _Trouble:
        """One request.

        Raises:
            EvalError: no further request would have another answer.
            Unreadable: neither would this one.
        """
        request = self.endpoint.request
        fields = {**request, "model": self.endpoint.name, "messages": question}
        try:
            return read_reply(await self.client.complete(fields), self.client.redact)
        except NoAnswer as error:
            # What was too slow once is likely to be so again.
            retries = min(1, self.options.retries) if error.late else self.options.retries
            return _Trouble(str(error), retries, absent=error.absent)
        except Refused as error:
            reason = f"the server says {error.code}: {error.said}"
            if error.code in FATAL or QUOTA in error.said:
                raise EvalError(self._fatal(reason)) from None
            if error.code not in RETRIED and error.code < 500:
                return _Trouble(reason, retries=0)
            return _Trouble(reason, self.options.retries, error.wait, everyone=error.code == 429)

    def _fatal(self, reason: str) -> str:
        variable = self.options.key_variable
        key = f"from {variable}" if variable else "none (judge.api_key_env names its variable)"
        return (
            f"{reason}. Asked was judge.model={self.endpoint.name} at "
            f"judge.base_url={self.options.base_url}; key: {key}. Answers so far are kept."
        )

    async def _turn(self) -> None:
        """Wait until a request may begin; requests begin evenly, not in bursts."""
        rate = self.options.requests_per_minute
        start = max(self.next_start, monotonic())
        self.next_start = start + (60 / rate if rate else 0.0)
        while (left := start - monotonic()) > 0:
            await asyncio.sleep(left)

    async def _pause(self, seconds: float, everyone: bool) -> None:
        """Wait before a further attempt; with `everyone` no other request begins meanwhile."""
        if everyone:
            self.next_start = max(self.next_start, monotonic() + seconds)
        await asyncio.sleep(seconds)


def _checked(key: str | None) -> str | None:
    """The key without white space around it.

    Raises:
        EvalError: it cannot be sent.
    """
    key = (key or "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise EvalError(
            "the judge's key holds a character that no key has. Is it the right variable?"
        )
    return key or None
