"""Compiled blocks compute the same; Liger is refused where it cannot run."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mallowspo_cli.data.table import TokenizedPair
from mallowspo_cli.errors import ModelError
from mallowspo_cli.models import fusion
from mallowspo_cli.models.attention import NAME
from mallowspo_cli.models.fusion import compile_blocks, use_liger
from mallowspo_cli.models.load import load_policy
from mallowspo_cli.packing.layout import collate
from mallowspo_cli.recipe.schema import ModelConfig, TrainConfig
from mallowspo_cli.scoring import PairScorer
from tests.models.families import VOCABULARY, build


def pairs(count: int) -> list[TokenizedPair]:
    generator = np.random.default_rng(count)
    return [
        TokenizedPair(
            str(index),
            *(generator.integers(3, VOCABULARY, n).astype(np.int32) for n in (4 + index, 6, 3)),
        )
        for index in range(count)
    ]


def gradients(model: nn.Module, packs: list[list[TokenizedPair]]) -> dict[str, torch.Tensor]:
    scorer = PairScorer(model)
    for members in packs:
        scores = scorer(collate(members))
        (scores.chosen_logps - scores.rejected_logps).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.filterwarnings("default")
def test_compiled_blocks_give_the_same_gradients_for_packs_of_any_length() -> None:
    packs = [pairs(2), pairs(3)]
    plain = gradients(build("llama", NAME, torch.float32), packs)
    model = build("llama", NAME, torch.float32)
    # Without code generation, which takes a minute: the graphs are what could be wrong.
    for block in model.model.layers:
        block.compile(backend="aot_eager", dynamic=True)
    compiled = gradients(model, packs)
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_every_block_is_compiled_and_names_of_weights_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[dict] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(options))
    model = build("llama", NAME)
    names = list(model.state_dict())
    compile_blocks(model)
    assert compiled == [{"dynamic": True}] * 2
    assert list(model.state_dict()) == names


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^train\.compile=true: Linear has no blocks"):
        compile_blocks(nn.Linear(2, 2))


def test_liger_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'mallowspo\[liger\]'"):
        use_liger(build("llama", NAME))


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The package and a GPU, as it were; what was applied."""
    applied: list[dict] = []
    package, patches = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    patches.monkey_patch = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None})
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", patches)
    monkeypatch.setattr(fusion.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        fusion, "apply_liger_kernel", lambda model, options: applied.append(options)
    )
    return applied


def test_liger_needs_a_gpu(liger: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="needs a GPU"):
        use_liger(build("llama", NAME))
    assert not liger


def test_liger_is_applied_without_its_losses(liger: list[dict]) -> None:
    use_liger(build("llama", NAME))
    assert liger == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_a_type_that_liger_does_not_know_is_refused(liger: list[dict]) -> None:
    with pytest.raises(ModelError, match="Liger does not know models of type gpt2"):
        use_liger(build("gpt2", NAME))
    assert not liger


@pytest.mark.parametrize("key", ["compile", "liger"])
def test_the_recipe_asks_for_them(
    key: str, tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        "mallowspo_cli.models.load.compile_blocks", lambda m: asked.append("compile")
    )
    monkeypatch.setattr("mallowspo_cli.models.load.use_liger", lambda m: asked.append("liger"))
    config = ModelConfig(source="random:llama")
    load_policy(config, tiny_directory, TrainConfig(**{key: True}), seed=0)
    assert asked == [key]
