"""`mallowspo export`: what it writes loads elsewhere and is what was trained, or nothing is."""

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mallowspo_cli.__main__ import main
from mallowspo_cli.models.load import load_tokenizer
from mallowspo_cli.training.checkpoint import checkpoint_weights
from tests.commands.conftest import Command
from tests.conftest import pair_rows

IDS = torch.arange(40)[None]
WORDS = [
    *("recipe=quickstart", "model=tiny_random", "dataset=local", "dataset.path=pairs.jsonl"),
    *("dataset.eval_size=4", "train.precision=fp32", "train.global_batch_size=4"),
    *("train.epochs=2", "train.max_steps=4", "train.learning_rate=1e-2", "eval.kl_prompts=0"),
    *("checkpoint.every=2", "checkpoint.keep=9"),
]
RUNS = {
    "whole": ["model.chat_template=dialogue"],
    "lora": ["model.lora.rank=2", "model.lora.alpha=8"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ with a finished run of all weights and one of adapters, of 4 steps each."""
    place = tmp_path_factory.mktemp("trained")
    rows = "".join(json.dumps(row) + "\n" for row in pair_rows(16))
    (place / "pairs.jsonl").write_text(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name, words in RUNS.items():
            # Accelerate keeps the precision of the first Accelerator of a process.
            AcceleratorState._reset_state(reset_partial_state=True)
            patch.setattr(sys, "argv", ["mallowspo", "train", *WORDS, *words, f"name={name}"])
            with pytest.raises(SystemExit) as stop:
                main()
            assert not stop.value.code
    return place / "runs"


@pytest.fixture
def whole(trained: Path, tmp_path: Path) -> Path:
    """A finished run of all weights that a test may change, at runs/whole."""
    return Path(shutil.copytree(trained / "whole", tmp_path / "runs" / "whole"))


@pytest.fixture
def lora(trained: Path, tmp_path: Path) -> Path:
    """A finished run of adapters that a test may change, at runs/lora."""
    return Path(shutil.copytree(trained / "lora", tmp_path / "runs" / "lora"))


def stop_before_the_end(run: Path) -> None:
    """What a kill after the last checkpoint leaves."""
    for name in ("model", "adapter", "plots"):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in ("results.json", "report.html"):
        (run / name).unlink()


def tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def at_step(run: Path, step: int) -> dict[str, Tensor]:
    found = checkpoint_weights(run / "checkpoints" / f"step_{step:06d}")
    return {name.removeprefix("model."): found[name] for name in found}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def refusal(mallowspo: Command, *words: str) -> str:
    done = mallowspo("export", *words)
    assert done.code == 2
    lines = [line for line in done.err.splitlines() if line.startswith("mallowspo: ")]
    assert len(lines) == 1
    assert done.err.rstrip().splitlines()[-1] == lines[0]
    return lines[0]


def test_a_finished_run_is_exported_as_it_was_saved(mallowspo: Command, whole: Path) -> None:
    done = mallowspo("export", "run=runs/whole")
    assert done.code == 0, done.err
    export = whole / "export"
    assert same(tensors(export), tensors(whole / "model"))
    model = AutoModelForCausalLM.from_pretrained(export)
    assert model.dtype == torch.float32
    theirs = AutoModelForCausalLM.from_pretrained(whole / "model")
    assert torch.equal(logits(model), logits(theirs))
    assert model.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    card = (export / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "- exported from the final model, step 4, in float32" in card
    assert "max_steps: 4" in card
    record = json.loads((export / "export.json").read_text())
    assert (record["step"], record["checkpoint"], record["adapters"]) == (4, None, None)


@pytest.mark.parametrize("name", ["bfloat16", "bf16"])
def test_bfloat16_is_the_trained_weights_rounded_once(
    mallowspo: Command, whole: Path, name: str
) -> None:
    assert mallowspo("export", "run=runs/whole", "--dtype", name).code == 0
    rounded = {n: value.bfloat16() for n, value in tensors(whole / "model").items()}
    assert same(tensors(whole / "export"), rounded)
    config = json.loads((whole / "export" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(whole / "export").dtype == torch.bfloat16


def test_a_final_model_stored_in_bfloat16_gains_nothing_in_float32_and_the_log_says_so(
    mallowspo: Command, whole: Path
) -> None:
    assert mallowspo("export", "run=runs/whole", "--dtype", "bf16").code == 0
    shutil.rmtree(whole / "model")
    (whole / "export").rename(whole / "model")
    done = mallowspo("export", "run=runs/whole")
    assert done.code == 0, done.err
    assert "is stored in bfloat16, so float32 adds no precision" in done.err
    widened = {name: value.float() for name, value in tensors(whole / "model").items()}
    assert same(tensors(whole / "export"), widened)


@pytest.mark.parametrize("finished", [True, False])
def test_the_tokenizer_has_the_chat_template_of_the_recipe(
    mallowspo: Command, whole: Path, tiny_directory: Path, finished: bool
) -> None:
    if not finished:
        stop_before_the_end(whole)
    assert mallowspo("export", "run=runs/whole").code == 0
    ours = AutoTokenizer.from_pretrained(whole / "export")
    theirs = load_tokenizer(tiny_directory, "dialogue")
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens_map == theirs.special_tokens_map
    text = "<|begin|>\n\nHuman: a<|user|>é<|end|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    written = json.loads((whole / "export" / "tokenizer_config.json").read_text())
    # A class that every version of transformers has.
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_of_a_stopped_run_the_newest_checkpoint_is_exported(
    mallowspo: Command, whole: Path
) -> None:
    final = tensors(whole / "model")
    stop_before_the_end(whole)
    done = mallowspo("export", "run=runs/whole")
    assert done.code == 0, done.err
    assert "the checkpoint of step 4" in done.err
    assert same(tensors(whole / "export"), final)
    card = (whole / "export" / "README.md").read_text()
    assert "16 pairs in 4 steps" in card
    assert "- exported from the checkpoint of step 4, in float32" in card
    assert "| held-out loss |" in card


def test_a_checkpoint_is_named_by_step_as_the_last_or_as_the_best(
    mallowspo: Command, whole: Path
) -> None:
    best = {"step": 2, "metric": "loss", "value": 0.5}
    (whole / "checkpoints" / "best.json").write_text(json.dumps(best))
    found = {}
    for word in ("2", "best", "last", "4"):
        place = whole.parent / word
        done = mallowspo("export", "run=runs/whole", f"checkpoint={word}", f"output={place}")
        assert done.code == 0, done.err
        found[word] = tensors(place)
    for word, step in {"2": 2, "best": 2, "last": 4, "4": 4}.items():
        assert same(found[word], at_step(whole, step))
    assert not same(found["2"], found["4"])


@pytest.mark.parametrize("finished", [True, False])
def test_merged_adapters_compute_what_the_model_with_adapters_does(
    mallowspo: Command, lora: Path, tiny_directory: Path, finished: bool
) -> None:
    from peft import PeftModel

    saved = tensors(lora / "model")
    if not finished:
        stop_before_the_end(lora)
    for words in (["output=merged"], ["output=apart", "--adapter-only"]):
        done = mallowspo("export", "run=runs/lora", *words)
        assert done.code == 0, done.err
    merged = AutoModelForCausalLM.from_pretrained("merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_directory)
    assert (logits(merged) - logits(base)).abs().max() > 1e-2
    adapted = PeftModel.from_pretrained(base, "apart")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=1e-5)
    assert same(tensors(Path("merged")), saved)


def test_merged_adapters_are_rounded_to_bfloat16_once(mallowspo: Command, lora: Path) -> None:
    words = ["run=runs/lora", "checkpoint=2"]
    assert mallowspo("export", *words, "output=exact").code == 0
    assert mallowspo("export", *words, "output=half", "--dtype", "bfloat16").code == 0
    rounded = {name: value.bfloat16() for name, value in tensors(Path("exact")).items()}
    assert same(tensors(Path("half")), rounded)
    assert json.loads(Path("half/config.json").read_text())["dtype"] == "bfloat16"
    assert "- low-rank adapters of rank 2, merged" in Path("half/README.md").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_alone_are_a_peft_directory_with_tokenizer_and_card(
    mallowspo: Command, lora: Path, tiny_directory: Path, dtype: str
) -> None:
    done = mallowspo("export", "run=runs/lora", "checkpoint=2", "--adapter-only", "--dtype", dtype)
    assert done.code == 0, done.err
    export = lora / "export"
    written = load_file(export / "adapter_model.safetensors")
    expected = {
        name.replace(".default", ""): value.to(getattr(torch, dtype))
        for name, value in at_step(lora, 2).items()
    }
    assert same(written, expected)
    config = json.loads((export / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_directory)
    assert (config["r"], config["lora_alpha"]) == (2, 8)
    assert not list(export.glob("model*.safetensors"))
    assert AutoTokenizer.from_pretrained(export).chat_template
    assert "library_name: peft" in (export / "README.md").read_text()


def edit_recipe(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    change(tree)
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


def test_adapters_of_a_quantised_base_are_merged_into_the_base_as_it_was(
    mallowspo: Command, lora: Path
) -> None:
    assert mallowspo("export", "run=runs/lora", "checkpoint=4", "output=plain").code == 0
    edit_recipe(lora, lambda tree: tree["model"].update(quantization="nf4"))
    # What a merge into a quantised base would leave in the run.
    file = lora / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {}}))
    for words in (["checkpoint=4", "output=quantised"], ["output=final"]):
        done = mallowspo("export", "run=runs/lora", *words)
        assert done.code == 0, done.err
        assert "differs from what was trained by the quantisation error" in done.err
    for name in ("quantised", "final"):
        assert same(tensors(Path(name)), tensors(Path("plain")))
        assert "trained on a base quantised to nf4" in Path(name, "README.md").read_text()
        assert "quantization_config" not in Path(name, "config.json").read_text()


def test_rotations_are_described_for_older_readers_too(mallowspo: Command, whole: Path) -> None:
    file = whole / "model" / "config.json"
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 1024,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    rope = {**scaling, "rope_theta": 500000.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_parameters": rope}))
    assert mallowspo("export", "run=runs/whole").code == 0
    written = json.loads((whole / "export" / "config.json").read_text())
    assert written["rope_theta"] == 500000.0
    assert written["rope_scaling"] == scaling
    assert AutoConfig.from_pretrained(whole / "export").rope_parameters == rope


def test_an_export_that_fails_half_way_leaves_nothing_and_takes_nothing_away(
    mallowspo: Command, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mallowspo("export", "run=runs/whole", "output=old").code == 0
    before, there = tensors(Path("old")), sorted(Path().iterdir())

    def full_disk(self: PreTrainedModel, target: Path, **_: Any) -> None:
        (Path(target) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full_disk)
    for words in (["output=new"], ["output=old", "--overwrite"]):
        assert "No space left on device" in refusal(mallowspo, "run=runs/whole", *words)
        assert sorted(Path().iterdir()) == there
    assert same(tensors(Path("old")), before)


def test_only_an_earlier_export_is_replaced_and_only_when_asked(
    mallowspo: Command, whole: Path
) -> None:
    words = ["run=runs/whole", "output=there"]
    assert mallowspo("export", *words, "checkpoint=2").code == 0
    assert "Replace it (--overwrite)" in refusal(mallowspo, *words)
    assert same(tensors(Path("there")), at_step(whole, 2))
    assert mallowspo("export", *words, "--overwrite").code == 0
    assert same(tensors(Path("there")), at_step(whole, 4))
    Path("there/export.json").unlink()
    assert "is no export of this command" in refusal(mallowspo, *words, "--overwrite")
    message = refusal(mallowspo, "run=runs/whole", "output=runs/whole/model", "--overwrite")
    assert "is no export of this command" in message
    assert (whole / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "found no run=, expected run=DIR"),
        (["runs/whole"], "found 'runs/whole', expected run=DIR"),
        (["run=runs/whole", "model=x"], "found 'model=x', expected run=DIR"),
        (["run="], "run is empty"),
        (["run=runs/other"], "no run directory at runs/other. `ls runs` shows what there is"),
        (["run=runs"], "runs holds no recipe.yaml, so it is no run"),
        (["run=runs/whole", "checkpoint=3"], "no whole checkpoint of step 3. Those that are there"),
        (["run=runs/whole", "checkpoint=first"], "found checkpoint=first, expected a step, best"),
        (["run=runs/whole", "checkpoint=best"], "names no best checkpoint"),
        (["run=runs/whole", "--adapter-only"], "trained no adapters (model.lora.rank=0)"),
        (["run=runs/whole", "--dtype", "float16"], "--dtype float16 is not one of float32"),
    ],
)
@pytest.mark.usefixtures("whole")
def test_what_cannot_be_exported_is_refused_in_one_line(
    mallowspo: Command, words: list[str], message: str
) -> None:
    assert message in refusal(mallowspo, *words)
    assert not Path("runs/whole/export").exists()


def test_a_run_with_neither_model_nor_checkpoint_is_refused(
    mallowspo: Command, whole: Path
) -> None:
    shutil.rmtree(whole / "checkpoints")
    assert "holds no whole checkpoint" in refusal(mallowspo, "run=runs/whole", "checkpoint=last")
    stop_before_the_end(whole)
    message = refusal(mallowspo, "run=runs/whole")
    assert "holds no finished model and no whole checkpoint" in message
    assert "mallowspo train recipe=runs/whole/recipe.yaml --resume" in message


@pytest.mark.parametrize("name", ["results.json", "environment.json"])
def test_a_broken_file_of_the_run_is_named(mallowspo: Command, whole: Path, name: str) -> None:
    (whole / name).write_text("{")
    assert f"cannot read runs/whole/{name}" in refusal(mallowspo, "run=runs/whole")


@pytest.mark.parametrize("change", [{"rank": 3}, {"rank": 0}, {"target_modules": "q_proj"}])
def test_weights_of_another_model_are_refused(
    mallowspo: Command, lora: Path, change: dict[str, Any]
) -> None:
    edit_recipe(lora, lambda tree: tree["model"]["lora"].update(change))
    message = refusal(mallowspo, "run=runs/lora", "checkpoint=2")
    assert "of another model than the run's recipe.yaml describes" in message


def test_adapters_that_cannot_be_read_are_named(mallowspo: Command, lora: Path) -> None:
    (lora / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    message = refusal(mallowspo, "run=runs/lora", "--adapter-only")
    assert "cannot read the adapters in runs/lora/adapter/adapter_model.safetensors" in message
