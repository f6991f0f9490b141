"""Annotators: how a judge is asked, and how its answer is read. Ours, the user's, AlpacaEval's.

All are files in the schema of alpaca-eval's `configs.yaml`. That package's own are read where it is
installed; its Python is not imported.
"""

import hashlib
import importlib.util
import json
import os
import re
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from mallowspo_cli.errors import EvalError, first_line
from mallowspo_cli.evaluation.judges.parsers import find_parser
from mallowspo_cli.evaluation.judges.replies import Messages
from mallowspo_cli.evaluation.judges.spellings import break_special
from mallowspo_cli.evaluation.judges.verdicts import Parser
from mallowspo_cli.evaluation.outputs import printable
from mallowspo_cli.recipe.nearest import nearest

OURS = Path(__file__).parent / "prompts"
BLOCK = re.compile(r"<\|im_start\|>([^\n]*)\n(.*?)<\|im_end\|>", re.DOTALL)
PLACE = re.compile(r"\{(instruction|output_1|output_2)\}")
PLACES = {"instruction", "output_1", "output_2"}
RENAMED = {"model_name": "model", "max_new_tokens": "max_tokens"}
LEFT_OUT = {
    *("model_kwargs", "is_chatml_prompt", "requires_chatml", "client_kwargs", "price_per_token"),
    *("batch_size", "num_procs", "n_retries", "sleep_time"),
}
"""Of alpaca-eval's own client; ours has judge.KEY for what they do."""
REQUEST = {
    *("max_tokens", "max_completion_tokens", "temperature", "top_p", "logprobs", "top_logprobs"),
    *("tools", "tool_choice", "response_format", "stop", "seed", "logit_bias"),
    *("frequency_penalty", "presence_penalty", "reasoning_effort", "extra_body"),
}
"""Keys of a chat completion that an annotator may set."""
CLIENTS = ("openai_completions", "vllm_local_completions")
"""Functions of alpaca-eval that send ChatML as messages."""


@dataclass(frozen=True)
class Annotator:
    """A prompt, what goes with it in the request, and how the answer is read."""

    name: str
    messages: tuple[tuple[str, str], ...]
    """(role, template); the templates hold {instruction}, {output_1} and {output_2}."""
    parse: Parser
    model: str | None
    """The judge that it was made for."""
    request: dict[str, Any] = field(hash=False)
    """Further fields of the request: max_tokens, temperature, logprobs, tools, ..."""
    source: str
    """Where it comes from: alpaca-eval with its version, or a file."""

    @property
    def digest(self) -> str:
        """Hex name of the prompt, the request and the parser's settings."""
        settings = [self.messages, self.request, repr(self.parse)]
        text = json.dumps(settings, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def ask(self, instruction: str, first: str, second: str) -> tuple[Messages, int]:
        """The question whether `first` or `second` is better.

        All places are filled at once, so a text that spells one stays a text. Spellings of special
        tokens in the three texts are broken with a space, since servers read them as the tokens.

        Returns:
            The messages, and how many spellings were broken.
        """
        texts, count = {}, 0
        given = {"instruction": instruction, "output_1": first, "output_2": second}
        for place, text in given.items():
            texts[place], broken = break_special(printable(text))
            count += broken
        filled = [
            {"role": role, "content": PLACE.sub(lambda found: texts[found[1]], template).strip()}
            for role, template in self.messages
        ]
        return filled, count


def find_annotator(name: str) -> Annotator:
    """An annotator by our name, by a YAML file's path, or by its name in alpaca-eval.

    Raises:
        EvalError: no such name (with the nearest), or one that cannot be used (says what of it).
    """
    if name in our_annotators():
        return _read(OURS / f"{name}.yaml", name, "mallowspo")
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise EvalError(f"no annotator file at {name}.")
        return _read(path, None, str(path))
    theirs = _installed()
    if theirs is None:
        raise EvalError(
            f"no annotator named '{name}'.{nearest(name, our_annotators())} Ours are: "
            f"{', '.join(our_annotators())}. For those of AlpacaEval: pip install 'mallowspo[eval]'"
        )
    file = theirs / name / "configs.yaml"
    if not re.fullmatch(r"[\w.-]+", name) or not file.is_file():
        known = [*our_annotators(), *(path.parent.name for path in theirs.glob("*/configs.yaml"))]
        raise EvalError(
            f"no annotator named '{name}'.{nearest(name, known)} Ours are: "
            f"{', '.join(our_annotators())}; AlpacaEval's lie in {theirs}."
        )
    return _read(file, None, f"alpaca-eval {_version()}")


def our_annotators() -> list[str]:
    """Names of the annotators of this package."""
    return sorted(path.stem for path in OURS.glob("*.yaml"))


def _installed() -> Path | None:
    """The directory of alpaca-eval's annotators, without importing the package."""
    spec = importlib.util.find_spec("alpaca_eval")
    places = spec.submodule_search_locations if spec is not None else None
    for place in places or ():
        if (directory := Path(place) / "evaluators_configs").is_dir():
            return directory
    return None


def _version() -> str:
    try:
        return version("alpaca-eval")
    except PackageNotFoundError:
        return "(unknown version)"


def _read(path: Path, name: str | None, source: str) -> Annotator:
    """The only annotator in a file."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EvalError(f"cannot read the annotator in {path}: {first_line(error)}.") from error
    if not isinstance(found, dict) or not all(isinstance(c, dict) for c in found.values()):
        raise EvalError(f"{path}: expected NAME: with the annotator's keys below it.")
    if len(found) != 1:
        raise EvalError(
            f"{path} holds {len(found)} annotators, which is not supported; expected 1."
        )
    ((key, config),) = found.items()
    where = f"the annotator {key} ({source})"
    _check(config, where)
    messages = _messages(_template(config.get("prompt_template"), path, where), where)
    kwargs = dict(config.get("completions_kwargs") or {})
    request = _request(kwargs, where)
    model = request.pop("model", None)
    parse = find_parser(
        config.get("fn_completion_parser", "regex_parser"),
        config.get("completion_parser_kwargs") or {},
        where,
    )
    return Annotator(name or str(key), messages, parse, model, request, source)


def _check(config: dict[str, Any], where: str) -> None:
    """Refuse what would be read otherwise than its author meant."""
    client = config.get("fn_completions", CLIENTS[0])
    if client not in CLIENTS:
        raise EvalError(
            f"{where} uses fn_completions={client}, which is not supported; supported are: "
            f"{', '.join(CLIENTS)}."
        )
    if config.get("batch_size", 1) != 1:
        raise EvalError(
            f"{where} asks {config['batch_size']} questions at a time, which is not supported."
        )
    processors = set(config.get("processors_to_kwargs") or {}) - {"ChainOfThoughtProcessor"}
    if processors:
        raise EvalError(f"{where} uses {', '.join(sorted(processors))}, which is not supported.")


def _template(named: Any, path: Path, where: str) -> str:
    """The prompt: a file beside the configuration or one directory above, or the text itself."""
    if not isinstance(named, str):
        raise EvalError(f"{where} has no prompt_template.")
    if "\n" in named:
        return named
    for directory in (path.parent.parent, path.parent):
        if (file := directory / named).is_file():
            return file.read_text(encoding="utf-8")
    raise EvalError(f"{where}: no prompt at {path.parent.parent / named}.")


def _messages(template: str, where: str) -> tuple[tuple[str, str], ...]:
    """The blocks of a ChatML text, before anything is filled in."""
    found = tuple((role.strip(), text.strip()) for role, text in BLOCK.findall(template))
    unknown = {role for role, _ in found} - {"system", "user", "assistant"}
    if not found or unknown:
        raise EvalError(
            f"{where}: the prompt is no conversation in ChatML (<|im_start|>user ... <|im_end|>), "
            f"which is not supported{f'; roles: {sorted(unknown)}' if unknown else ''}."
        )
    if missing := PLACES - {place for _, text in found for place in PLACE.findall(text)}:
        raise EvalError(f"{where}: the prompt lacks {{{sorted(missing)[0]}}}.")
    return found


def _request(kwargs: dict[str, Any], where: str) -> dict[str, Any]:
    """What goes into the request; top_p=1 and temperature=0 where the annotator leaves them out.

    Without them a server would sample by the model's own configuration.
    """
    renamed = {RENAMED.get(key, key): value for key, value in kwargs.items()}
    if unknown := sorted(set(renamed) - LEFT_OUT - REQUEST - {"model"}):
        raise EvalError(f"{where} sets completions_kwargs.{unknown[0]}, which is not supported.")
    kept = {key: value for key, value in renamed.items() if key not in LEFT_OUT}
    return {"temperature": 0, "top_p": 1.0, **kept}
