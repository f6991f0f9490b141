"""The fingerprint changes with what changes the reference's numbers, and with nothing else."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest

from mallowspo_cli.errors import ModelError
from mallowspo_cli.files import sha256
from mallowspo_cli.recipe.choices import Dtype, Precision, Quantization
from mallowspo_cli.recipe.load import load_recipe
from mallowspo_cli.recipe.schema import LoraConfig, ModelConfig
from mallowspo_cli.reference.fingerprint import Fingerprint, compute_name, fingerprint


@pytest.fixture
def directory(tiny_directory: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_directory, tmp_path / "model"))


def of(directory: Path, precision: Precision = Precision.fp32, **model: object) -> Fingerprint:
    return fingerprint(directory, ModelConfig(source="x", **model), precision)


def changed(before: Fingerprint, after: Fingerprint) -> list[str]:
    assert (before.key() == after.key()) == (before == after)
    return [line.partition(":")[0] for line in before.differences(after)]


def test_the_weights_are_in_it(directory: Path) -> None:
    before, file = of(directory), directory / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert changed(before, of(directory)) == ["weights"]


def test_a_second_weights_file_is_in_it(directory: Path) -> None:
    before = of(directory)
    shutil.copy(directory / "model.safetensors", directory / "more.safetensors")
    assert changed(before, of(directory)) == ["weights"]


def test_the_configuration_is_in_it(directory: Path) -> None:
    before, file = of(directory), directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 5.0}))
    assert changed(before, of(directory)) == ["config"]


def test_the_vocabulary_is_in_it(directory: Path) -> None:
    before, file = of(directory), directory / "tokenizer.json"
    file.write_text(file.read_text().replace("<|user|>", "<|human|>"))
    assert changed(before, of(directory)) == ["tokenizer"]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_templates_are_not_in_it_since_rows_are_keyed_by_their_tokens(
    directory: Path, name: str
) -> None:
    before, file = of(directory), directory / name
    file.write_text(file.read_text().replace("<|user|>", "<|human|>") + " ")
    assert of(directory) == before


def test_an_adapter_in_the_directory_is_in_it(directory: Path) -> None:
    before = of(directory)
    assert before.adapter == "none"
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    (directory / "adapter_config.json").write_text("{}")
    first = of(directory)
    assert changed(before, first) == ["adapter"]
    (directory / "adapter_config.json").write_text('{"r": 8}')
    assert changed(first, of(directory)) == ["adapter"]


def test_storage_and_compute_type_are_in_it(directory: Path) -> None:
    exact = of(directory)
    mixed = of(directory, Precision.bf16)
    half = of(directory, dtype=Dtype.bfloat16)
    assert changed(exact, mixed) == ["compute"]
    assert changed(exact, half) == ["compute"]
    assert changed(mixed, half) == ["compute"]


def test_weights_in_bfloat16_compute_in_bfloat16_whatever_the_precision() -> None:
    names = {compute_name(Dtype.bfloat16, precision) for precision in Precision}
    assert names == {"bfloat16"}


def test_quantisation_is_in_it(directory: Path) -> None:
    lora = LoraConfig(rank=8)
    plain = of(directory, lora=lora)
    small, half = (
        of(directory, lora=lora, quantization=kind)
        for kind in (Quantization.nf4, Quantization.int8)
    )
    assert small.compute == "nf4 weights, float32"
    assert changed(plain, small) == ["compute"]
    assert changed(plain, half) == ["compute"]
    assert changed(small, half) == ["compute"]
    mixed = of(directory, Precision.bf16, lora=lora, quantization=Quantization.nf4)
    assert changed(small, mixed) == ["compute"]


def test_a_store_of_before_there_was_quantisation_is_found_again(directory: Path) -> None:
    plain = of(directory, quantization=Quantization.none)
    assert plain.compute == "float32"
    assert {f.name for f in fields(Fingerprint)} == {
        *("weights", "adapter", "config", "tokenizer", "compute", "attention"),
        *("torch", "transformers"),
    }
    old = Fingerprint("w", "none", "c", "t", "float32", "sdpa", "2.6", "5.0")
    assert old.key() == "afbf8b4536145f24"


def test_attention_is_in_it(directory: Path) -> None:
    assert changed(of(directory), of(directory, attention="eager")) == ["attention"]


def test_objective_learning_rate_seed_and_batch_are_not_in_it(directory: Path) -> None:
    words = ["objective=simpo", "train.learning_rate=1", "seed=9", "train.global_batch_size=2"]
    keys = set()
    for overrides in ([], words):
        recipe = load_recipe("quickstart", overrides).recipe
        keys.add(fingerprint(directory, recipe.model, recipe.train.precision).key())
    assert len(keys) == 1


def test_place_name_and_adapters_are_not_in_it(directory: Path, tiny_directory: Path) -> None:
    lora = LoraConfig(rank=8)
    assert of(directory, lora=lora, revision="main") == of(tiny_directory)
    (directory / "README.md").write_text("words")
    assert of(directory) == of(tiny_directory)


def test_a_hub_blob_counts_as_the_file_with_its_content(directory: Path, tmp_path: Path) -> None:
    before, file = of(directory), directory / "model.safetensors"
    blob = tmp_path / sha256(file)
    file.rename(blob)
    file.symlink_to(blob)
    assert of(directory) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_directory_without_a_model_is_refused(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(ModelError, match=name.partition(".")[2]):
        of(directory)


def test_the_key_is_a_short_name_that_each_field_changes(directory: Path) -> None:
    before = of(directory)
    keys = {replace(before, **{f.name: "other"}).key() for f in fields(Fingerprint)}
    assert len(keys | {before.key()}) == 1 + len(fields(Fingerprint))
    assert all(len(key) == 16 for key in keys)


def test_differences_name_both_values() -> None:
    one = Fingerprint("w", "none", "c", "t", "float32", "sdpa", "2.6", "5.0")
    other = replace(one, attention="eager", torch="2.7")
    assert one.differences(other) == ["attention: sdpa, now eager", "torch: 2.6, now 2.7"]
    assert one.differences(one) == []
