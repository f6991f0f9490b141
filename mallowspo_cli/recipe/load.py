"""Compose, check and save recipes. `sweep` is the only other module that knows Hydra."""

import contextlib
import difflib
import functools
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationToMissingValueError,
    OmegaConfBaseException,
    ValidationError,
)

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.objectives.base import Objective, objective_name, registered
from mallowspo_cli.recipe.choices import Precision
from mallowspo_cli.recipe.find import (
    GROUPS,
    find_recipe,
    option_files,
    option_names,
    recipe_directories,
    recipe_files,
    shipped_recipes,
)
from mallowspo_cli.recipe.nearest import nearest
from mallowspo_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class LoadedRecipe:
    """A composed recipe, with what is needed to write it down again."""

    recipe: Recipe
    source: Path
    overrides: list[str]
    tree: dict[str, Any]
    """The resolved values, as plain dictionaries."""

    @property
    def words(self) -> list[str]:
        """The words of a command that load it again."""
        known = recipe_files().get(self.source.stem)
        name = self.source.stem if known == self.source else str(self.source)
        return [f"recipe={name}", *self.overrides]

    def to_yaml(self) -> str:
        """The resolved recipe as a recipe file of its own: `recipe=FILE` composes it again."""
        name = objective_name(self.recipe.objective)
        head = f"defaults:\n  - base\n  - objective: {name}\n  - _self_\n"
        # Its own writer quotes what only its own reader takes for a number, such as 1e10.
        return head + OmegaConf.to_yaml(OmegaConf.create(self.tree))


def load_recipe(name: str, overrides: list[str] | None = None) -> LoadedRecipe:
    """Compose recipe `name` with Hydra overrides into dataclasses, and check it.

    Args:
        name: a recipe's name, or the path of its file.
        overrides: Hydra's words, such as `objective=dpo` or `train.epochs=3`.

    Raises:
        RecipeError: unknown key, choice or option, wrong type, missing value; one line.
    """
    overrides = list(overrides or [])
    path = find_recipe(name)
    _check_file(path)
    parsed = _parse(overrides)
    _register_schema(tuple(registered().items()))
    with _composer(path):
        _check_options(path, parsed)
        _check_objective_choice(path, parsed)
        try:
            config = _compose(path, overrides)
        except RecipeError:
            # What is wrong in the file, or with a key, is told before what is wrong with a value.
            groups = [str(o.input_line) for o in parsed if o.key_or_group in GROUPS]
            _check_known_keys(_compose(path, groups, f"{path.name}: "), parsed)
            raise
        _check_known_keys(config, parsed)
    if OmegaConf.select(config, "train.precision") is Precision.auto:
        config.train.precision = native_precision()
    return LoadedRecipe(_to_recipe(config), path, overrides, _plain(config))


def native_precision() -> Precision:
    """bf16 where this machine's first device computes in it, else fp32."""
    if torch.cuda.is_available():
        return Precision.bf16 if torch.cuda.is_bf16_supported() else Precision.fp32
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        flags = set()
    return Precision.bf16 if flags & {"avx512_bf16", "amx_bf16", "bf16"} else Precision.fp32


def load_base(overrides: list[str]) -> LoadedRecipe:
    """A recipe that no file describes: the defaults, with model, dataset and objective chosen.

    Raises:
        RecipeError: as `load_recipe`.
    """
    # `base` chooses nothing, so a choice adds to its defaults list.
    words = [f"+{word}" if word.partition("=")[0] in GROUPS else word for word in overrides]
    return load_recipe(str(shipped_recipes() / "base.yaml"), [*words, "name=evaluation"])


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {_broken(error)}") from error
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}.") from error


def _check_file(path: Path) -> None:
    """What Hydra takes without a word, or with a traceback."""
    content = _read(path)
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path.name} holds a {type(content).__name__}; expected keys and values."
        )
    if "hydra" in content:
        raise RecipeError(f"{path.name}: hydra is not a key of a recipe.")
    defaults = content.get("defaults", [])
    if not isinstance(defaults, list):
        raise RecipeError(f"{path.name}: defaults is not a list. Begin with `- base`.")
    if len(content) > 1 and defaults and defaults[-1] != "_self_":
        raise RecipeError(
            f"{path.name}: the last line of its defaults list must be `- _self_`, so that its own "
            "values come last."
        )


@functools.cache
def _register_schema(objectives: tuple[tuple[str, type[Objective]], ...]) -> None:
    store = ConfigStore.instance()
    store.store(name="recipe_schema", node=Recipe)
    for name, cls in objectives:
        store.store(group="objective", name=name, node=cls)


@contextlib.contextmanager
def _composer(path: Path) -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(path.parent), version_base="1.3"):
        yield


def _compose(path: Path, overrides: list[str], where: str = "") -> DictConfig:
    others = [f"file://{d}" for d in recipe_directories() if d != path.parent]
    search = f"hydra.searchpath=[{','.join(repr(o) for o in others)}]"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            return compose(config_name=path.stem, overrides=[search, *overrides])
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}not valid YAML: {_broken(error)}") from error
    except RecursionError as error:
        raise RecipeError(f"{where}the defaults list leads back to itself.") from error
    except (HydraException, OmegaConfBaseException, ValueError, UserWarning) as error:
        raise RecipeError(f"{where}{_explain(error)}") from error


def parse_word(word: str) -> Override:
    """One of Hydra's words.

    Raises:
        RecipeError: it is no key=value.
    """
    try:
        return OverridesParser.create().parse_override(word)
    except (OverrideParseException, HydraException) as error:
        hint = " Quote a value that holds '#', spaces or brackets: 'key=\"value\"'."
        raise RecipeError(f"cannot read {word!r} as key=value.{hint}") from error


def _parse(overrides: list[str]) -> list[Override]:
    parsed = []
    for word in overrides:
        override = parse_word(word)
        if override.is_sweep_override():
            raise RecipeError(
                f"{word!r} names several values; this command takes one. `mallowspo sweep` takes "
                "several."
            )
        if override.is_delete():
            raise RecipeError(f"{word!r} takes a key away; give it another value instead.")
        parsed.append(override)
    return parsed


def _check_options(path: Path, parsed: list[Override]) -> None:
    for override in parsed:
        group, value = override.key_or_group, override.value()
        if group not in GROUPS or isinstance(value, dict):
            continue
        names = option_names(group, path.parent)
        if value not in names:
            raise RecipeError(_no_option(group, "null" if value is None else str(value), names))
        beside, listed = path.parent / group / f"{value}.yaml", option_files(group).get(str(value))
        if path.parent in recipe_directories() and beside.is_file() and listed != beside:
            # Hydra would take the one beside the recipe, and leave the user's own out.
            raise RecipeError(f"{group}={value} is both {listed} and {beside}. Rename yours.")


def _no_option(group: str, name: str, names: list[str]) -> str:
    return f"no {group} named '{name}'.{nearest(name, names)} Choices: {', '.join(names)}."


def _check_objective_choice(path: Path, parsed: list[Override]) -> None:
    """Values under `objective` in a recipe would silently apply to another objective, too."""
    chosen = [o for o in parsed if o.key_or_group == "objective"]
    if not chosen:
        return
    for file in _lineage(path):
        values = (_read(file) or {}).get("objective")
        if isinstance(values, dict) and values:
            raise RecipeError(
                f"{file.name} sets objective.{next(iter(values))} itself, so "
                f"{chosen[0].input_line} would run with values meant for another objective. Move "
                "them to a file of their own under objective/ and choose it by name."
            )


def _lineage(path: Path) -> Iterator[Path]:
    """A recipe's file and those of the recipes that it starts from."""
    yield path
    for entry in (_read(path) or {}).get("defaults", []):
        if not isinstance(entry, str) or entry in ("base", "_self_"):
            continue
        beside = path.parent / f"{entry}.yaml"
        parent = beside if beside.is_file() else recipe_files().get(entry)
        if parent is not None:
            yield from _lineage(parent)


def _check_known_keys(base: DictConfig, parsed: list[Override]) -> None:
    objective = OmegaConf.get_type(base, "objective") if "objective" in base else None
    for override in parsed:
        key = override.key_or_group
        if key in GROUPS:
            continue
        owner: Any = Recipe
        parts = key.split(".")
        for depth, part in enumerate(parts):
            if owner is None:
                raise RecipeError("objective has no value. Give one: objective=NAME")
            if get_origin(owner) is dict:
                # The user's own names, such as the parts of a mixture.
                owner = get_args(owner)[1]
                continue
            if not is_dataclass(owner):
                prefix = ".".join(parts[:depth])
                raise RecipeError(f"{key} is not a key: {prefix} is a single value.")
            kinds = {f.name: f.type for f in fields(owner)}
            if part not in kinds:
                raise RecipeError(_unknown_key(key, depth, owner))
            owner = objective if kinds[part] is Objective else kinds[part]


def _unknown_key(key: str, depth: int, owner: Any) -> str:
    """Part `depth` of `key` is no field of the dataclass `owner`."""
    parts, names = key.split("."), [f.name for f in fields(owner)]
    whose = ".".join(parts[:depth]) or "a recipe"
    if issubclass(owner, Objective):
        whose = owner.__name__
    close = difflib.get_close_matches(parts[depth], names, n=1, cutoff=0.6)
    meant = {known.rpartition(".")[2]: known for known in _known_keys()}.get(parts[-1])
    if close:
        meant = ".".join([*parts[:depth], close[0], *parts[depth + 1 :]])
    hint = f" Did you mean {meant}?" if meant and meant != key else ""
    return f"{key} is not a key of {whose} (it has: {', '.join(names)}).{hint}"


def _known_keys(cls: Any = Recipe, prefix: str = "") -> Iterator[str]:
    for f in fields(cls):
        yield f"{prefix}{f.name}"
        kinds = registered().values() if f.type is Objective else [f.type]
        for kind in kinds:
            if is_dataclass(kind):
                yield from _known_keys(kind, f"{prefix}{f.name}.")


def _to_recipe(config: DictConfig) -> Recipe:
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if not missing:
            OmegaConf.resolve(config)
            recipe = OmegaConf.to_object(config)
    except InterpolationToMissingValueError as error:
        missing = [_one_line(error).rsplit(" ", 1)[-1]]
    except OmegaConfBaseException as error:
        raise RecipeError(_explain(error)) from error
    if missing:
        what = "NAME" if missing[0] in GROUPS else "..."
        raise RecipeError(f"{missing[0]} has no value. Give one: {missing[0]}={what}")
    if not isinstance(recipe, Recipe):
        raise RecipeError("the recipe does not start from `base`; add it to its defaults list.")
    return recipe


def _plain(config: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(container, dict)
    if container["output_dir"] == f"runs/{container['name']}":
        # So that a copy of the recipe under another name has a place of its own.
        container["output_dir"] = "runs/${name}"
    return {str(key): value for key, value in container.items()}


def _explain(error: BaseException) -> str:
    """The cause of a composition error, in one line."""
    cause = error
    while type(cause) is ConfigCompositionException:
        inner = cause.__cause__ or cause.__context__
        if inner is None:
            break
        cause = inner
    if isinstance(cause, MissingConfigException):
        group, _, name = str(cause.missing_cfg_file).rpartition("/")
        if group in GROUPS:
            return _no_option(group, name, sorted(cause.options or []))
        return f"no recipe named '{cause.missing_cfg_file}' to start from."
    key, owner = getattr(cause, "full_key", None), getattr(cause, "object_type", None)
    if isinstance(cause, ConfigKeyError) and key and is_dataclass(owner):
        return _unknown_key(key, key.count("."), owner)
    if isinstance(cause, ValidationError) and key:
        value = "null" if cause.value is None else " ".join(str(cause.value).split())
        return f"{key}={value} has the wrong type or value{_wanted(cause)}."
    return _one_line(cause)


def _wanted(error: ValidationError) -> str:
    choices = re.search(r"one of \[(.*?)\]", str(error))
    if choices:
        close = difflib.get_close_matches(str(error.value), choices.group(1).split(", "), n=1)
        return f" (choices: {choices.group(1)}{f'; nearest: {close[0]}' if close else ''})"
    converted = re.search(r"(?:to|a valid) (Integer|Float|Boolean|float|int|bool)", str(error))
    return f" (expected {converted.group(1).lower()})" if converted else ""


def _broken(error: BaseException) -> str:
    """What is wrong with a YAML file, and in which line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}: {problem}" if mark and problem else _one_line(error)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    notes = ("full_key", "object_type", "reference_type")
    return " ".join(line for line in lines if not line.startswith(notes))
