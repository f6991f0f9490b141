"""A trained model is its base with what was trained in it, whatever the architecture."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mallowspo_cli.errors import CheckpointError, ModelError
from mallowspo_cli.models.load import add_lora, load_model
from mallowspo_cli.models.trained import adapter_weights, merge_adapters, trained_model
from mallowspo_cli.recipe.schema import LoraConfig, ModelConfig
from mallowspo_cli.scoring import PairScorer
from tests.models.families import FAMILIES, VOCABULARY, build

IDS = torch.arange(40)[None] % VOCABULARY
LORA = LoraConfig(rank=2, alpha=8)


def in_a_directory(family: str, place: Path) -> Path:
    build(family, None, torch.float32).save_pretrained(place)
    return place


def moved(model: nn.Module) -> dict[str, Tensor]:
    """What is trained in a model, by its names in the scorer, after a step of noise."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    scorer = PairScorer(model)
    return {n: p.detach().clone() for n, p in scorer.named_parameters() if p.requires_grad}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_all_weights_is_saved_as_it_was_trained(family: str, tmp_path: Path) -> None:
    base = in_a_directory(family, tmp_path / "base")
    policy = load_model(base, torch.float32, "eager")
    before = logits(policy)
    weights = moved(policy)
    model = trained_model(ModelConfig(source="x"), base, weights, torch.float32)
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert torch.equal(logits(saved), logits(policy))
    assert not torch.equal(logits(saved), before)
    # The files have the layout of the base's.
    assert (
        load_file(tmp_path / "saved" / "model.safetensors").keys()
        == load_file(base / "model.safetensors").keys()
    )


@pytest.mark.parametrize("family", ["llama tied", "gpt_neox", "qwen3", "gemma2"])
def test_adapters_are_merged_in_float32_and_rounded_once(family: str, tmp_path: Path) -> None:
    base = in_a_directory(family, tmp_path / "base")
    policy = add_lora(load_model(base, torch.float32, "eager"), LORA, seed=1)
    weights = moved(policy)
    expected = logits(policy)
    config = ModelConfig(source="x", lora=LORA)
    adapted = trained_model(config, base, weights, torch.float32)
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=0)
    merged = merge_adapters(adapted, torch.float32)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    exact = {name: p.detach().clone() for name, p in merged.named_parameters()}
    half = merge_adapters(trained_model(config, base, weights, torch.float32), torch.bfloat16)
    assert all(torch.equal(p, exact[n].bfloat16()) for n, p in half.named_parameters())
    assert half.dtype == torch.bfloat16


def test_a_peft_directory_has_what_a_checkpoint_has(tiny_directory: Path, tmp_path: Path) -> None:
    policy = add_lora(load_model(tiny_directory, torch.float32), LORA, seed=1)
    weights = moved(policy)
    policy.save_pretrained(tmp_path, save_embedding_layers=False)
    read = adapter_weights(tmp_path)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in read)


def test_a_directory_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read the adapters in"):
        adapter_weights(tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    assert adapter_weights(tmp_path) == {}


@pytest.mark.parametrize("damage", ["one less", "one more", "another shape"])
def test_weights_of_another_model_are_refused(tiny_directory: Path, damage: str) -> None:
    weights = moved(load_model(tiny_directory, torch.float32))
    name = "model.model.norm.weight"
    value = weights.pop(name)
    if damage == "one more":
        weights |= {name: value, "model.more": value}
    elif damage == "another shape":
        weights[name] = value[:-1]
    with pytest.raises(CheckpointError) as caught:
        trained_model(ModelConfig(source="x"), tiny_directory, weights, torch.float32)
    assert f"({'more' if damage == 'one more' else 'model.norm.weight'})" in str(caught.value)
    assert "\n" not in str(caught.value)
