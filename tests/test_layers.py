"""Who may import whom: a module imports only from further left, or from its own package."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mallowspo_cli

PACKAGE = Path(mallowspo_cli.__file__).parent
LEVELS = [
    *(["errors"], ["distributed"], ["files"], ["package_index"]),
    ["objectives", "dispersion", "raters"],
    ["recipe"],
    ["data", "models"],
    *(["packing"], ["scoring"], ["reference"], ["evaluation"], ["training"]),
    ["experiments", "report", "plan"],
    *(["commands"], ["verbs"], ["experiment_verbs"], ["__main__"]),
]
"""Left to right; what stands side by side does not know each other."""
MODULES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))
HYDRA = {"recipe/load.py", "recipe/sweep.py"}


def layer(module: str) -> str:
    """`reference/store.py` -> `reference`, `files.py` -> `files`."""
    return module.split("/")[0].removesuffix(".py")


def imports(module: str) -> Iterator[str]:
    """Absolute names of all that a module imports, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            (name, *_) = node.args
            if isinstance(name, ast.Constant):
                yield str(name.value)


def third_parties(module: str) -> set[str]:
    """Top-level names from outside the standard library and this package."""
    tops = {name.split(".")[0] for name in imports(module)}
    return tops - sys.stdlib_module_names - {"mallowspo_cli"}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__.py"])
def test_a_module_imports_only_from_further_left(module: str) -> None:
    own = layer(module)
    (level,) = [index for index, level in enumerate(LEVELS) if own in level]
    left = {name for names in LEVELS[:level] for name in names}
    for name in imports(module):
        parts = name.split(".")
        # `from mallowspo_cli import __version__` names no module.
        if parts[0] != "mallowspo_cli" or parts[1:2] in ([], ["__version__"]):
            continue
        assert parts[1] == own or parts[1] in left, f"{module} imports {name}"


def test_the_package_itself_imports_nothing() -> None:
    assert list(imports("__init__.py")) == []


@pytest.mark.parametrize("module", [m for m in MODULES if layer(m) in ("objectives", "dispersion")])
def test_the_maths_knows_torch_alone(module: str) -> None:
    assert third_parties(module) <= {"torch"}
    own = {name.split(".")[1] for name in imports(module) if name.startswith("mallowspo_cli.")}
    assert own <= {"errors", layer(module)}


@pytest.mark.parametrize("module", MODULES)
def test_hydra_and_omegaconf_are_known_to_the_recipe_alone(module: str) -> None:
    if module not in HYDRA:
        assert "hydra" not in third_parties(module)
    if layer(module) != "recipe":
        assert "omegaconf" not in third_parties(module)


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__init__.py")])
def test_every_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(ast.parse((PACKAGE / module).read_text(encoding="utf-8")))


def test_the_walk_sees_third_parties() -> None:
    assert {"omegaconf", "hydra"} <= third_parties("recipe/load.py")
