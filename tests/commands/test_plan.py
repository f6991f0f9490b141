"""`mallowspo plan`: a prediction from a configuration and lengths, without weights."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from mallowspo_cli.plan.tables import count, duration, size
from tests.commands.conftest import Command
from tests.commands.test_bad_input import complaint
from tests.test_plan import LLAMA3_8B

RATE = "flops=1e11"
"""So that no test measures this machine."""


def found(mallowspo: Command, words: list[str]) -> dict[str, Any]:
    done = mallowspo("plan", *words, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def llama3_8b() -> LlamaConfig:
    """As its config.json has it."""
    return LlamaConfig(**LLAMA3_8B, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])


@pytest.fixture
def large(tmp_path: Path, tiny_directory: Path, tiny_words: list[str]) -> list[str]:
    """Words for a model of Llama-3-8B's shape: a configuration and a tokenizer, no weights."""
    place = tmp_path / "large"
    place.mkdir()
    for file in tiny_directory.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, place)
    llama3_8b().save_pretrained(place)
    batch = ["train.global_batch_size=8", "train.precision=bf16", "train.max_steps=1"]
    kept = [w for w in tiny_words if not w.startswith(("model=", "train."))]
    return [*kept, "model=tiny_random", f"model.source={place}", *batch]


def test_the_table_says_what_json_says(mallowspo: Command, tiny_words: list[str]) -> None:
    words = [*tiny_words, "train.pack_tokens=70", "hardware=cpu", RATE]
    plan, done = found(mallowspo, words), mallowspo("plan", *words)
    assert done.code == 0, done.err
    written, proposed = plan["as_written"], plan["proposed"]

    def cells(label: str) -> list[str]:
        (line,) = [line for line in done.out.splitlines() if line.strip().startswith(label)]
        return line.strip().removeprefix(label).split()

    options = (written, proposed)
    assert cells("train.pack_tokens") == [str(option["pack_tokens"]) for option in options]
    assert cells("fill") == [f"{option['step']['fill']:.1%}" for option in options]
    expected = [size(option["memory"]["peak"]) for option in options]
    assert cells("all ") == " ".join(expected).split()
    assert cells("training") == " ".join(duration(o["training_seconds"]) for o in options).split()
    for line in plan["notes"] + plan["warnings"]:
        assert line in done.out
    assert plan["gain"]["tokens"] > 1
    assert f"{plan['gain']['tokens']:.2f} times fewer tokens" in done.out


def test_numbers_of_a_plan_fit_each_other(mallowspo: Command, tiny_words: list[str]) -> None:
    plan = found(mallowspo, [*tiny_words, "hardware=cpu", RATE])
    # 12 pairs, two epochs, four a step.
    assert plan["run"] == {"steps": 6, "pairs_per_step": 4, "epochs": 2}
    assert plan["data"]["pairs"] == 12
    option = plan["proposed"]
    memory, step = option["memory"], option["step"]
    parts = ("weights", "gradients", "optimizer", "copies", "activations", "head", "working")
    assert memory["peak"] == pytest.approx(sum(memory[part] for part in parts))
    assert memory["fits"]
    assert option["training_seconds"] == pytest.approx(6 * step["flops"] / 1e11)
    assert option["seconds"] == option["training_seconds"] + option["reference_seconds"]
    assert step["pairs_per_second"] == pytest.approx(4 / step["seconds"])
    # sft reads no reference.
    alone = found(mallowspo, [*tiny_words, "objective=sft", "hardware=cpu", RATE])
    assert alone["proposed"]["reference_seconds"] == 0


def test_a_recipe_that_leaves_packs_to_the_machine_has_one_column(
    mallowspo: Command, tiny_words: list[str]
) -> None:
    words = [*tiny_words, "train.pack_tokens=null", "hardware=cpu", RATE]
    plan, done = found(mallowspo, words), mallowspo("plan", *words)
    tokens = plan["proposed"]["pack_tokens"]
    assert plan["as_written"]["pack_tokens"] == tokens
    assert "as written, as proposed" in done.out
    assert re.search(rf"train.pack_tokens +null: {tokens}\b", done.out)
    # Under a policy that is given, the largest packs for it.
    full = found(mallowspo, [*words, "train.activation_checkpointing=full"])
    assert full["as_written"]["activation_checkpointing"] == "full"
    assert full["proposed"]["activation_checkpointing"] == "none"


def test_a_proposal_is_words_for_train(mallowspo: Command, tiny_words: list[str]) -> None:
    option = found(mallowspo, [*tiny_words, "hardware=cpu", RATE])["proposed"]
    keys = ("pack_tokens", "activation_checkpointing")
    words = [f"train.{key}={option[key]}" for key in keys]
    done = mallowspo("train", *tiny_words, *words, "--dry-run")
    assert done.code == 0, done.err


LENGTHS = Path(__file__).parents[2] / "benchmarks" / "lengths" / "lengths_dpo_en_demo.json"


@pytest.fixture
def bare(tmp_path: Path) -> list[str]:
    """Words that plan Llama-3-8B from a config.json and a file of lengths, and nothing else."""
    place = tmp_path / "bare"
    llama3_8b().save_pretrained(place)
    assert [file.name for file in place.iterdir()] == ["config.json"]
    return [
        *("recipe=quickstart", "dataset=ultrafeedback_armorm", "model=llama3_8b_instruct"),
        *(f"model.source={place}", f"lengths={LENGTHS}", "pairs=59876"),
        *("train.precision=bf16", "train.global_batch_size=256", "train.max_steps=null"),
        "train.epochs=1",
    ]


def test_lengths_and_a_configuration_are_enough(mallowspo: Command, bare: list[str]) -> None:
    plan = found(mallowspo, [*bare, "hardware=64xh100"])
    assert plan["data"]["pairs"] == 59_876
    assert "288 of 300 pairs fit, repeated" in plan["data"]["dataset"]
    # 59,876 pairs make 233 steps of 256.
    assert plan["run"] == {"steps": 233, "pairs_per_step": 256, "epochs": 1}
    assert plan["hardware"]["name"] == "8x8xh100"
    assert (plan["hardware"]["nodes"], plan["hardware"]["devices_of_a_node"]) == (8, 8)
    assert plan["hardware"]["bandwidth"] == 50e9
    assert plan["hardware"]["bandwidth_is"] == "between nodes"
    option = plan["proposed"]
    step = option["step"]
    # One pack on each of 64 processes: 3 x 2 x 8.03e9 x 63/64 bytes at 50 GB/s.
    assert step["packs"] == 1
    assert step["traffic_seconds"] == pytest.approx(0.9486, rel=1e-3)
    assert step["seconds"] == pytest.approx(0.9486, rel=1e-3)
    assert step["seconds_apart"] == pytest.approx(step["traffic_seconds"] + step["compute_seconds"])
    # The frozen model is whole in every process, whatever their number.
    assert option["reference_memory"]["weights"] == 2 * 8_030_261_248
    assert option["reference_memory"]["fits"]
    assert any("50 GB/s of each device (between nodes" in note for note in plan["notes"])
    assert any("the data was not read" in note for note in plan["notes"])
    assert not any("later version" in note for note in plan["notes"])
    assert any("fewer than 16,384" in warning for warning in plan["warnings"])


def test_the_table_says_nodes_and_links(mallowspo: Command, bare: list[str]) -> None:
    done = mallowspo("plan", *bare, "hardware=8x8xh100", "bandwidth=300e9")
    assert done.code == 0, done.err
    assert "on 8x8xh100 (8 nodes of 8), 79.1 GiB each" in done.out
    assert "300 GB/s of each device (between nodes" in done.out
    assert re.search(r"weights, whole +14.96 GiB", done.out)
    assert re.search(r"tokens of a pack that hide it +1,7\d\d\b", done.out)


def test_a_hub_model_is_planned_from_its_description(
    mallowspo: Command, bare: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(source: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (source, revision) == ("some/model", "main")
        asked.append(allow_patterns)
        return str(tmp_path / "bare")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    words = [w for w in bare if not w.startswith("model.source=")]
    plan = found(mallowspo, [*words, "model.source=some/model", "hardware=8xh100"])
    assert plan["model"]["source"] == "some/model"
    assert asked == [["config.json"]]


def test_with_data_the_tokenizer_is_fetched_too_but_no_weights(
    mallowspo: Command, large: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(source: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path / "large")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    words = [w for w in large if not w.startswith("model.source=")]
    plan = found(mallowspo, [*words, "model.source=some/model", "hardware=8xh100"])
    assert plan["data"]["pairs"] == 12
    (patterns,) = asked
    assert "*.json" in patterns
    assert not any("safetensors" in pattern for pattern in patterns)


def test_a_reference_that_does_not_fit_beside_nothing_is_said(
    mallowspo: Command, bare: list[str]
) -> None:
    # 32 GB of float32 weights in every process of a card with 24 GB, though a 16th of training's
    # states fits there.
    words = [*bare, "hardware=16xrtx4090", "train.activation_checkpointing=full"]
    plan = found(mallowspo, [*words, "model.dtype=float32"])
    assert plan["proposed"]["memory"]["fits"]
    (warning,) = [w for w in plan["warnings"] if "reference pass needs" in w]
    assert "model.dtype=bfloat16 halves its weights" in warning
    half = found(mallowspo, words)
    assert half["proposed"]["reference_memory"]["weights"] == 2 * 8_030_261_248
    assert not any("reference pass needs" in w for w in half["warnings"])


def test_weights_are_neither_needed_nor_loaded(mallowspo: Command, large: list[str]) -> None:
    plan = found(mallowspo, [*large, "hardware=8xh100"])
    assert plan["model"]["parameters"] == plan["model"]["trained"] == 8_030_261_248
    memory = plan["proposed"]["memory"]
    states = memory["weights"] + memory["gradients"] + memory["optimizer"]
    assert states == pytest.approx(18.07e9, rel=1e-3)
    assert plan["hardware"]["traffic_per_pack"] == pytest.approx(42.16e9, rel=1e-3)
    assert any("8 devices, ZeRO-3, weights in bf16, gradients" in n for n in plan["notes"])
    # Eight pairs of some words are too little for eight GPUs.
    assert any("fewer than 8,192" in warning for warning in plan["warnings"])


def test_what_does_not_fit_is_said_with_what_would_help(
    mallowspo: Command, large: list[str]
) -> None:
    plan = found(mallowspo, [*large, "hardware=h100"])
    assert plan["proposed"] is None
    assert not plan["as_written"]["memory"]["fits"]
    (warning,) = plan["warnings"]
    assert "will not fit: weights, gradients and optimizer take 119.7 GiB" in warning
    assert "model.lora.rank=16" in warning
    assert "take 4xh100" in warning
    done = mallowspo("plan", *large, "hardware=h100")
    assert done.code == 0
    assert warning in done.out
    adapters = found(mallowspo, [*large, "hardware=h100", "model.lora.rank=16"])
    assert adapters["proposed"]["memory"]["fits"]
    assert adapters["model"]["trained"] == 41_943_040


def test_a_gpu_too_fast_for_the_model_and_fp32_are_remarked(
    mallowspo: Command, tiny_words: list[str]
) -> None:
    plan = found(mallowspo, [*tiny_words, "hardware=h100"])
    assert any("launching its kernels" in warning for warning in plan["warnings"])
    assert any("train.precision=fp32" in warning for warning in plan["warnings"])


def test_padded_batches_have_a_plan_and_no_gain(mallowspo: Command, tiny_words: list[str]) -> None:
    words = [*tiny_words, "hardware=cpu", RATE]
    shared, padded = found(mallowspo, words), found(mallowspo, [*words, "model.attention=sdpa"])
    assert padded["gain"] is None
    assert padded["proposed"]["step"]["flops"] > 1.2 * shared["proposed"]["step"]["flops"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("hardware=h1000", "Expected one of h100, h200, a100, l40s, rtx4090, cpu"),
        ("hardwar=h100", "Did you mean 'hardware'?"),
        ("flops=fast", "flops=fast is no number"),
        ("flops=-1", "flops=-1 is no number"),
        ("bandwidth=wide", "bandwidth=wide is no number of bytes/s above 0"),
        ("lengths=nothing.json", "no file of lengths at nothing.json"),
        ("pairs=100", "pairs is how many pairs lengths=FILE stands for"),
        ("hardware=12xh100", "a node has 8 of h100"),
        ("hardware=8xh100", "train.global_batch_size=4 is not a multiple of 8 processes"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    word: str, expected: str, mallowspo: Command, tiny_words: list[str]
) -> None:
    assert expected in complaint(mallowspo("plan", *tiny_words, word))


def test_quantities_are_written_in_units_that_suit_them() -> None:
    assert [duration(s) for s in (0, 3e-6, 0.03, 5, 300, 3 * 3600, 7 * 86400)] == [
        *("-", "3 us", "30 ms", "5 s", "5 min", "3 h", "7 days")
    ]
    assert [size(n) for n in (0, 2**20, 2**30)] == ["-", "1.00 MiB", "1.00 GiB"]
    assert [count(n) for n in (12, 90_800, 135e6, 8.03e9)] == ["12", "90.8 k", "135 M", "8.03 B"]
