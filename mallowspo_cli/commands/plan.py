"""`mallowspo plan`: what a recipe takes on given hardware, before it runs."""

import json
import math

import click

from mallowspo_cli.commands.prepare import one_process, prepare
from mallowspo_cli.commands.words import own_words
from mallowspo_cli.distributed import set_up_logging
from mallowspo_cli.errors import RecipeError
from mallowspo_cli.models.attention import resolve_attention
from mallowspo_cli.packing.layout import Layout
from mallowspo_cli.plan.case import Case
from mallowspo_cli.plan.findings import find
from mallowspo_cli.plan.hardware import read_hardware
from mallowspo_cli.plan.shapes import read_shape
from mallowspo_cli.plan.tables import print_plan
from mallowspo_cli.recipe.load import load_recipe


def run(name: str, overrides: list[str], as_json: bool) -> None:
    """Plan recipe `name`; see `mallowspo plan --help`."""
    set_up_logging()
    own, rest = own_words(overrides, ("hardware", "flops"))
    flops = _number(own["flops"]) if "flops" in own else None
    loaded = load_recipe(name, rest)
    recipe = loaded.recipe
    one_process("plan")
    hardware = read_hardware(own.get("hardware"), flops, recipe.train.precision)
    prepared = prepare(recipe, loaded.words)
    case = Case(
        recipe=recipe,
        shape=read_shape(prepared.directory, recipe.model.lora),
        hardware=hardware,
        lengths=prepared.train.lengths,
        layout=Layout.of(resolve_attention(prepared.directory, recipe.model.attention)),
    )
    findings = find(case)
    if as_json:
        click.echo(json.dumps(findings, indent=2))
    else:
        print_plan(findings)


def _number(text: str) -> float:
    """The value of `flops=`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise RecipeError(f"flops={text} is no number of FLOP/s above 0. Example: flops=4e14")
    return value
