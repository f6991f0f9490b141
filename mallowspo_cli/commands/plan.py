"""`mallowspo plan`: what a recipe takes on given hardware, before it runs."""

import contextlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import click

from mallowspo_cli.commands.prepare import one_process, prepare
from mallowspo_cli.commands.words import own_words, whole_number
from mallowspo_cli.distributed import set_up_logging
from mallowspo_cli.errors import RecipeError
from mallowspo_cli.models.attention import resolve_attention
from mallowspo_cli.models.sources import resolve_description
from mallowspo_cli.packing.layout import Layout
from mallowspo_cli.plan.case import Case
from mallowspo_cli.plan.findings import find
from mallowspo_cli.plan.hardware import read_hardware
from mallowspo_cli.plan.lengths import read_lengths
from mallowspo_cli.plan.shapes import read_shape
from mallowspo_cli.plan.tables import print_plan
from mallowspo_cli.recipe.load import LoadedRecipe, load_recipe

WORDS = ("hardware", "flops", "bandwidth", "lengths", "pairs")
"""The command's own."""


def run(name: str, overrides: list[str], as_json: bool) -> None:
    """Plan recipe `name`; see `mallowspo plan --help`."""
    # Some libraries (DeepSpeed, where there is no GPU) write to stdout when they are loaded.
    with contextlib.redirect_stdout(sys.stderr):
        set_up_logging()
        own, rest = own_words(overrides, WORDS)
        findings = find(_case(own, load_recipe(name, rest)))
    if as_json:
        click.echo(json.dumps(findings, indent=2))
    else:
        print_plan(findings)


def _case(own: dict[str, str], loaded: LoadedRecipe) -> Case:
    """What is to be planned."""
    recipe, model = loaded.recipe, loaded.recipe.model
    flops, bandwidth = _number(own, "flops", "4e14"), _number(own, "bandwidth", "50e9")
    if "pairs" in own and "lengths" not in own:
        raise RecipeError("pairs is how many pairs lengths=FILE stands for: give both, or neither.")
    one_process("plan")
    hardware = read_hardware(own.get("hardware"), flops, recipe.train.precision, bandwidth)
    source = (model.source, model.revision, model.sha256)
    if "lengths" in own:
        pairs = whole_number(own, "pairs", 1) if "pairs" in own else None
        known = read_lengths(Path(own["lengths"]).expanduser(), recipe.dataset, pairs)
        directory = resolve_description(*source, tokenizer=False)
        lengths, data = known.rows, known.about
    else:
        directory = resolve_description(*source)
        here = replace(model, source=str(directory), revision=None, sha256=None)
        lengths = prepare(replace(recipe, model=here), loaded.words).train.lengths
        data = None
    return Case(
        recipe=recipe,
        shape=read_shape(directory, model.lora),
        hardware=hardware,
        lengths=lengths,
        layout=Layout.of(resolve_attention(directory, model.attention)),
        data=data,
    )


def _number(own: dict[str, str], name: str, example: str) -> float | None:
    """A rate among the command's own words."""
    if name not in own:
        return None
    try:
        value = float(own[name])
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        unit = "FLOP/s" if name == "flops" else "bytes/s"
        raise RecipeError(
            f"{name}={own[name]} is no number of {unit} above 0. Example: {name}={example}"
        )
    return value
