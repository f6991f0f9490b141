"""A launcher says how many processes there are and how they share; the recipe says the numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from mallowspo_cli.commands import launch
from mallowspo_cli.commands.launch import first_host, make_accelerator, read_launch
from mallowspo_cli.errors import MallowsPOError, RecipeError
from mallowspo_cli.recipe.load import load_recipe
from mallowspo_cli.recipe.schema import Recipe

FILES = sorted((Path(__file__).parents[2] / "recipes/accelerate").glob("*.yaml"))
SPEED_KEYS = {
    *("compute_environment", "distributed_type", "main_training_function", "use_cpu"),
    *("num_machines", "num_processes", "machine_rank", "rdzv_backend", "same_network"),
    *("deepspeed_config.deepspeed_multinode_launcher", "deepspeed_config.zero_stage"),
    *("deepspeed_config.zero3_init_flag", "deepspeed_config.offload_optimizer_device"),
    "deepspeed_config.offload_param_device",
    *("fsdp_config.fsdp_version", "fsdp_config.fsdp_auto_wrap_policy"),
    *("fsdp_config.fsdp_cpu_ram_efficient_loading", "fsdp_config.fsdp_offload_params"),
    *("fsdp_config.fsdp_reshard_after_forward", "fsdp_config.fsdp_state_dict_type"),
}
"""What these files may say: none of it changes a loss."""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that a launcher sets, taken away, and what a test changes put back."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        # Set first, so that what the code under test sets is taken back at the end.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def recipe(*words: str) -> Recipe:
    return load_recipe("quickstart", ["train.precision=fp32", *words]).recipe


def test_there_are_files_for_every_engine() -> None:
    names = {path.stem for path in FILES}
    assert names == {
        *("cpu_zero3", "ddp", "zero2", "zero3", "zero3_offload", "multinode_zero3", "fsdp2")
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_accelerate_file_sets_what_changes_the_numbers(path: Path) -> None:
    found = set()
    for key, value in yaml.safe_load(path.read_text()).items():
        found |= {f"{key}.{inner}" for inner in value} if isinstance(value, dict) else {key}
    assert found <= SPEED_KEYS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_the_file_and_its_command_names_it(path: Path) -> None:
    config = load_config_from_file(str(path))
    # What accelerate fills in by itself is none of ours, and no numbers either.
    assert config.mixed_precision in (None, "no")
    assert f"--config_file recipes/accelerate/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_only_files_of_several_machines_say_so(path: Path) -> None:
    machines = yaml.safe_load(path.read_text())["num_machines"]
    assert (machines > 1) == path.stem.startswith("multinode")


def test_one_process_needs_no_launcher() -> None:
    found = read_launch(recipe())
    assert (found.processes, found.deepspeed, found.fsdp, found.sharded) == (1, False, False, False)


@pytest.mark.parametrize(
    ("batch", "processes", "nearest"), [(100, 8, "96, 104"), (8, 3, "6, 9"), (4, 8, "8")]
)
def test_a_batch_that_cannot_be_dealt_evenly_is_refused(
    monkeypatch: pytest.MonkeyPatch, batch: int, processes: int, nearest: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(RecipeError, match=rf"not a multiple of {processes} .*Nearest: {nearest}\."):
        read_launch(recipe(f"train.global_batch_size={batch}"))


@pytest.mark.parametrize(
    ("variable", "value", "key"),
    [
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "train.max_grad_norm"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1", "train.max_grad_norm"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "train.global_batch_size"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "train.precision"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "train.compile"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "train.activation_checkpointing"),
    ],
)
def test_an_accelerate_file_that_sets_the_recipes_numbers_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, key: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(MallowsPOError, match=rf"the accelerate file sets .*{key}"):
        read_launch(recipe())


def test_what_accelerate_sets_by_itself_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_GRADIENT_CLIPPING": "none",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
    }.items():
        monkeypatch.setenv(name, value)
    assert read_launch(recipe()).processes == 1
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert read_launch(recipe("train.precision=bf16")).processes == 1


def deepspeed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"gradient_clipping": 1.0}, "train.max_grad_norm"),
        ({"bf16": {"enabled": True}}, "train.precision"),
        ({"fp16": {"enabled": True}}, "train.precision"),
        ({"train_batch_size": 64}, "train.global_batch_size"),
        ({"optimizer": {"type": "AdamW"}}, "train.optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "train.scheduler"),
        ({"communication_data_type": "fp16"}, "train.precision"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "train.precision"),
        ({"zero_force_ds_cpu_optimizer": True}, "train.optimizer"),
        ({"gradient_predivide_factor": 4.0}, "the loop"),
    ],
)
def test_a_deepspeed_file_that_sets_the_recipes_numbers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, Any], key: str
) -> None:
    deepspeed_file(tmp_path, monkeypatch, content)
    with pytest.raises(MallowsPOError, match=rf"the DeepSpeed configuration sets .*{key}"):
        read_launch(recipe())


@pytest.mark.parametrize("content", ["{", "[1,"])
def test_a_broken_deepspeed_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    deepspeed_file(tmp_path, monkeypatch, content)
    with pytest.raises(MallowsPOError, match=r"cannot read .*deepspeed\.json"):
        read_launch(recipe())


def test_the_recipe_fills_deepspeeds_numbers_and_the_file_its_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    # As transformers' own examples have it: nothing of it says a number.
    content = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "optimizer": {"type": "auto", "params": {"lr": "auto"}},
        "prescale_gradients": False,
        "activation_checkpointing": {"partition_activations": False},
        "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 123},
    }
    deepspeed_file(tmp_path, monkeypatch, content)
    monkeypatch.setenv("WORLD_SIZE", "2")
    ours = recipe("train.precision=bf16", "train.max_grad_norm=0.7")
    found = read_launch(ours)
    assert found.sharded
    monkeypatch.setattr(launch, "DeepSpeedPlugin", lambda **given: given)
    given: Any = launch._plugin(found, ours)
    config = given["hf_ds_config"]
    assert given["zero3_init_flag"] is True
    assert config["gradient_clipping"] == 0.7
    assert config["bf16"] == {"enabled": True}
    assert not {"fp16", "optimizer", "prescale_gradients"} & config.keys()
    assert config["gradient_accumulation_steps"] == 1
    assert config["train_micro_batch_size_per_gpu"] == 1
    assert config["train_batch_size"] == 2
    assert config["zero_optimization"]["stage3_max_live_parameters"] == 123
    # Small models are sharded too where there is no GPU.
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 0


@pytest.mark.parametrize("stage", [0, 1])
def test_stages_without_a_test_are_refused(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
    with pytest.raises(MallowsPOError, match=rf"ZeRO stage {stage}; this trainer takes 2 and 3"):
        read_launch(recipe())


def test_what_deepspeed_cannot_deal_out_or_save_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme"}}
    deepspeed_file(tmp_path, monkeypatch, {"zero_optimization": zero})
    with pytest.raises(MallowsPOError, match="offloads to NVMe"):
        read_launch(recipe())
    deepspeed_file(tmp_path, monkeypatch, {"zero_optimization": {"stage": 3}})
    with pytest.raises(MallowsPOError, match="adamw_8bit keeps its states in blocks"):
        read_launch(recipe("train.optimizer=adamw_8bit"))


def test_fsdp_adds_gradients_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "2")
    policy: Any = launch._fsdp_plugin(bf16=True).mixed_precision_policy
    found = (policy.param_dtype, policy.reduce_dtype, policy.output_dtype)
    assert found == (torch.bfloat16, torch.float32, torch.float32)


def test_offloading_is_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    monkeypatch.setattr(launch, "DeepSpeedPlugin", lambda **given: given)
    given: Any = launch._plugin(read_launch(recipe()), recipe())
    zero = given["hf_ds_config"]["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == "cpu"
    assert "offload_param" not in zero


def test_deepspeed_that_is_not_installed_is_missed_with_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    with pytest.raises(MallowsPOError, match=r"pip install 'mallowspo\[deepspeed\]'"):
        read_launch(recipe())


def test_fsdp_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(MallowsPOError, match="FSDP needs GPUs"):
        read_launch(recipe())


def test_version_1_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(MallowsPOError, match="fsdp_version: 2"):
        read_launch(recipe())
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert read_launch(recipe()).sharded


def test_processes_that_each_believe_to_be_alone_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate sees one process where LOCAL_RANK is missing, whatever WORLD_SIZE says."""
    found = launch.Launch(processes=2, deepspeed=False, zero_stage=0, fsdp=False, cuda=False)

    class Alone:
        num_processes = 1

        def __init__(self, **_: Any):
            pass

    monkeypatch.setattr(launch, "Accelerator", Alone)
    with pytest.raises(MallowsPOError, match="2 processes were launched, but this one sees 1"):
        make_accelerator(found, recipe(), tmp_path, [])


def test_srun_alone_is_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_NODELIST": "gpu[003-004],gpu017",
    }.items():
        monkeypatch.setenv(name, value)
    found = read_launch(recipe("train.global_batch_size=16"))
    environ = __import__("os").environ
    assert found.processes == 16
    assert environ["RANK"] == "9"
    assert environ["LOCAL_RANK"] == "1"
    assert environ["MASTER_ADDR"] == "gpu003"
    assert environ["MASTER_PORT"] == str(20000 + 123456 % 20000)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu001", "gpu001"),
        ("gpu001,gpu002", "gpu001"),
        ("gpu[003-004,007],cpu1", "gpu003"),
        ("node-a[12,14].site", "node-a12.site"),
        ("rack[1-2]-node5,x", "rack1-node5"),
    ],
)
def test_the_first_of_slurms_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
