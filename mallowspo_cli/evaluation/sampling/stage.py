"""The generate stage: answers of a model to instructions, one journal line each."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.data.tokenize import TokenIds
from mallowspo_cli.distributed import log, progress
from mallowspo_cli.errors import EvalError, first_line
from mallowspo_cli.evaluation.journal import Journal
from mallowspo_cli.evaluation.outputs import Output
from mallowspo_cli.evaluation.sampling.tasks import GenerateOptions, Task


@dataclass(frozen=True)
class Prompt:
    """A task as the model gets it, for one of its samples."""

    index: int
    """Place among the tasks."""
    sample: int
    """Which of the answers to it."""
    task: Task
    ids: TokenIds
    most_tokens: int
    """Longest answer, by the options and the model's context."""

    def stream(self, seed: int) -> int:
        """Seed of this answer's own random numbers, whatever is sampled beside it."""
        text = f"{seed}\0{self.sample}\0{self.task.instruction}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


Done = Callable[[Prompt, TokenIds, str], None]
"""done(prompt, tokens of the answer without the end token, "stop" or "length")."""


class Engine(Protocol):
    """What samples."""

    name: str
    """With its version."""
    batch_size: int
    """Prompts that `answer` takes at a time."""

    def answer(self, batch: Sequence[Prompt], missing: Sequence[bool], done: Done) -> None:
        """Sample answers; call `done` for each missing one as soon as it is whole."""
        ...


@dataclass(frozen=True)
class Generated:
    """What the stage came to."""

    outputs: list[Output]
    """The first sample of each instruction, in order."""
    cut: int
    """Answers that reached their longest length."""
    tokens: int
    """Of all answers, end tokens left out."""
    tokens_per_second: float | None
    """Of the answers that this call sampled; None where all were there."""


def render_prompts(
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    options: GenerateOptions,
) -> list[Prompt]:
    """Each task by the chat template, as token ids, for each sample.

    Raises:
        EvalError: no chat template, one that refuses, no room for an answer, or two BOS tokens.
    """
    if not tokenizer.chat_template:
        raise EvalError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template. Give one: "
            "model.chat_template=plain, dialogue or FILE.jinja (or take a model that has one)."
        )
    found = []
    for index, task in enumerate(tasks):
        turns = [message.as_dict() for message in task.messages]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise EvalError(
                f"instruction {index}: the chat template refuses it: {first_line(error)}."
            ) from error
        found.append(str(text))
    encoded: Any = tokenizer(found, add_special_tokens=False)["input_ids"] if found else []
    prompts = []
    for index, (task, ids) in enumerate(zip(tasks, encoded, strict=True)):
        if ids[:2] == [tokenizer.bos_token_id] * 2 and tokenizer.bos_token_id is not None:
            raise EvalError(
                f"instruction {index}: the chat template gives two BOS tokens. Mend it: "
                "model.chat_template=FILE.jinja."
            )
        room = (
            options.max_tokens if context is None else min(options.max_tokens, context - len(ids))
        )
        if room < 1:
            raise EvalError(
                f"instruction {index} has {len(ids):,} tokens, and the model's context is "
                f"{context:,}: no room for an answer. Leave it out of instructions=FILE."
            )
        row = np.asarray(ids, dtype=np.int32)
        prompts += [Prompt(index, sample, task, row, room) for sample in range(options.samples)]
    return prompts


def generation_settings(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    engine: str,
    options: GenerateOptions,
) -> dict[str, Any]:
    """What a journal of generations says of what made it."""
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(len(prompt.ids).to_bytes(8, "little") + prompt.ids.tobytes())
    template = hashlib.blake2b(str(tokenizer.chat_template).encode(), digest_size=8)
    # The batch size moves answers by rounding alone, and may have to change when memory runs out.
    left_out = ("engine", "batch_size")
    kept = {key: value for key, value in asdict(options).items() if key not in left_out}
    return {
        "model": model,
        "engine": engine,
        **kept,
        "template": template.hexdigest(),
        "prompts": digest.hexdigest(),
    }


def generate(
    prompts: Sequence[Prompt],
    load_engine: Callable[[], Engine],
    tokenizer: PreTrainedTokenizerBase,
    generator: str,
    journal: Journal,
) -> Generated:
    """Answer what the journal lacks; where it lacks nothing the engine is not loaded.

    Batches are the same whatever is there already, and each answer draws from a stream of its own:
    a stage that was stopped and goes on gives the very answers of one that was not.
    """
    known = {(line["index"], line["sample"]) for line in journal.lines}
    rate = None
    if len(known) < len(prompts):
        rate = _answer(prompts, known, load_engine(), tokenizer, journal)
    lines = sorted(journal.lines, key=lambda line: (line["index"], line["sample"]))
    cut = sum(line["finish"] == "length" for line in lines)
    if cut:
        log.info("%d of %d answers were cut at their longest length", cut, len(lines))
    datasets = {prompt.index: prompt.task.dataset for prompt in prompts}
    outputs = [
        Output(line["instruction"], line["output"], generator, datasets[line["index"]])
        for line in lines
        if line["sample"] == 0
    ]
    return Generated(outputs, cut, sum(line["tokens"] for line in lines), rate)


def _answer(
    prompts: Sequence[Prompt],
    known: set[tuple[int, int]],
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    journal: Journal,
) -> float:
    """Sample what is not known; returns tokens a second."""
    # Longest first: what does not fit in memory shows at once, and a batch has little padding.
    order = sorted(prompts, key=lambda p: (-len(p.ids), p.index, p.sample))
    sampled, start = 0, time.monotonic()
    with progress("answers", len(order) - len(known), "answers", "tokens") as advance:

        def done(prompt: Prompt, ids: TokenIds, finish: str) -> None:
            nonlocal sampled
            text = str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()
            journal.append(
                {
                    "index": prompt.index,
                    "sample": prompt.sample,
                    "instruction": prompt.task.instruction,
                    "output": text,
                    "tokens": len(ids),
                    "finish": finish,
                }
            )
            sampled += len(ids)
            advance(1, len(ids))

        for first in range(0, len(order), engine.batch_size):
            batch = order[first : first + engine.batch_size]
            missing = [(p.index, p.sample) not in known for p in batch]
            if any(missing):
                engine.answer(batch, missing, done)
    return sampled / (time.monotonic() - start)
