"""Find, compose, check and save recipes. The only module, with sweep.py, that knows Hydra."""

import contextlib
import difflib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.objectives.base import registered
from mallowspo_cli.recipe.schema import Recipe

GROUPS = ("model", "dataset", "objective")
"""The nodes that a recipe chooses by name: `model=NAME`, `dataset=NAME`, `objective=NAME`."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A composed recipe, with what is needed to write it down again."""

    recipe: Recipe
    source: Path
    overrides: list[str]
    tree: dict[str, Any]
    """The resolved values, as plain dictionaries."""

    def to_yaml(self) -> str:
        """The resolved recipe as a recipe file of its own: `recipe=FILE` composes it again."""
        objective = next(n for n, c in registered().items() if type(self.recipe.objective) is c)
        head = f"defaults:\n  - base\n  - objective: {objective}\n  - _self_\n"
        return head + yaml.safe_dump(self.tree, sort_keys=False)


def recipe_directories() -> list[Path]:
    """Directories that hold recipes: the user's first, then installed packages', then ours."""
    found = [Path(p) for p in os.environ.get("MALLOWSPO_RECIPE_PATH", "").split(os.pathsep) if p]
    for point in entry_points(group="mallowspo.recipes"):
        found.append(Path(str(point.load())))
    found.append(shipped_recipes())
    return [path.resolve() for path in found]


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


def option_names(group: str) -> list[str]:
    """Names that `group=NAME` takes: files, and for objectives the registered ones."""
    names = set(option_files(group))
    return sorted(names | set(registered()) if group == "objective" else names)


def find_recipe(name: str) -> Path:
    """The file of a recipe given by name or by path.

    Raises:
        RecipeError: no such file or name, with the nearest name.
    """
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise RecipeError(f"no recipe file at {name}. `mallowspo recipes list` shows the names.")
        return path.resolve()
    files = recipe_files()
    if name not in files:
        raise RecipeError(
            f"no recipe named '{name}'.{nearest(name, files)} `mallowspo recipes list` shows all."
        )
    return files[name]


def load_recipe(name: str, overrides: list[str] | None = None) -> LoadedRecipe:
    """Compose recipe `name` with Hydra overrides into dataclasses, and check it.

    Args:
        name: a recipe's name, or the path of its file.
        overrides: Hydra's words, such as `objective=dpo` or `train.seed=7`.

    Raises:
        RecipeError: unknown key, choice or option, wrong type, missing value; one line.
    """
    overrides = list(overrides or [])
    path = find_recipe(name)
    parsed = _parse(overrides)
    _register_schema()
    with _composer(path):
        _check_options(parsed)
        groups = [o.input_line for o in parsed if o.key_or_group in GROUPS]
        base = _compose(path, [str(g) for g in groups])
        _check_objective_choice(path, parsed)
        _check_known_keys(base, parsed)
        config = _compose(path, overrides)
    recipe = _to_recipe(config)
    _refuse_extra(recipe, config, "")
    return LoadedRecipe(recipe, path, overrides, _plain(config))


def nearest(name: str, choices: Any) -> str:
    """' Did you mean ...?' or nothing."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def _register_schema() -> None:
    store = ConfigStore.instance()
    store.store(name="recipe_schema", node=Recipe)
    for name, cls in registered().items():
        store.store(group="objective", name=name, node=cls)


@contextlib.contextmanager
def _composer(path: Path) -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(path.parent), version_base="1.3"):
        yield


def _compose(path: Path, overrides: list[str]) -> DictConfig:
    others = [f"file://{d}" for d in recipe_directories() if d != path.parent]
    search = f"hydra.searchpath=[{','.join(repr(o) for o in others)}]"
    try:
        # Hydra prints the search path to stderr when a config is missing; our message says it all.
        with contextlib.redirect_stderr(io.StringIO()):
            return compose(config_name=path.stem, overrides=[search, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise RecipeError(f"{path.name}: {_explain(error)}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {_one_line(error)}") from error


def _parse(overrides: list[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for word in overrides:
        try:
            override = parser.parse_override(word)
        except (OverrideParseException, HydraException) as error:
            hint = " Quote a value that holds '#', spaces or brackets: 'key=\"value\"'."
            raise RecipeError(f"cannot read '{word}' as key=value.{hint}") from error
        if override.is_sweep_override():
            raise RecipeError(f"'{word}' names several values; this command takes one.")
        parsed.append(override)
    return parsed


def _check_options(parsed: list[Override]) -> None:
    for override in parsed:
        group, value = override.key_or_group, override.value()
        if group in GROUPS and isinstance(value, str) and value not in option_names(group):
            raise RecipeError(
                f"no {group} named '{value}'.{nearest(value, option_names(group))} "
                f"Choices: {', '.join(option_names(group))}."
            )


def _check_objective_choice(path: Path, parsed: list[Override]) -> None:
    """Values under `objective` in a recipe would silently apply to another objective, too."""
    values = (yaml.safe_load(path.read_text()) or {}).get("objective")
    chosen = [o for o in parsed if o.key_or_group == "objective"]
    if chosen and isinstance(values, dict) and values:
        raise RecipeError(
            f"{path.name} sets objective.{next(iter(values))} itself, so {chosen[0].input_line} "
            "would run with values meant for another objective. Move them to a file of their own "
            "under objective/ and choose it by name."
        )


def _check_known_keys(base: DictConfig, parsed: list[Override]) -> None:
    for override in parsed:
        key = override.key_or_group
        if key in GROUPS or key.startswith("hydra."):
            continue
        node: Any = base
        parts = key.split(".")
        for depth, part in enumerate(parts):
            if not isinstance(node, DictConfig) or part not in node:
                raise RecipeError(_unknown_key(parts, depth, node, base))
            # `None` and missing values have no keys below them.
            node = None if OmegaConf.is_missing(node, part) else node[part]


def _unknown_key(parts: list[str], depth: int, node: Any, base: DictConfig) -> str:
    key, prefix = ".".join(parts), ".".join(parts[:depth])
    if not isinstance(node, DictConfig):
        return f"{key} is not a key: {prefix} is a single value."
    owner = "a recipe"
    if prefix == "objective":
        owner = getattr(OmegaConf.get_type(base.objective), "__name__", "the objective")
    elif prefix:
        owner = prefix
    names = [str(n) for n in node]
    close = difflib.get_close_matches(parts[depth], names, n=1, cutoff=0.5)
    if close:
        hint = f" Did you mean {'.'.join([*parts[:depth], close[0], *parts[depth + 1 :]])}?"
    else:
        every = {path.rsplit(".", 1)[-1]: path for path in _leaves(base)}
        hint = f" Did you mean {every[parts[-1]]}?" if parts[-1] in every else ""
    return f"{key} is not a key of {owner} (it has: {', '.join(names)}).{hint}"


def _leaves(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in config:
        path = f"{prefix}{key}"
        yield path
        if not OmegaConf.is_missing(config, str(key)) and isinstance(config[key], DictConfig):
            yield from _leaves(config[key], f"{path}.")


def _to_recipe(config: DictConfig) -> Recipe:
    try:
        OmegaConf.resolve(config)
        recipe = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or str(error).rsplit(" ", 1)[-1]
        raise RecipeError(f"{key} has no value. Give one: {key}=...") from error
    except InterpolationResolutionError as error:
        raise RecipeError(_one_line(error)) from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        group = missing[0] in GROUPS
        what = f"{missing[0]}=NAME" if group else f"{missing[0]}=..."
        raise RecipeError(f"{missing[0]} has no value. Give one: {what}")
    if not isinstance(recipe, Recipe):
        raise RecipeError("the recipe does not start from `base`; add it to its defaults list.")
    return recipe


def _refuse_extra(value: Any, config: DictConfig, prefix: str) -> None:
    """Hydra's `+key=value` adds keys that no code reads."""
    names = {f.name for f in fields(value)}
    for key in config:
        if key not in names:
            raise RecipeError(f"{prefix}{key} is not a key.{nearest(str(key), names)}")
        inner = getattr(value, str(key))
        if is_dataclass(inner) and isinstance(config[key], DictConfig):
            _refuse_extra(inner, config[key], f"{prefix}{key}.")


def _plain(config: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _explain(error: BaseException) -> str:
    """The cause of a composition error, in one line."""
    cause = error
    while isinstance(cause, ConfigCompositionException) and cause.__cause__ is not None:
        cause = cause.__cause__
    key = getattr(cause, "full_key", None)
    if isinstance(cause, ValidationError) and key:
        wanted = _wanted(cause)
        match = re.search(r"[Vv]alue '(.*?)'", str(cause))
        return f"{key}={match.group(1) if match else '?'} has the wrong type or value{wanted}."
    return _one_line(cause)


def _wanted(error: ValidationError) -> str:
    kind = getattr(error, "ref_type", None) or getattr(error, "object_type", None)
    choices = re.search(r"not a valid value of enum .*? \[(.*)\]|valid.*\[(.*)\]", str(error))
    if choices:
        return f" (choices: {(choices.group(1) or choices.group(2))})"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f" (choices: {', '.join(m.name for m in kind)})"
    converted = re.search(r"(?:to|a valid) (Integer|Float|Boolean|float|int|bool)", str(error))
    return f" (expected {converted.group(1).lower()})" if converted else ""


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(("full_key", "object_type")))
