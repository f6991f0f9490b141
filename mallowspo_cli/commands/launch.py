"""What a launcher (accelerate, torchrun, srun) said, checked against the recipe, and what is made
of it.

What changes the numbers is in the recipe, what changes only the speed is in the launcher's file.
Clipping, precision and batch size go from the recipe into DeepSpeed's configuration here; a
launcher's file that sets one of them is refused, since nobody could tell which of the two holds.
"""

import logging
import os
import re
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import FullyShardedDataParallelPlugin, InitProcessGroupKwargs

from mallowspo_cli.commands.launcher_files import (
    DEEPSPEED_NUMBERS,
    OFFLOAD,
    check_deepspeed,
    check_file,
    config_file,
    flag,
    no_8bit,
    zero_stage,
)
from mallowspo_cli.distributed import world_size
from mallowspo_cli.errors import MallowsPOError, RecipeError, first_line
from mallowspo_cli.plan.hardware import TABLE, Hardware
from mallowspo_cli.recipe.choices import Optimizer, Precision
from mallowspo_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class Launch:
    """How this process was started."""

    processes: int
    """Of the whole launch, over all machines."""
    deepspeed: bool
    """Whether DeepSpeed trains."""
    zero_stage: int
    """2 or 3 with DeepSpeed, else 0."""
    fsdp: bool
    """Whether FSDP2 trains."""
    cuda: bool
    """Whether there are GPUs."""

    @property
    def sharded(self) -> bool:
        """Whether no process holds all weights."""
        return self.fsdp or (self.deepspeed and self.zero_stage == 3)


def read_launch(recipe: Recipe) -> Launch:
    """What the launcher said.

    Raises:
        RecipeError: the recipe's batch cannot be dealt to its processes.
        MallowsPOError: its file sets what the recipe sets, or asks for what cannot run here.
    """
    _from_slurm()
    processes, cuda = world_size(), torch.cuda.is_available()
    if not cuda:
        # Else DeepSpeed, where it is installed, looks for a GPU and says that there is none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed, fsdp = flag("ACCELERATE_USE_DEEPSPEED"), flag("ACCELERATE_USE_FSDP")
    batch = recipe.train.global_batch_size
    if batch % processes:
        below, above = batch // processes * processes, -(-batch // processes) * processes
        nearest = f"{below}, {above}" if below else f"{above}"
        raise RecipeError(
            f"train.global_batch_size={batch} is not a multiple of {processes} processes. "
            f"Nearest: {nearest}."
        )
    check_file(recipe)
    if fsdp and not cuda:
        raise MallowsPOError(
            "FSDP needs GPUs: without one accelerate leaves the model whole and its processes "
            "train apart. On a CPU take recipes/accelerate/cpu_zero3.yaml or ddp.yaml."
        )
    if fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise MallowsPOError(
            "the accelerate file asks for FSDP version 1; this trainer takes version 2 "
            "(fsdp_version: 2, as in recipes/accelerate/fsdp2.yaml)."
        )
    stage = zero_stage() if deepspeed else 0
    if deepspeed:
        _need_deepspeed()
        check_deepspeed(recipe, stage)
    if fsdp and recipe.train.optimizer is Optimizer.adamw_8bit:
        raise no_8bit("FSDP")
    return Launch(processes, deepspeed, stage, fsdp, cuda)


def make_accelerator(
    launch: Launch, recipe: Recipe, directory: Path, trackers: list[str]
) -> Accelerator:
    """The accelerator of a launch; under ZeRO-3 models that load after this are sharded.

    Raises:
        MallowsPOError: the processes do not find one another.
    """
    bf16 = recipe.train.precision is Precision.bf16
    # The watch over the run ends it first, and says where each process was.
    timeout = timedelta(seconds=(recipe.train.hang_seconds or 24 * 3600) + 120)
    backend = None if launch.cuda else "gloo"
    group = InitProcessGroupKwargs(backend=backend, timeout=timeout)
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if bf16 else "no",
            cpu=not (launch.cuda or launch.deepspeed),
            deepspeed_plugin=_plugin(launch, recipe) if launch.deepspeed else None,
            fsdp_plugin=_fsdp_plugin(bf16) if launch.fsdp else None,
            kwargs_handlers=[group] if launch.processes > 1 or launch.deepspeed else None,
            log_with=list(trackers) or None,  # type: ignore[arg-type]
            project_dir=str(directory),
        )
    except (ValueError, RuntimeError) as error:
        raise MallowsPOError(
            f"{launch.processes} processes were launched, which do not find one another: "
            f"{first_line(error)}. Start them by `accelerate launch` with a file of "
            "recipes/accelerate, or by torchrun."
        ) from error
    if accelerator.num_processes != launch.processes:
        raise MallowsPOError(
            f"{launch.processes} processes were launched, but this one sees "
            f"{accelerator.num_processes}: they would train apart. Start them by `accelerate "
            "launch` with a file of recipes/accelerate, or by torchrun."
        )
    return accelerator


def own_peak(precision: Precision) -> float | None:
    """FLOP/s of this process's GPU on paper; None where there is none, or none of plan's table."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    found = [device for device in TABLE if device.pattern in name]
    return Hardware(found[0]).peak(precision) if found else None


def _plugin(launch: Launch, recipe: Recipe) -> DeepSpeedPlugin:
    """DeepSpeed's configuration: the launcher's words on speed, the recipe's on numbers."""
    given = config_file()
    zero = {
        "stage": launch.zero_stage,
        "overlap_comm": launch.cuda,
        "contiguous_gradients": True,
        **{
            part: {"device": device, "pin_memory": launch.cuda}
            for part, variable in OFFLOAD.items()
            if (device := os.environ.get(variable, "none")) != "none"
        },
    }
    if launch.zero_stage == 3 and not launch.cuda:
        # On a CPU it is for trying things: small models are sharded too.
        zero["stage3_param_persistence_threshold"] = 0
    config = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Many packs of a step are added up; in bfloat16 the later ones would be rounded away.
        "data_types": {"grad_accum_dtype": "fp32"},
        # What is left of these says nothing, and DeepSpeed does not know `auto`.
        **{key: value for key, value in given.items() if key not in DEEPSPEED_NUMBERS},
        "zero_optimization": {**zero, **given.get("zero_optimization", {})},
        "bf16": {"enabled": recipe.train.precision is Precision.bf16},
        "gradient_clipping": recipe.train.max_grad_norm,
        # The loop accumulates by itself and divides by pairs, so these are one everywhere.
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": launch.processes,
    }
    # What they said is in `config`; accelerate would refuse to hear it twice.
    for variable in ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_CONFIG_DS_FIELDS"):
        os.environ.pop(variable, None)
    return DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=launch.zero_stage == 3)


def _fsdp_plugin(bf16: bool) -> FullyShardedDataParallelPlugin:
    """What the launcher said; in bf16 gradients are reduced and added up in float32."""
    if not bf16:
        return FullyShardedDataParallelPlugin()
    single, half = torch.float32, torch.bfloat16
    policy = {"param_dtype": half, "reduce_dtype": single, "output_dtype": single}
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def _need_deepspeed() -> None:
    # It calls torch by older names at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        import deepspeed
    except ImportError as error:
        raise MallowsPOError(
            "this launch asks for DeepSpeed, which is not installed: "
            "pip install 'mallowspo[deepspeed]'"
        ) from error
    # It warns that it cannot look into what the scorer returns, which has no weights of its own.
    logging.getLogger("DeepSpeed").addFilter(lambda it: "unknown inputs" not in it.getMessage())
    if not torch.cuda.is_available():
        # Its own operator for collectives on a CPU takes a minute or more to compile; gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _from_slurm() -> None:
    """A process that srun started by itself, without a launcher in between: torch's variables."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in os.environ or tasks == 1:
        return
    job = int(re.sub(r"\D", "", os.environ.get("SLURM_JOB_ID", "0")) or 0)
    found = {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": first_host(os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        # The same in every process of a job, and another in another job.
        "MASTER_PORT": str(20000 + job % 20000),
    }
    for name, value in found.items():
        os.environ.setdefault(name, value)


def first_host(nodes: str) -> str:
    """The first name of Slurm's list of nodes: gpu[003-004,7],cpu1 begins with gpu003."""
    listed = re.match(r"([^,\[]+)(?:\[([^\]]+)\]([^,]*))?", nodes)
    if listed is None:
        return nodes
    stem, numbers, rest = listed.groups()
    return stem if numbers is None else stem + re.split(r"[-,]", numbers)[0] + rest
