"""`mallowspo recipes`: what there is, where it lies, what it composes to, what its keys mean."""

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.evaluation.judges.options import JudgeOptions
from mallowspo_cli.evaluation.sampling.tasks import GenerateOptions
from mallowspo_cli.objectives.base import registered
from mallowspo_cli.recipe.find import GROUPS, option_files, recipe_directories, recipe_files
from mallowspo_cli.recipe.keys import explained_fields, explained_keys
from mallowspo_cli.recipe.load import load_recipe
from mallowspo_cli.recipe.nearest import nearest


def list_recipes() -> None:
    """Print every recipe, and the options of each group, with the first line of its file."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("name", no_wrap=True)
    table.add_column("what it is")
    for name, file in recipe_files().items():
        table.add_row("recipe=", name, _first_comment(file))
    for group in GROUPS:
        options = {name: _first_comment(file) for name, file in option_files(group).items()}
        if group == "objective":
            options |= {name: _first_line(cls.__doc__) for name, cls in registered().items()}
        for name, what in sorted(options.items()):
            table.add_row(f"{group}=", name, what)
    Console(highlight=False, markup=False).print(table)


def show(name: str, overrides: list[str]) -> None:
    """Print the composed, resolved recipe as a recipe file."""
    click.echo(load_recipe(name, overrides).to_yaml(), nl=False)


def path(file: str) -> None:
    """Print the path of a recipe or option file."""
    wanted = file if file.endswith(".yaml") else f"{file}.yaml"
    for directory in recipe_directories():
        if (directory / wanted).is_file():
            click.echo(directory / wanted)
            return
    names = [str(f.relative_to(d)) for d in recipe_directories() for f in d.rglob("*.yaml")]
    raise RecipeError(
        f"no file {wanted} among the recipes.{nearest(wanted, names)} "
        "`mallowspo recipes list` shows the names."
    )


def keys(prefix: str) -> None:
    """Print each key under `prefix` with its default and its meaning."""
    # An evaluation's own keys are not a recipe's, and are told when they are asked for.
    nodes = {"generate": GenerateOptions, "judge": JudgeOptions}
    own = [row for node, cls in nodes.items() for row in explained_fields(cls, f"{node}.")]
    every = list(explained_keys()) + (own if prefix else [])
    rows = [row for row in every if row[0].startswith(prefix)]
    if not rows:
        names = [row[0] for row in every]
        raise RecipeError(f"no key begins with '{prefix}'.{nearest(prefix, names)}")
    table = Table(box=None, pad_edge=False)
    for heading in ("key", "default", "meaning"):
        table.add_column(heading, no_wrap=heading == "key")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)


def _first_comment(file: Path) -> str:
    first = file.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n", 1)[0]
