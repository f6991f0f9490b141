"""Where recipes and their options lie: the user's directories, installed packages, and ours."""

import functools
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.objectives.base import registered
from mallowspo_cli.recipe.nearest import nearest

GROUPS = ("model", "dataset", "objective")
"""The nodes that a recipe chooses by name: `model=NAME`, `dataset=NAME`, `objective=NAME`."""


def recipe_directories() -> list[Path]:
    """Directories that hold recipes: the user's first, then installed packages', then ours.

    Raises:
        RecipeError: the user names one that is not there.
    """
    found = [Path(p) for p in os.environ.get("MALLOWSPO_RECIPE_PATH", "").split(os.pathsep) if p]
    for directory in found:
        if not directory.is_dir():
            raise RecipeError(f"MALLOWSPO_RECIPE_PATH names {directory}, which is no directory.")
    found += _installed_recipes(tuple(sys.path))
    found.append(shipped_recipes())
    return [path.resolve() for path in found]


@functools.cache
def _installed_recipes(places: tuple[str, ...]) -> list[Path]:
    """Directories that packages installed in `places` (sys.path) name; they are read but once."""
    return [Path(str(point.load())) for point in entry_points(group="mallowspo.recipes")]


def shipped_recipes() -> Path:
    """The recipes of this package: inside it in a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside, beside = package / "recipes", package.parent / "recipes"
    return inside if inside.is_dir() else beside


def recipe_files() -> dict[str, Path]:
    """Recipe name to file; where a name appears twice the user's own wins."""
    found: dict[str, Path] = {}
    for directory in recipe_directories():
        for path in sorted(directory.glob("*.yaml")):
            if path.stem != "base":
                found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def option_files(group: str) -> dict[str, Path]:
    """Option name to file, for `group=NAME`; where a name appears twice the user's own wins."""
    found: dict[str, Path] = {}
    for directory in recipe_directories():
        for path in sorted((directory / group).glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def option_names(group: str, beside: Path | None = None) -> list[str]:
    """Names that `group=NAME` takes: files, and for objectives the registered ones.

    `beside` is the directory of the recipe in hand, which need not be one of ours.
    """
    names = set(option_files(group))
    if beside is not None:
        names |= {path.stem for path in (beside / group).glob("*.yaml")}
    return sorted(names | set(registered()) if group == "objective" else names)


def find_recipe(name: str) -> Path:
    """The file of a recipe given by name or by path.

    Raises:
        RecipeError: no such file or name, with the nearest name.
    """
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise RecipeError(f"no recipe file at {name}. `mallowspo recipes list` shows names.")
        if path.suffix != ".yaml":
            raise RecipeError(f"cannot read {name}: a recipe file's name ends in .yaml.")
        return path.resolve()
    files = recipe_files()
    if name not in files:
        raise RecipeError(
            f"no recipe named '{name}'.{nearest(name, files)} `mallowspo recipes list` shows all."
        )
    return files[name]
