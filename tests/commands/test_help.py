"""Help is quick and shows an example; recipes and doctor tell what there is."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mallowspo_cli.__main__ import cli
from tests.commands.conftest import Command

VERBS = [
    [],
    ["train"],
    ["sweep"],
    ["plan"],
    ["export"],
    ["cache-ref"],
    ["data"],
    ["data", "check"],
    ["data", "show"],
    ["cache"],
    ["cache", "inspect"],
    ["cache", "verify"],
    ["cache", "diff"],
    ["cache", "gc"],
    ["cache", "export"],
    ["dispersion"],
    ["experiment"],
    ["experiment", "human-dispersion"],
    ["experiment", "out-of-distribution"],
    ["experiment", "bandit"],
    ["experiment", "estimator"],
    ["experiment", "sentiment"],
    ["eval"],
    ["eval", "preferences"],
    ["eval", "alpacaeval"],
    ["eval", "winrate"],
    ["eval", "compare"],
    ["eval", "generations"],
    ["eval", "sentiment"],
    ["recipes"],
    ["recipes", "list"],
    ["recipes", "show"],
    ["recipes", "path"],
    ["recipes", "keys"],
    ["doctor"],
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_shows_a_worked_example_before_the_options(
    mallowspo: Command, verb: list[str]
) -> None:
    done = mallowspo(*verb, "--help")
    assert done.code == 0
    assert done.out.index("Example:") < done.out.index("Options:")


def test_every_verb_is_in_the_list_above() -> None:
    named = [[name] for name in cli.commands]
    for name, command in cli.commands.items():
        named += [[name, inner] for inner in getattr(command, "commands", {})]
    assert sorted(named) == sorted(verb for verb in VERBS if verb)


def test_help_of_no_verb_imports_anything_heavy() -> None:
    code = (
        "import sys; from mallowspo_cli.__main__ import cli\n"
        f"for verb in {VERBS!r}: cli([*verb, '--help'], standalone_mode=False)\n"
        "heavy = ('torch', 'transformers', 'datasets', 'hydra', 'matplotlib', 'accelerate')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")


def test_recipes_list_names_every_recipe_and_option(mallowspo: Command) -> None:
    out = mallowspo("recipes", "list").out
    for name in ("quickstart", "tiny_random", "llama3_8b_instruct", "local", "mallows_phi", "sft"):
        assert f" {name} " in out


def test_recipes_show_prints_a_recipe_that_composes_again(
    mallowspo: Command, tmp_path: Path
) -> None:
    shown = mallowspo("recipes", "show", "quickstart", "objective=ipo", "train.epochs=3").out
    tree = yaml.safe_load(shown)
    assert tree["train"]["epochs"] == 3
    assert tree["objective"]["scaling"] == "margin"
    (tmp_path / "copy.yaml").write_text(shown)
    assert mallowspo("recipes", "show", "./copy.yaml").out == shown


def test_recipes_path_finds_recipes_and_options(mallowspo: Command) -> None:
    for name in ("quickstart", "quickstart.yaml", "model/smollm2_135m.yaml"):
        assert Path(mallowspo("recipes", "path", name).out.strip()).is_file()
    done = mallowspo("recipes", "path", "quickstrat")
    assert done.code == 2
    assert "Did you mean 'quickstart.yaml'?" in done.err


def test_recipes_keys_explains_each_key_with_its_default(mallowspo: Command) -> None:
    out = " ".join(mallowspo("recipes", "keys", "train").out.split())
    assert "train.global_batch_size 64 Pairs of one optimizer step" in out
    assert "dataset.path" not in out
    assert "objective.beta" in mallowspo("recipes", "keys").out
    assert "did you mean" in mallowspo("recipes", "keys", "trian").err.lower()


def test_doctor_reports_versions_devices_and_caches(mallowspo: Command) -> None:
    done = mallowspo("doctor")
    assert done.code == 0, done.err
    assert "torch 2." in done.out
    assert "is writable" in done.out


def test_doctor_fails_where_the_cache_cannot_be_written(
    mallowspo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path / "file" / "cache"))
    done = mallowspo("doctor")
    assert done.code == 2
    assert "fail " in done.out
    assert "Set MALLOWSPO_CACHE" in done.out
