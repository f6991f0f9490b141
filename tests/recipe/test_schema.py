"""The recipe's keys: each is explained, and each range is checked with the key and the value."""

import ast
import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum

import pytest

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.objectives.base import registered
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.recipe import choices, schema
from mallowspo_cli.recipe.choices import DispersionSource, Quantization
from mallowspo_cli.recipe.load import load_recipe
from mallowspo_cli.recipe.schema import (
    CheckpointConfig,
    DatasetConfig,
    DispersionConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    Recipe,
    ReferenceConfig,
    TrainConfig,
)


def nodes() -> list[type]:
    """The dataclasses and enums of the schema, and every objective."""
    own = [
        c
        for module in (schema, choices)
        for c in vars(module).values()
        if getattr(c, "__module__", "") == module.__name__
    ]
    return [c for c in own if isinstance(c, type)] + list(registered().values())


def undocumented(cls: type) -> Iterator[str]:
    """Fields of `cls` that have no text under them, in its source or in a base's."""
    documented = set()
    for owner in cls.__mro__:
        if not is_dataclass(owner):
            continue
        (body,) = ast.parse(inspect.cleandoc(inspect.getsource(owner))).body
        assert isinstance(body, ast.ClassDef)
        for statement, below in zip(body.body, body.body[1:], strict=False):
            match statement, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ) if text.strip():
                    documented.add(name)
    yield from (f.name for f in fields(cls) if f.name not in documented)


@pytest.mark.parametrize("cls", [c for c in nodes() if is_dataclass(c)], ids=lambda c: c.__name__)
def test_every_field_is_explained_under_it(cls: type) -> None:
    assert list(undocumented(cls)) == []


@pytest.mark.parametrize("cls", nodes(), ids=lambda c: c.__name__)
def test_every_node_has_a_docstring(cls: type) -> None:
    assert (cls.__doc__ or "").strip()


@pytest.mark.parametrize("cls", nodes(), ids=lambda c: c.__name__)
def test_the_name_of_a_choice_is_its_value(cls: type) -> None:
    # OmegaConf reads names, and files are written with values.
    if issubclass(cls, Enum):
        assert [m.name for m in cls] == [m.value for m in cls]


NODES = {
    "model.lora": LoraConfig,
    "dataset": DatasetConfig,
    "dispersion": DispersionConfig,
    "reference": ReferenceConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
}
AT_LEAST = [
    ("model.lora.rank", 0),
    ("model.lora.dropout", 0),
    ("dataset.max_length", 2),
    ("dataset.max_prompt_length", 1),
    ("dataset.eval_size", 0),
    ("dataset.min_score_ratio", 1),
    ("dataset.min_score_gap", 0),
    ("dataset.max_pairs_per_prompt", 1),
    ("reference.pack_tokens", 1),
    ("reference.startup_check", 0),
    ("train.global_batch_size", 1),
    ("train.pack_tokens", 1),
    ("train.epochs", 1),
    ("train.max_steps", 1),
    ("train.weight_decay", 0),
    ("train.max_grad_norm", 0),
    ("train.warmup_ratio", 0),
    ("train.warmup_steps", 0),
    ("train.hang_seconds", 0),
    ("eval.every", 0),
    ("eval.kl_prompts", 0),
    ("eval.kl_tokens", 1),
    ("checkpoint.every", 0),
    ("checkpoint.keep", 1),
    ("checkpoint.before_end", 0),
    ("log.every", 1),
]
ABOVE_ZERO = [
    "model.lora.alpha",
    "dispersion.scale",
    "dispersion.normaliser",
    "train.learning_rate",
]
INTERVALS = ["dispersion.clamp", "dispersion.keep"]


def node(key: str, value: object) -> object:
    """The node of `key` with this value, and defaults beside it."""
    prefix, _, name = key.rpartition(".")
    needed = {"path": "-"} if prefix == "dataset" else {}
    return NODES[prefix](**{**needed, name: value})


def recipe(**values: object) -> Recipe:
    """A recipe with these values at its root."""
    whole = {
        "name": "test",
        "model": ModelConfig(source="random:llama"),
        "dataset": DatasetConfig(path="pairs.jsonl"),
        "objective": DPO(),
    }
    return Recipe(**(whole | values))


def test_every_number_has_a_range() -> None:
    checked = {key for key, _ in AT_LEAST} | set(ABOVE_ZERO) | set(INTERVALS)
    for prefix, cls in NODES.items():
        for f in fields(cls):
            number = re.search(r"\b(int|float)\b", getattr(f.type, "__name__", str(f.type)))
            assert (f"{prefix}.{f.name}" in checked) == bool(number)


@pytest.mark.parametrize(("key", "minimum"), AT_LEAST)
def test_the_least_value_is_taken_and_what_lies_below_is_refused(key: str, minimum: int) -> None:
    node(key, minimum)
    with pytest.raises(RecipeError) as caught:
        node(key, minimum - 1)
    assert str(caught.value).startswith(f"{key}={minimum - 1}")
    assert str(caught.value).endswith(f"must be at least {minimum}.")


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
@pytest.mark.parametrize("key", ABOVE_ZERO)
def test_what_must_be_above_zero_is_refused_otherwise(key: str, value: float) -> None:
    with pytest.raises(RecipeError, match=rf"^{key}={value} .* must be above 0\.$"):
        node(key, value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["train.weight_decay", "train.max_grad_norm", "train.warmup_ratio"])
def test_what_is_no_finite_number_is_refused(key: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"^{key}={value} "):
        node(key, value)


@pytest.mark.parametrize(("key", "value"), [("train.warmup_ratio", 1.5), ("model.lora.dropout", 1)])
def test_a_share_beyond_its_end_is_refused(key: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"^{key}={value}.*must lie in"):
        node(key, value)


def test_a_scale_is_auto_or_a_number() -> None:
    for scale in ("auto", 1, 0.29):
        assert DispersionConfig(scale=scale).scale == scale
    with pytest.raises(RecipeError, match=r"^dispersion\.scale=off is neither 'auto'"):
        DispersionConfig(scale="off")


@pytest.mark.parametrize("key", INTERVALS)
@pytest.mark.parametrize(
    "value", [[], [0.1], [0.5, 0.5], [1, 0], [-1, 1], [0, 1, 2], [0, math.nan]]
)
def test_an_interval_has_two_ends_in_order(key: str, value: list[float]) -> None:
    node(key, [0.25, 1])
    with pytest.raises(RecipeError, match=re.escape(f"{key}={value} is not a pair")):
        node(key, value)


def test_quantiles_end_at_one_and_weights_anywhere() -> None:
    node("dispersion.clamp", [0.5, 40])
    with pytest.raises(RecipeError, match="0 <= low < high <= 1"):
        node("dispersion.keep", [0.5, 40])


@pytest.mark.parametrize(
    ("source", "column"),
    [(DispersionSource.column, None), (DispersionSource.entropy, "x")],
)
def test_a_column_and_its_source_go_together(source: DispersionSource, column: str | None) -> None:
    DispersionConfig(source=DispersionSource.column, column="x")
    with pytest.raises(RecipeError, match=r"dispersion\.column=NAME"):
        DispersionConfig(source=source, column=column)


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(RecipeError, match=f"^seed={seed} "):
        recipe(seed=seed)
    recipe(seed=0)
    recipe(seed=2**32 - 1)


@pytest.mark.parametrize("key", ["name", "output_dir"])
def test_an_empty_name_is_refused(key: str) -> None:
    with pytest.raises(RecipeError, match=f"^{key} is empty"):
        recipe(**{key: ""})


@pytest.mark.parametrize("kind", [Quantization.nf4, Quantization.int8])
def test_a_quantised_model_without_adapters_is_refused(kind: Quantization) -> None:
    ModelConfig(source="x", quantization=kind, lora=LoraConfig(rank=1))
    with pytest.raises(RecipeError) as caught:
        ModelConfig(source="x", quantization=kind)
    assert str(caught.value).startswith(f"model.quantization={kind.value} freezes")
    assert "(model.lora.rank=16)" in str(caught.value)
    with pytest.raises(RecipeError, match=f"^model.quantization={kind.value} freezes"):
        load_recipe("quickstart", [f"model.quantization={kind.value}"])
