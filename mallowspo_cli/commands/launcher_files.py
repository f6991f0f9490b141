"""What a launcher's file may say, and what belongs to the recipe.

`accelerate launch` hands its file on in variables; a DeepSpeed configuration is a file of its own.
"""

import json
import os
from pathlib import Path
from typing import Any

from mallowspo_cli.errors import MallowsPOError
from mallowspo_cli.recipe.choices import Optimizer
from mallowspo_cli.recipe.schema import Recipe

NUMBERS = {
    "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", "train.max_grad_norm"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "gradient_accumulation_steps",
        "train.global_batch_size and train.pack_tokens",
    ),
}
"""Variables in which `accelerate launch` hands on what would change the numbers: the key of its
file, and the recipe's."""
DEEPSPEED_NUMBERS = {
    "gradient_clipping": "train.max_grad_norm",
    "gradient_accumulation_steps": "train.global_batch_size and train.pack_tokens",
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.pack_tokens",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "optimizer": "train.optimizer",
    "scheduler": "train.scheduler",
    "activation_checkpointing": "train.activation_checkpointing",
    "amp": "train.precision",
    "communication_data_type": "train.precision",
    "zero_quantized_weights": "train.precision",
    "zero_quantized_gradients": "train.precision",
    "zero_force_ds_cpu_optimizer": "train.optimizer",
    "prescale_gradients": "the loop's mean over pairs",
    "gradient_predivide_factor": "the loop's mean over pairs",
}
"""The same in a DeepSpeed configuration file, at its top or under zero_optimization."""
OFFLOAD = {
    "offload_optimizer": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
}
"""Parts of DeepSpeed's configuration, and where `accelerate launch` hands their device on."""
UNSET = ("", "none", "auto", "no")


def config_file() -> dict[str, Any]:
    """The DeepSpeed configuration file that the accelerate file names, if it names one."""
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":
        return {}
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise MallowsPOError(
            f"cannot read the DeepSpeed configuration {path}: {error}. It is named by the "
            "accelerate file, and looked for from the working directory."
        ) from error


def zero_stage() -> int:
    """The ZeRO stage that the launcher asks for; a DeepSpeed file's wins over accelerate's."""
    zero = config_file().get("zero_optimization", {})
    return int(zero.get("stage", os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")))


def check_file(recipe: Recipe) -> None:
    """Refuse a launcher's file that sets what the recipe sets."""
    for variable, (key, ours) in NUMBERS.items():
        value = os.environ.get(variable, "none")
        default = ("1",) if variable.endswith("STEPS") else ()
        if value.lower() not in (*UNSET, *default):
            raise _twice("the accelerate file", key, value, ours)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in (*UNSET, recipe.train.precision.value):
        raise _twice("the accelerate file", "mixed_precision", precision, "train.precision")
    if flag("FSDP_ACTIVATION_CHECKPOINTING"):
        key = "fsdp_activation_checkpointing"
        raise _twice("the accelerate file", key, "true", "train.activation_checkpointing")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in UNSET:
        raise _twice("the accelerate file", "dynamo_config", "set", "train.compile")
    config = config_file()
    for key, value in {**config, **config.get("zero_optimization", {})}.items():
        default = key == "gradient_predivide_factor" and value == 1
        if key in DEEPSPEED_NUMBERS and not default and _says_something(value):
            raise _twice("the DeepSpeed configuration", key, value, DEEPSPEED_NUMBERS[key])


def _says_something(value: object) -> bool:
    """Whether a value of DeepSpeed's configuration says more than that others should decide."""
    if isinstance(value, dict):
        on = value.get("enabled", True) is True
        return on and any(_says_something(inner) for inner in value.values())
    return value not in ("auto", None) and value is not False


def _twice(where: str, key: str, value: object, ours: str) -> MallowsPOError:
    return MallowsPOError(
        f"{where} sets {key} ({value}), which belongs to the recipe ({ours}). Take it out there."
    )


def check_deepspeed(recipe: Recipe, stage: int) -> None:
    """Refuse what DeepSpeed could do and this trainer cannot: other stages than 2 and 3, NVMe,
    8-bit states.
    """
    if stage not in (2, 3):
        raise MallowsPOError(
            f"the launcher's file asks for ZeRO stage {stage}; this trainer takes 2 and 3. "
            "Without sharding: recipes/accelerate/ddp.yaml."
        )
    zero = config_file().get("zero_optimization", {})
    devices = [os.environ.get(variable, "none") for variable in OFFLOAD.values()]
    devices += [zero.get(part, {}).get("device", "none") for part in OFFLOAD]
    if "nvme" in devices:
        raise MallowsPOError(
            "the launcher's file offloads to NVMe, from which this trainer cannot write "
            "checkpoints. Take cpu (recipes/accelerate/zero3_offload.yaml)."
        )
    if recipe.train.optimizer is Optimizer.adamw_8bit:
        raise no_8bit("DeepSpeed")


def no_8bit(engine: str) -> MallowsPOError:
    """The error of `train.optimizer=adamw_8bit` under an engine that shards states."""
    return MallowsPOError(
        f"train.optimizer=adamw_8bit keeps its states in blocks, which {engine} cannot deal out. "
        "Take train.optimizer=adamw, whose states are sharded."
    )


def flag(variable: str) -> bool:
    """Whether a launcher's variable says yes; unset says no."""
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")
