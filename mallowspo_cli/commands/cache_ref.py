"""`mallowspo cache-ref`: the reference pass alone."""

import click

from mallowspo_cli.commands.prepare import default_device, filled_store, prepare
from mallowspo_cli.distributed import is_main, log, set_up_logging
from mallowspo_cli.recipe.load import load_recipe


def run(name: str, overrides: list[str]) -> None:
    """Score what the store of recipe `name` lacks; see `mallowspo cache-ref --help`."""
    set_up_logging()
    loaded = load_recipe(name, overrides)
    recipe = loaded.recipe
    objective = recipe.objective
    if not (objective.needs_reference or objective.needs_dispersion):
        log.info("%s reads no reference; scoring all the same", type(objective).__name__)
    store, _ = filled_store(recipe, prepare(recipe, loaded.words), default_device())
    if is_main():
        click.echo(store.path)
