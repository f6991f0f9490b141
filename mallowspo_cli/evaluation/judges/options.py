"""What can be set for a judge, `judge.KEY=VALUE`."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.judges.annotators import Annotator

OPENAI = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
ENGINES = ("endpoint", "transformers")
SWAPS = ("random", "both")
VARIABLE = re.compile("[A-Za-z_][A-Za-z0-9_]*")
"""The name of an environment variable."""


@dataclass(frozen=True)
class JudgeOptions:
    """Who judges, how it is asked, and when to stop."""

    annotator: str = "weighted_alpaca_eval_gpt4_turbo"
    """Prompt and parser: a name of ours or of alpaca-eval's, or a YAML file."""
    model: str | None = None
    """Name of the judge at the server, or its directory or hub id with engine=transformers; None is
    the model that the annotator was made for."""
    engine: str = "endpoint"
    """endpoint: a server that speaks OpenAI's protocol. transformers: a model in this process."""
    base_url: str = OPENAI
    """The server, with /v1 or what else stands before /chat/completions."""
    api_key_env: str | None = None
    """Environment variable that holds the key; None: OPENAI_API_KEY for OpenAI itself, else none,
    so that no other server gets that key unasked."""
    concurrency: int = 8
    """Questions at a time. One server on a CPU is as fast with 1."""
    requests_per_minute: float | None = None
    """Most requests that begin in a minute, retries included; None: no limit but the server's."""
    timeout: float = 120.0
    """Seconds for one whole answer. Raise it for a slow judge that writes much."""
    retries: int = 5
    """Further attempts after 429, 5xx or a lost connection; a time-out has one."""
    backoff: float = 1.0
    """Seconds before the first further attempt, doubling up to 30; the server's Retry-After counts
    if it names one."""
    swap: str = "random"
    """random: each pair once, in AlpacaEval's order. both: in both orders, and their mean; costs
    twice as much and takes out what a judge likes about a place."""
    seed: int = 0
    """Of the order with swap=random; 0 is AlpacaEval's."""
    max_failures: float = 0.05
    """Share of judgements that may fail; with more the command's exit code says so."""
    max_cost: float | None = None
    """US dollars that may be spent; None: any sum."""
    price: str | None = None
    """IN,OUT: US dollars a million tokens; None: the list price where it is known."""
    batch_size: int = 8
    """Questions at a time with engine=transformers. Lower it when memory runs out."""

    def __post_init__(self) -> None:
        checks = {
            "engine": self.engine in ENGINES,
            "swap": self.swap in SWAPS,
            "concurrency": self.concurrency >= 1,
            "requests_per_minute": self.requests_per_minute is None or self.requests_per_minute > 0,
            "timeout": self.timeout > 0,
            "retries": self.retries >= 0,
            "backoff": self.backoff >= 0,
            "max_failures": 0 <= self.max_failures <= 1,
            "max_cost": self.max_cost is None or self.max_cost >= 0,
            "batch_size": self.batch_size >= 1,
        }
        for name, good in checks.items():
            if not good:
                raise EvalError(
                    f"judge.{name}={getattr(self, name)} is out of range. See `--help`."
                )
        if self.price is not None:
            prices(self.price)
        check_url(self.base_url)
        if self.api_key_env is not None and not VARIABLE.fullmatch(self.api_key_env):
            # It may be the key itself, so it is not repeated.
            raise EvalError(
                "judge.api_key_env is no name of a variable; expected letters, digits and _. Put "
                "the key into an environment variable and give its name, such as JUDGE_KEY."
            )

    @property
    def local(self) -> bool:
        """Whether the judge is on this machine."""
        return self.engine == "transformers" or is_loopback(self.base_url)

    @property
    def key_variable(self) -> str | None:
        """The environment variable that holds the key for this server; None where it needs none."""
        if self.engine == "transformers":
            return None
        named_none = self.api_key_env is None
        return OPENAI_KEY if named_none and is_openai(self.base_url) else self.api_key_env


def settings(annotator: Annotator, judge: str, options: JudgeOptions) -> dict[str, Any]:
    """What all lines of a journal of judgements share: all that can change a verdict.

    Args:
        judge: the name of the judge's model.
    """
    return {
        "kind": "judgements",
        "annotator": annotator.name,
        "digest": annotator.digest,
        "judge": judge,
        "engine": options.engine,
        "swap": options.swap,
        "seed": options.seed,
    }


def prices(text: str) -> tuple[float, float]:
    """US dollars for a million tokens in and out.

    Raises:
        EvalError: anything but two numbers.
    """
    try:
        incoming, outgoing = (float(part) for part in text.split(","))
    except ValueError:
        incoming = outgoing = -1.0
    # Not a number is neither.
    if not (0 <= incoming < 1e6 and 0 <= outgoing < 1e6):
        raise EvalError(
            f"judge.price={text}: expected IN,OUT, such as 2.5,10 (US dollars a million)."
        )
    return incoming, outgoing


def check_url(url: str) -> None:
    """Refuse a server's address that cannot be one, or that holds a secret.

    Raises:
        EvalError: says which; an address with a password is not repeated.
    """
    try:
        parts = urlsplit(url)
        named, port = parts.hostname, parts.port
    except ValueError as error:
        raise EvalError(f"judge.base_url is no address: {error}.") from error
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise EvalError(
            "judge.base_url holds a user, a password or a query, which would end in files and "
            "logs. Give the address alone, and name the key's variable with judge.api_key_env."
        )
    if parts.scheme not in ("http", "https") or not named or port == 0:
        raise EvalError(f"judge.base_url={url}: expected http://HOST[:PORT]/v1 or https://.")


def is_loopback(url: str) -> bool:
    """Whether an address is on this machine."""
    host = _host(url)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def is_openai(url: str) -> bool:
    """Whether an address is OpenAI's own."""
    return _host(url) == _host(OPENAI)


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""
