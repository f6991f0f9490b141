"""The shipped recipes: what each says is what it composes to, and each trains end to end."""

import functools
import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mallowspo_cli.__main__ import cli
from mallowspo_cli.objectives.base import Objective, objective_name
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.ipo import Scaling
from mallowspo_cli.objectives.mallows import MallowsIPO, MallowsPhi, MallowsTheta
from mallowspo_cli.objectives.rainbow import RainbowPO
from mallowspo_cli.objectives.sft import SFT
from mallowspo_cli.objectives.simpo import SimPO
from mallowspo_cli.recipe.find import find_recipe, recipe_files, shipped_recipes
from mallowspo_cli.recipe.load import LoadedRecipe, load_recipe
from tests.commands.conftest import Command, mallowspo  # noqa: F401 (a fixture)

ROOT = Path(__file__).parent.parent

OBJECTIVES: dict[str, Objective] = {
    "llama3_phi": MallowsPhi(beta=0.15),
    "llama3_theta": MallowsTheta(beta=0.05),
    "llama3_dpo": DPO(beta=0.05),
    "llama3_simpo": SimPO(beta=10.0, home_advantage=0.3),
    "llama3_rainbow": RainbowPO(
        beta=10.0, length_normalised=True, home_advantage=0.1, mixing=0.25, sft_coefficient=0.0
    ),
    "llama3_rainbow_no_ln": RainbowPO(
        beta=0.05, length_normalised=False, home_advantage=20.0, mixing=0.25
    ),
    "llama3_rainbow_no_cs": RainbowPO(beta=10.0, home_advantage=0.1, mixing=0.25),
    "llama3_rainbow_no_mix": RainbowPO(beta=10.0, home_advantage=0.1, mixing=1.0),
    "llama3_rainbow_home_03": RainbowPO(beta=10.0, home_advantage=0.3, mixing=0.25),
    "llama3_rainbow_mixing_05": RainbowPO(beta=10.0, home_advantage=0.1, mixing=0.5),
    "llama3_rainbow_sft": RainbowPO(
        beta=10.0, home_advantage=0.1, mixing=0.25, sft_coefficient=1.0
    ),
    "llama3_rainbow_square": MallowsIPO(beta=1.0, length_normalised=True, scaling=Scaling.margin),
    "llama3_lora_phi": MallowsPhi(beta=0.15),
    "hh_pythia_sft": SFT(),
    "hh_pythia_dpo": DPO(beta=0.1),
    "hh_pythia_theta": MallowsTheta(beta=0.1),
    "hh_pythia_phi": MallowsPhi(beta=0.3),
    "imdb_gpt2_sft": SFT(),
    "imdb_gpt2_dpo": DPO(beta=0.1),
    "imdb_gpt2_theta": MallowsTheta(beta=0.1),
    "imdb_gpt2_phi": MallowsPhi(beta=0.3),
}
PAPER = list(OBJECTIVES)
"""Recipes with published values."""
RUN = [*PAPER, "quickstart", "sentiment_smollm2", "sentiment_gpt2"]

# RainbowPO's notebook of the final runs; MallowsPO's script (prompts without the header).
LLAMA3 = {
    "seed": 42,
    "model.source": "meta-llama/Meta-Llama-3-8B-Instruct",
    "model.lora.rank": 0,
    "dataset.path": "princeton-nlp/llama3-ultrafeedback-armorm",
    "dataset.max_length": 2048,
    "dataset.max_prompt_length": 1800,
    "dataset.header_in_response": True,
    "dispersion.source": "entropy",
    "dispersion.mode": "estimated",
    "dispersion.scale": "auto",
    "dispersion.pooling": "sequences",
    "dispersion.span": "response",
    "dispersion.normaliser": "log_vocab",
    "train.global_batch_size": 256,
    "train.learning_rate": 1e-6,
    "train.optimizer": "adamw",
    "train.scheduler": "cosine",
    "train.warmup_ratio": 0.1,
    "train.warmup_steps": None,
    "train.weight_decay": 0.0,
    "train.max_grad_norm": 1.0,
    "train.epochs": 1,
    "train.precision": "bf16",
    "train.activation_checkpointing": "full",
    "train.pack_tokens": None,
}
# config/config.yaml of the DPO authors' code.
DPO_CODE = {
    "seed": 0,
    "model.lora.rank": 0,
    "dataset.header_in_response": False,
    "dispersion.scale": "auto",
    "train.global_batch_size": 64,
    "train.learning_rate": 5e-7,
    "train.optimizer": "rmsprop",
    "train.scheduler": "constant",
    "train.warmup_steps": 150,
    "train.weight_decay": 0.0,
    "train.max_grad_norm": 10.0,
    "train.epochs": 1,
    "train.precision": "bf16",
}
HH = DPO_CODE | {
    "model.source": "runs/hh_pythia_sft/model",
    "model.chat_template": "dialogue",
    "dataset.path": "Anthropic/hh-rlhf",
    "dataset.max_length": 512,
    "dataset.max_prompt_length": 256,
    "dataset.truncation": "keep_end",
}
# The DPO paper, appendix B, has another rate than its code.
IMDB = DPO_CODE | {
    "model.source": "runs/imdb_gpt2_sft/model",
    "model.chat_template": "plain",
    "dataset.format": "imdb",
    "dataset.max_length": 512,
    "train.learning_rate": 1e-6,
}
VALUES = {
    **{name: LLAMA3 for name in PAPER if name.startswith("llama3")},
    **{name: HH for name in PAPER if name.startswith("hh")},
    **{name: IMDB for name in PAPER if name.startswith("imdb")},
    "llama3_rainbow_no_cs": LLAMA3 | {"dispersion.mode": "constant"},
    "llama3_lora_phi": LLAMA3
    | {"model.lora.rank": 128, "model.lora.alpha": 256.0, "train.learning_rate": 1e-5},
    "hh_pythia_sft": HH | {"model.source": "EleutherAI/pythia-2.8b"},
    "imdb_gpt2_sft": IMDB | {"model.source": "openai-community/gpt2-large"},
}
SOURCE = re.compile(r"  # (published|official code|ours)\b")

FAST = [
    "model=tiny_random",
    "dataset=quickstart_pairs",
    # Of the tiny model's tokens, which are bytes: a part of the pairs is shorter.
    "dataset.max_length=150",
    "train.max_steps=3",
    "train.global_batch_size=4",
    "train.precision=fp32",
    "eval.kl_prompts=0",
]
"""Makes a recipe a run of seconds; its learning rate, its schedule and its loss stay."""


@functools.cache
def loaded(recipe: str) -> LoadedRecipe:
    """A recipe as it is shipped."""
    return load_recipe(recipe)


def files_of(recipe: str) -> list[Path]:
    """A recipe's file, and those of the tuned objectives that it chooses."""
    path = find_recipe(recipe)
    chosen = [
        value
        for entry in yaml.safe_load(path.read_text())["defaults"]
        if isinstance(entry, dict)
        for key, value in entry.items()
        if key.removeprefix("override ") == "objective"
    ]
    options = [path.parent / "objective" / f"{name}.yaml" for name in chosen]
    return [path, *(option for option in options if option.is_file())]


def values_in(text: str) -> Iterator[tuple[str, str]]:
    """(key, line) of every value in a YAML file but `defaults` and `name`."""
    lines = text.splitlines()

    def walk(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, str]]:
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            if isinstance(value, yaml.MappingNode):
                yield from walk(value, f"{path}.")
            elif path not in ("defaults", "name"):
                yield path, lines[key.start_mark.line]

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    yield from walk(root, "")


def header(recipe: str) -> list[str]:
    """The comment lines at the head of a recipe."""
    lines = find_recipe(recipe).read_text().splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def commands(recipe: str) -> list[list[str]]:
    """The words of each command at the head of a recipe."""
    text = "\n".join(line[1:] for line in header(recipe) if line.startswith("#   "))
    lines = text.replace("\\\n", " ").replace("&&", "\n").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def value_at(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_these_are_the_recipes_and_a_shared_part_is_none() -> None:
    shipped = {path.stem for path in shipped_recipes().glob("*.yaml")} - {"base"}
    assert shipped == set(RUN)
    assert shipped <= recipe_files().keys()


def test_the_list_shows_each_of_them(mallowspo: Command) -> None:  # noqa: F811
    done = mallowspo("recipes", "list")
    assert set(re.findall(r"^recipe= +(\w+) ", done.out, re.MULTILINE)) == set(RUN)


@pytest.mark.parametrize("recipe", PAPER)
def test_a_recipe_composes_to_the_published_values(recipe: str) -> None:
    whole = loaded(recipe)
    found = {key: value_at(whole.tree, key) for key in VALUES[recipe]}
    assert found == VALUES[recipe]
    assert whole.recipe.objective == OBJECTIVES[recipe]
    assert (whole.recipe.name, whole.recipe.output_dir) == (recipe, f"runs/{recipe}")


@pytest.mark.parametrize("recipe", PAPER)
def test_what_a_recipe_writes_down_is_in_the_table_of_this_file_or_ours(recipe: str) -> None:
    for key, line in values_in(find_recipe(recipe).read_text()):
        assert key in VALUES[recipe] or "  # ours" in line, line


@pytest.mark.parametrize("recipe", PAPER)
def test_every_value_tells_its_source(recipe: str) -> None:
    for path in files_of(recipe):
        for _, line in values_in(path.read_text()):
            assert SOURCE.search(line), f"{path.name}: {line}"


def test_the_quickstarts_rainbow_differs_from_each_variant_in_what_its_name_says() -> None:
    whole = RainbowPO(beta=1.6, home_advantage=0.625, mixing=0.25)
    variants: dict[str, Objective] = {
        "": whole,
        "_no_ln": RainbowPO(beta=0.1, length_normalised=False, home_advantage=10.0, mixing=0.25),
        "_no_mix": replace(whole, mixing=1.0),
        "_no_home": replace(whole, home_advantage=0.0),
        "_sft": replace(whole, sft_coefficient=0.16),
        "_square": MallowsIPO(beta=1.6, length_normalised=True, scaling=Scaling.margin),
    }
    files = {path.stem: path for path in (shipped_recipes() / "objective").glob("*_rainbow*.yaml")}
    assert {f"quickstart_rainbow{v}" for v in variants} == {
        name for name in files if name.startswith("quickstart")
    }
    for variant, objective in variants.items():
        name = f"quickstart_rainbow{variant}"
        assert load_recipe("quickstart", [f"objective={name}"]).recipe.objective == objective
        for _, line in values_in(files[name].read_text()):
            assert SOURCE.search(line), f"{name}: {line}"


@pytest.mark.parametrize("recipe", PAPER)
def test_the_head_of_a_recipe_runs_the_recipe_itself_last(recipe: str) -> None:
    found = commands(recipe)
    for words in found:
        if words[0] == "mallowspo":
            assert words[1] in cli.commands
        else:
            assert words[:3] == ["accelerate", "launch", "--config_file"]
            assert (ROOT / words[3]).is_file()
            assert words[4:7] == ["-m", "mallowspo_cli", "train"]
    names = [word.removeprefix("recipe=") for words in found for word in words if "recipe=" in word]
    assert len(names) == len(found)
    assert names[-1] == recipe
    stage = [recipe.rpartition("_")[0] + "_sft", recipe]
    expected = stage if loaded(recipe).recipe.model.source.startswith("runs/") else [recipe]
    assert list(dict.fromkeys(names)) == expected


@pytest.mark.parametrize("recipe", PAPER)
def test_the_head_of_a_recipe_tells_its_hardware_and_time(recipe: str) -> None:
    text = "\n".join(header(recipe))
    assert re.search(r"^# For one (machine with 8 GPUs|GPU) of \d\d GB", text, re.MULTILINE)
    assert re.search(r"^# Expected time: \S", text, re.MULTILINE)


@pytest.mark.parametrize("recipe", [n for n in PAPER if not n.endswith("_sft")])
def test_a_second_stage_starts_from_what_its_first_leaves(recipe: str) -> None:
    model = loaded(recipe).recipe.model
    if recipe.startswith("llama3"):
        assert model.source == "meta-llama/Meta-Llama-3-8B-Instruct"
        return
    first = loaded(recipe.rpartition("_")[0] + "_sft").recipe
    assert model.source == f"{first.output_dir}/model"
    assert model.chat_template == first.model.chat_template


def test_the_document_on_recipes_names_each_of_them() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert [name for name in RUN if f"`{name}`" not in text] == []


def expected_rates(recipe: str) -> list[float]:
    """The learning rates of a run of three steps, by hand."""
    if recipe.startswith("hh"):
        return [5e-7 / 150, 5e-7 * 2 / 150, 5e-7 * 3 / 150]
    if recipe.startswith("imdb"):
        return [1e-6 / 150, 1e-6 * 2 / 150, 1e-6 * 3 / 150]
    if recipe.startswith("sentiment"):
        return [5e-5, 1e-4, 1e-4] if recipe.endswith("smollm2") else [1.25e-6, 2.5e-6, 3.75e-6]
    # A tenth of three steps is one step of warm-up; then half a cosine over two.
    peak = 1e-5 if recipe in ("llama3_lora_phi", "quickstart") else 1e-6
    return [peak, peak, peak / 2]


def check_first_losses(objective: Objective, lines: list[dict[str, Any]]) -> None:
    """Losses before and in the first step, when the policy is still the reference."""
    before = next(line for line in lines if "eval/loss" in line)
    first = next(line for line in lines if "loss" in line)
    if isinstance(objective, DPO | MallowsTheta):
        assert before["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    if isinstance(objective, MallowsPhi):
        # Held-out margins are exactly 0, where the exact link takes its upper limit: at w = 1,
        # -log g(0+) = 0.6134. The rounding of a step's own margins may fall on either side.
        assert before["eval/loss"] == pytest.approx(0.6134, abs=0.01)
        assert 0.59 < first["loss"] < 0.81
    if isinstance(objective, DPO | MallowsTheta | MallowsPhi):
        assert before["eval/rewards/margins"] == 0
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-3)
    if isinstance(objective, SFT):
        assert first["loss"] == pytest.approx(-first["rewards/chosen"])


@pytest.mark.parametrize("recipe", RUN)
def test_a_recipe_trains_end_to_end(
    mallowspo: Command,  # noqa: F811
    tmp_path: Path,
    recipe: str,
) -> None:
    own = loaded(recipe).recipe
    template = own.model.chat_template
    words = [*FAST, *([f"model.chat_template={template}"] if template else [])]
    done = mallowspo("train", f"recipe={recipe}", *words)
    assert done.code == 0, done.err

    run = tmp_path / "runs" / recipe
    results = json.loads((run / "results.json").read_text())
    assert (results["name"], results["steps"], results["pairs_seen"]) == (recipe, 3, 12)
    assert results["objective"] == objective_name(own.objective)
    assert load_recipe(str(run / "recipe.yaml")).recipe.objective == own.objective

    lines = metrics(run)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert [line["learning_rate"] for line in steps] == pytest.approx(expected_rates(recipe))
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps)
    check_first_losses(own.objective, lines)

    counts = json.loads((run / "environment.json").read_text())["reference_pass"]
    reads_reference = own.objective.needs_reference or own.objective.needs_dispersion
    assert (counts["scored"] + counts["reused"] > 0) == reads_reference
    assert (run / "adapter").is_dir() == (own.model.lora.rank > 0)
    assert (run / "checkpoints" / "step_000003").is_dir()


@pytest.mark.parametrize("family", ["hh_pythia", "imdb_gpt2"])
def test_a_preference_stage_goes_on_from_its_supervised_stage(
    mallowspo: Command,  # noqa: F811
    tmp_path: Path,
    family: str,
) -> None:
    template = loaded(f"{family}_sft").recipe.model.chat_template
    # A rate at which three steps move the model.
    moved = [*FAST, f"model.chat_template={template}", "train.learning_rate=0.05"]
    first = mallowspo("train", f"recipe={family}_sft", *moved)
    assert first.code == 0, first.err
    before, after = (
        line["eval/loss"]
        for line in metrics(tmp_path / "runs" / f"{family}_sft")
        if "eval/loss" in line
    )
    assert after < before

    second = mallowspo("train", f"recipe={family}_dpo", *FAST[1:])
    assert second.code == 0, second.err
    run = tmp_path / "runs" / f"{family}_dpo"
    assert json.loads((run / "results.json").read_text())["model_source"] == (
        f"runs/{family}_sft/model"
    )
    check_first_losses(DPO(), metrics(run))
    # The reference is that model, not the one before the first stage.
    assert json.loads((run / "environment.json").read_text())["reference_pass"]["reused"] == 0
