"""Prompts to sample from: of a data set of the recipes, or of a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from mallowspo_cli.data.dataset import load_pairs
from mallowspo_cli.data.pairs import Message, PreferencePair
from mallowspo_cli.errors import EvalError, first_line
from mallowspo_cli.evaluation.outputs import read_rows
from mallowspo_cli.evaluation.sampling.tasks import Task
from mallowspo_cli.evaluation.win_rates.alpacaeval import LIMIT_SEED
from mallowspo_cli.recipe.load import load_base
from mallowspo_cli.recipe.schema import DatasetConfig

T = TypeVar("T")
COLUMNS = ("prompt", "instruction")


def chosen_dataset(words: list[str]) -> DatasetConfig:
    """The data set of `dataset=NAME` and `dataset.KEY=VALUE` words.

    Raises:
        RecipeError: words that cannot be used.
    """
    # A recipe cannot be without model and objective; these are not looked at.
    return load_base(["model=tiny_random", "objective=dpo", *words]).recipe.dataset


def held_out_prompts(config: DatasetConfig, limit: int) -> list[tuple[Task, PreferencePair]]:
    """Held-out prompts, each once and with its first pair; `limit` of them, drawn the same each
    time, in the data's order.

    Raises:
        EvalError: nothing is held out.
        DataError: data that cannot be read.
    """
    held_out = load_pairs(config, "eval")
    if not held_out:
        raise EvalError(
            f"{config.title} has no held-out pairs. Name a split (dataset.eval_split=NAME), or "
            "take some out (dataset.eval_size=100)."
        )
    found: dict[str, tuple[Task, PreferencePair]] = {}
    for pair in held_out:
        text = as_instruction(pair.prompt)
        found.setdefault(text, (Task(text, pair.prompt, config.title), pair))
    return drawn(list(found.values()), limit)


def as_instruction(prompt: Sequence[Message]) -> str:
    """A conversation as one text: a single turn as it is, more with their speakers."""
    if len(prompt) == 1:
        return prompt[0].content
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    turns = [f"{names.get(turn.role, turn.role)}: {turn.content}" for turn in prompt]
    return "\n\n".join(turns)


def file_tasks(file: Path, limit: int) -> list[Task]:
    """Prompts of a JSON or JSONL file with a column prompt or instruction, or the lines of a text
    file, each once; `limit` of them, drawn the same each time.

    Raises:
        EvalError: it cannot be read, or holds none.
    """
    if file.suffix == ".txt":
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise EvalError(f"cannot read {file}: {first_line(error)}.") from error
        texts = [line for line in lines if line.strip()]
        if not texts:
            raise EvalError(f"{file} holds no line; expected a prompt a line.")
    else:
        texts = []
        for number, row in enumerate(read_rows(file)):
            found = [v for name in COLUMNS if isinstance(v := row.get(name), str) and v.strip()]
            if not found:
                raise EvalError(
                    f"{file} row {number} has no text under {' or '.join(COLUMNS)}; it has: "
                    f"{', '.join(sorted(row))}."
                )
            texts.append(found[0])
    return drawn([Task.of(text) for text in dict.fromkeys(texts)], limit)


def drawn(items: Sequence[T], limit: int) -> list[T]:
    """At most `limit` of them in their order, the same ones each time."""
    if len(items) <= limit:
        return list(items)
    chosen = np.random.default_rng(LIMIT_SEED).choice(len(items), size=limit, replace=False)
    return [items[index] for index in sorted(chosen.tolist())]
