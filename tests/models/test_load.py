"""Loading: dropout off, nothing made up, adapters from the seed alone, one line for each damage."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from mallowspo_cli.data.formats import hh
from mallowspo_cli.data.pairs import Message
from mallowspo_cli.data.tokenize import split_response
from mallowspo_cli.errors import ModelError
from mallowspo_cli.models.load import (
    add_lora,
    load_model,
    load_policy,
    load_tokenizer,
    model_directory,
)
from mallowspo_cli.recipe.choices import ActivationCheckpointing, Dtype, Quantization
from mallowspo_cli.recipe.schema import DatasetConfig, LoraConfig, ModelConfig, TrainConfig
from mallowspo_cli.reference.build import load_scorer

IDS = torch.arange(40)[None]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def copied(tiny_directory: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_directory, tmp_path / "model"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_is_loaded_in_the_type_asked_for(tiny_directory: Path, dtype: torch.dtype) -> None:
    model = load_model(tiny_directory, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_is_the_one_asked_for(tiny_directory: Path, attention: str) -> None:
    model = load_model(tiny_directory, torch.float64, attention)
    assert model.config._attn_implementation == attention
    usual = logits(load_model(tiny_directory, torch.float64))
    # The eager softmax is computed in float32.
    torch.testing.assert_close(logits(model), usual, rtol=1e-4, atol=1e-5)


def test_dropout_is_switched_off(tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=50, n_positions=64, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    wild = GPT2LMHeadModel(config)
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.1
    wild.save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float32).train()
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}
    torch.testing.assert_close(logits(model), logits(wild.eval()))
    torch.testing.assert_close(logits(model), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("damage", ["cut", "noise", "header", "empty"])
def test_damaged_safetensors_are_refused(copied: Path, damage: str) -> None:
    weights = copied / "model.safetensors"
    content = weights.read_bytes()
    broken = {
        "cut": content[: len(content) // 2],
        "noise": b"\x07" * 500,
        "header": b"\xff" * 8 + content[8:],
        "empty": b"",
    }
    weights.write_bytes(broken[damage])
    message = refusal(lambda: load_model(copied, torch.float32))
    assert message.startswith(f"the weights in {copied} are damaged: ")


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_refused_and_not_made_up(copied: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit(copied, lambda tensors: tensors.pop(name))
    message = refusal(lambda: load_model(copied, torch.float32))
    assert message.endswith(f"lack 1 tensors of LlamaForCausalLM: {name}.")


def test_weights_of_another_shape_are_refused(copied: Path) -> None:
    edit(copied, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    refusal(lambda: load_model(copied, torch.float32))


def test_pickled_weights_are_never_read(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    torch.save(tensors, copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(lambda: load_model(copied, torch.float32))


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "never_heard_of"}'])
def test_a_broken_configuration_is_refused(copied: Path, content: str) -> None:
    (copied / "config.json").write_text(content)
    message = refusal(lambda: load_model(copied, torch.float32))
    assert message.startswith(f"cannot load the model in {copied}: ")


@pytest.mark.parametrize("attention", ["nonsense", "flash_attention_2"])
def test_an_attention_that_is_not_there_is_refused(tiny_directory: Path, attention: str) -> None:
    message = refusal(lambda: load_model(tiny_directory, torch.float32, attention))
    assert message.startswith("cannot load the model in ")


def test_a_missing_broken_or_slow_tokenizer_is_refused(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "tokenizer.json").write_text('{"version": "1.0"}')
    assert f"{copied} holds no tokenizer that loads: " in refusal(lambda: load_tokenizer(copied))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    assert f"{copied} holds no tokenizer that loads: " in refusal(lambda: load_tokenizer(copied))
    slow = SimpleNamespace(from_pretrained=lambda directory: SimpleNamespace(is_fast=False))
    monkeypatch.setattr("mallowspo_cli.models.load.AutoTokenizer", slow)
    assert "a fast tokenizer is needed" in refusal(lambda: load_tokenizer(copied))


def test_the_directory_is_that_of_the_recipes_source(tiny_directory: Path) -> None:
    assert model_directory(ModelConfig(source="random:llama")) == tiny_directory
    assert model_directory(ModelConfig(source=str(tiny_directory))) == tiny_directory.resolve()


def policy(
    directory: Path, checkpointing: str = "none", seed: int = 0, **lora: object
) -> nn.Module:
    config = ModelConfig(source="random:llama", lora=LoraConfig(**lora))
    return load_policy(
        config,
        directory,
        TrainConfig(activation_checkpointing=ActivationCheckpointing(checkpointing)),
        seed,
    )


def test_a_policy_trains_all_its_float32_weights_unless_it_has_adapters(
    tiny_directory: Path,
) -> None:
    model = policy(tiny_directory)
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    adapted = policy(tiny_directory, rank=2)
    assert adapted.training
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == {
        n for n, _ in adapted.named_parameters() if ".lora_" in n
    }
    assert not any("lm_head.lora" in name for name, _ in adapted.named_parameters())


def test_checkpointing_leaves_values_and_gradients_alone(tiny_directory: Path) -> None:
    results = []
    for checkpointing in ("none", "full"):
        model = policy(tiny_directory, checkpointing)
        values = model(IDS).logits
        values.square().mean().backward()
        results.append([values.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(results[0], results[1])


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}


def test_adapters_depend_on_the_seed_alone(tiny_directory: Path) -> None:
    found = []
    for seed, noise in ((3, 0), (3, 1), (4, 1)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        base = load_model(tiny_directory, torch.float32)
        found.append(adapters(add_lora(base, LoraConfig(rank=2), seed)))
        assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_fresh_adapters_change_nothing(tiny_directory: Path) -> None:
    adapted = policy(tiny_directory, rank=2)
    plain = load_model(tiny_directory, torch.float32)
    torch.testing.assert_close(logits(adapted), logits(plain), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", {"q_proj"}),
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        (" q_proj , v_proj ", {"q_proj", "v_proj"}),
        ("mlp.up_proj", {"up_proj"}),
        (
            "all-linear",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
    ],
)
def test_adapters_sit_on_every_module_named(
    tiny_directory: Path, targets: str, expected: set[str]
) -> None:
    names = adapters(policy(tiny_directory, rank=2, target_modules=targets))
    assert {name.split(".lora_")[0].split(".")[-1] for name in names} == expected


@pytest.mark.parametrize("targets", ["nothing", "q_proj,nothing", "proj", "q_proj,", ""])
def test_adapters_on_a_module_that_is_not_there_are_refused(
    tiny_directory: Path, targets: str
) -> None:
    message = refusal(lambda: policy(tiny_directory, rank=2, target_modules=targets))
    assert message.startswith("model.lora.target_modules: the model has no module '")
    assert "q_proj" in message


def test_adapters_on_a_module_that_cannot_take_them_are_refused(tiny_directory: Path) -> None:
    message = refusal(lambda: policy(tiny_directory, rank=2, target_modules="self_attn"))
    assert message.startswith("model.lora.target_modules=self_attn: ")


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_adapters_alone_are_trained_under_checkpointing(
    tiny_directory: Path, checkpointing: str
) -> None:
    # Nothing makes the blocks' inputs require a gradient, and nothing has to.
    results = []
    for each in ("none", checkpointing):
        model = policy(tiny_directory, each, rank=2)
        model(IDS).logits.square().mean().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*results)
    assert all(bool(g.any()) for n, g in results[1].items() if "lora_B" in n)


@pytest.fixture
def cuda_and_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a CUDA device and bitsandbytes, as far as a look at it goes."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())


@pytest.fixture
def asked(
    cuda_and_bitsandbytes: None, monkeypatch: pytest.MonkeyPatch, tiny_directory: Path
) -> list[dict[str, Any]]:
    """What `from_pretrained` is asked for; it gives the model as it is, in the type asked for."""
    calls = []

    def from_pretrained(directory: Path, **options: Any) -> tuple[nn.Module, dict[str, list[str]]]:
        calls.append(options)
        plain = {n: v for n, v in options.items() if n not in ("quantization_config", "device_map")}
        return LlamaForCausalLM.from_pretrained(directory, **plain)

    fake = SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setattr("mallowspo_cli.models.load.AutoModelForCausalLM", fake)
    return calls


def test_nf4_is_four_bits_twice_quantised_that_compute_in_bfloat16(
    asked: list[dict[str, Any]], tiny_directory: Path
) -> None:
    load_model(tiny_directory, torch.float32, quantization=Quantization.nf4)
    options = asked[0]["quantization_config"]
    assert (options.load_in_4bit, options.load_in_8bit) == (True, False)
    assert options.bnb_4bit_quant_type == "nf4"
    assert options.bnb_4bit_use_double_quant is True
    assert options.bnb_4bit_compute_dtype == torch.bfloat16
    assert options.bnb_4bit_quant_storage == torch.bfloat16
    assert "device_map" not in asked[0]


def test_int8_is_eight_bits_on_the_device_given(
    asked: list[dict[str, Any]], tiny_directory: Path
) -> None:
    device = torch.device("cuda", 3)
    load_model(tiny_directory, torch.float32, quantization=Quantization.int8, device=device)
    options = asked[0]["quantization_config"]
    assert (options.load_in_4bit, options.load_in_8bit) == (False, True)
    assert asked[0]["device_map"] == {"": device}


def test_without_quantisation_nothing_is_asked_for(
    asked: list[dict[str, Any]], tiny_directory: Path
) -> None:
    load_model(tiny_directory, torch.float32, device=torch.device("cuda", 3))
    assert asked[0].keys().isdisjoint({"quantization_config", "device_map"})


@pytest.mark.parametrize("dtype", list(Dtype))
def test_a_quantised_policy_is_loaded_as_its_reference_is_and_trains_float32_adapters(
    asked: list[dict[str, Any]], tiny_directory: Path, dtype: Dtype
) -> None:
    config = ModelConfig(
        source="x", dtype=dtype, quantization=Quantization.nf4, lora=LoraConfig(rank=2)
    )
    model = load_policy(config, tiny_directory, TrainConfig(), seed=0)
    load_scorer(tiny_directory, config, torch.device("cpu"))
    ours, theirs = asked
    assert ours["quantization_config"].to_dict() == theirs["quantization_config"].to_dict()
    for name in ("dtype", "attn_implementation"):
        assert ours[name] == theirs[name]
    assert ours["dtype"] == getattr(torch, dtype.value)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert theirs["device_map"] == {"": torch.device("cpu")}


@pytest.mark.parametrize(
    ("package", "cuda", "missing"),
    [
        (False, True, "missing: bitsandbytes."),
        (True, False, "missing: a CUDA device."),
        (False, False, "missing: bitsandbytes and a CUDA device."),
    ],
)
@pytest.mark.parametrize("quantization", [Quantization.nf4, Quantization.int8])
def test_quantisation_is_refused_where_its_package_or_a_device_is_missing(
    tiny_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantization: Quantization,
    package: bool,
    cuda: bool,
    missing: str,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if package else None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    message = refusal(lambda: load_model(tiny_directory, torch.float32, quantization=quantization))
    assert message.startswith(f"model.quantization={quantization.value} needs bitsandbytes")
    assert "pip install 'mallowspo[quantized]'" in message
    assert missing in message


DIALOGUE = (
    "\n\nHuman: Is it late?\n\nAssistant: Not yet.\n\nHuman: And now?\n\nAssistant: Now it is."
)


def test_the_dialogue_template_writes_the_text_of_hh(tiny_directory: Path) -> None:
    tokenizer = load_tokenizer(tiny_directory, "dialogue")
    row = {"chosen": DIALOGUE, "rejected": DIALOGUE.replace("it is", "it's not")}
    (pair,) = hh(row, "row 0", DatasetConfig(path="-"))
    prompt, chosen = split_response(pair.prompt, pair.chosen, tokenizer, "row 0")
    assert tokenizer.decode([*prompt, *chosen]) == DIALOGUE + tokenizer.eos_token
    assert tokenizer.decode(prompt).endswith("\n\nAssistant:")
    assert chosen[-1] == tokenizer.eos_token_id


def test_the_plain_template_writes_text_after_text_and_one_end(tiny_directory: Path) -> None:
    tokenizer = load_tokenizer(tiny_directory, "plain")
    turns = (Message("user", "I saw this film"),)
    prompt, response = split_response(turns, Message("assistant", " twice."), tokenizer, "row")
    assert tokenizer.decode(prompt) == "I saw this film"
    assert tokenizer.decode(response) == " twice." + tokenizer.eos_token


def test_a_shipped_template_begins_as_the_tokenizer_does(
    tiny_directory: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tiny_directory)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    shutil.copytree(tiny_directory, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    again = load_tokenizer(tmp_path / "model", "plain")
    turns = (Message("user", "x"),)
    prompt, _ = split_response(turns, Message("assistant", "y"), again, "row")
    assert prompt.tolist()[0] == tokenizer.bos_token_id
    assert prompt.tolist().count(tokenizer.bos_token_id) == 1


def test_a_template_can_be_a_file_and_one_that_is_not_there_is_refused(
    tiny_directory: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0]['content'] }}!")
    tokenizer = load_tokenizer(tiny_directory, str(file))
    turns = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "x!"
    with pytest.raises(ModelError, match=r"neither a file nor one of dialogue, plain"):
        load_tokenizer(tiny_directory, "plane")
