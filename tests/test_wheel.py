"""The wheel carries recipes and data, and works away from the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel's content, its dependencies being those of the tests."""
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(place)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = place.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(place / "site"), str(wheel)], check=True)
    return place / "site"


def run(site: Path, code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd="/", env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_wheel_lists_its_recipes_from_the_root_directory(site: Path) -> None:
    out = run(
        site,
        "import sys, mallowspo_cli; print(mallowspo_cli.__file__)\n"
        "sys.argv = ['mallowspo', 'recipes', 'list']\n"
        "from mallowspo_cli.__main__ import main; main()",
    )
    assert out.startswith(str(site))
    for name in (path.stem for path in (ROOT / "recipes").glob("*.yaml") if path.stem != "base"):
        assert f" {name} " in out


def test_a_recipe_composes_and_the_pairs_are_there(site: Path) -> None:
    out = run(
        site,
        "from mallowspo_cli.recipe.load import load_recipe\n"
        "from mallowspo_cli.data.dataset import load_pairs\n"
        "recipe = load_recipe('quickstart').recipe\n"
        "print([len(load_pairs(recipe.dataset, split)) >= n for split, n in "
        "(('train', 500), ('eval', 200))])",
    )
    assert out.strip() == "[True, True]"


def test_the_wheel_holds_the_package_alone(site: Path) -> None:
    top = {p.name for p in site.iterdir()} - {"bin", "__pycache__"}
    assert {name.partition("-")[0] for name in top} == {"mallowspo_cli", "mallowspo"}
