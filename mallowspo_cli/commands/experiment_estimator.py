"""`mallowspo experiment estimator`: the entropy estimate of dispersion against a known truth."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mallowspo_cli.commands.words import only_words, whole_number
from mallowspo_cli.distributed import set_up_logging
from mallowspo_cli.errors import RecipeError
from mallowspo_cli.experiments.estimator.experiment import Settings, run_experiment
from mallowspo_cli.files import make_directory, write_json, write_text
from mallowspo_cli.report.estimator import as_markdown, print_results
from mallowspo_cli.report.estimator_pictures import (
    EXACT_PICTURE,
    MODEL_PICTURE,
    draw_exact,
    draw_model,
)

NAMES = ("items", "prompts", "model_items", "steps", "seeds", "seed", "to")
ITEMS = (5, 10, 20, 50, 100)
FEWEST_ITEMS, MOST_ITEMS = 3, 1000
MOST_MODEL_ITEMS = 200
FEWEST_PROMPTS = 4
DEFAULT_PLACE = "reports/estimator"


def run(words: list[str]) -> None:
    """Both parts of the experiment; see `--help`."""
    set_up_logging()
    settings, place = estimator_words(words)
    make_directory(place, "the report")
    # The model is so small that more threads only make it slower.
    torch.set_num_threads(1)
    found = run_experiment(settings)
    draw_exact(found.exact, place / EXACT_PICTURE)
    draw_model(found.results, found.prompts, place / MODEL_PICTURE)
    write_text(place / "exact.csv", _csv(found.exact))
    write_text(place / "prompts.csv", _csv(found.prompts))
    write_json(place / "results.json", found.results)
    write_text(place / "report.md", as_markdown(found.results, found.claims, found.exact))
    print_results(found.results, found.claims, place)


def estimator_words(words: list[str]) -> tuple[Settings, Path]:
    """KEY=VALUE words, checked, and where the report goes.

    Raises:
        RecipeError: an unknown word, or a number out of range.
    """
    own, _ = only_words(words, NAMES)
    model_items = whole_number(own, "model_items", 8, FEWEST_ITEMS)
    if model_items > MOST_MODEL_ITEMS:
        raise RecipeError(f"model_items={model_items} is more than {MOST_MODEL_ITEMS}.")
    settings = Settings(
        items=_items(own["items"]) if "items" in own else ITEMS,
        prompts=whole_number(own, "prompts", 12, FEWEST_PROMPTS),
        model_items=model_items,
        steps=whole_number(own, "steps", 1000),
        seeds=whole_number(own, "seeds", 3),
        seed=whole_number(own, "seed", 0, 0),
    )
    return settings, Path(own.get("to", DEFAULT_PLACE)).expanduser()


def _items(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    for number in numbers:
        if not number.isdecimal() or not FEWEST_ITEMS <= int(number) <= MOST_ITEMS:
            raise RecipeError(
                f"items={text}: '{number}' is not a whole number from {FEWEST_ITEMS} to "
                f"{MOST_ITEMS}. Give some, such as items=5,20."
            )
    return tuple(dict.fromkeys(map(int, numbers)))


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a table with a head."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
