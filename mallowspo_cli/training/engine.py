"""How a run's weights, gradients and optimizer states lie over its processes.

The loop knows one interface. `Engine` itself is one process, DDP (every process holds everything)
and FSDP2 (rows of every tensor); `zero.py` has DeepSpeed's ZeRO-2 and ZeRO-3.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from mallowspo_cli.errors import MallowsPOError
from mallowspo_cli.models.flops import whole_shape
from mallowspo_cli.training.pieces import WEIGHT, Piece, Pieces


class Engine:
    """Weights in float32 that are whole in every process, or rows of them (FSDP2)."""

    casts = False
    """Whether the weights that it computes with are in train.precision, beside the masters."""

    def __init__(self, accelerator: Accelerator, scorer: nn.Module, optimizer: Any):
        self.accelerator = accelerator
        self.scorer = scorer
        """The model as the engine wraps it: what is called."""
        self.optimizer = optimizer

    @property
    def bare_scorer(self) -> Any:
        """The scorer without what the engine wraps it in."""
        return self.accelerator.unwrap_model(self.scorer)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """What is trained, by its name in the bare scorer."""
        named = self.bare_scorer.named_parameters()
        return {name: p for name, p in named if p.requires_grad}

    @property
    def sharded(self) -> bool:
        """Whether no process holds whole weights."""
        return any(isinstance(p, DTensor) for p in self.trainable.values())

    def broadcast(self, value: Any) -> Any:
        """The main process's value, in every process."""
        values = [value]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(values)
        return values[0]

    def set_learning_rate(self, rate: float) -> None:
        """The learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def forward_context(self, last: bool) -> Any:
        """Around forward and backward of a pack: processes add their gradients up at the last."""
        return nullcontext() if last else self.accelerator.no_sync(self.scorer)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a pack's gradients; after the `last` they are the mean over processes."""
        self.accelerator.backward(loss)

    def step(self, max_norm: float) -> float:
        """Clip to `max_norm` (0: not at all) and update; returns the gradient's global norm before
        clipping. Where it is not finite nothing is updated.
        """
        total: Any = nn.utils.clip_grad_norm_(
            list(self.trainable.values()), max_norm if max_norm > 0 else math.inf
        )
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def pieces(self) -> Iterator[Piece]:
        """This process's part of weights and optimizer states, for a checkpoint.

        What all processes hold is written by each for an equal share of its elements.
        """
        state = self._inner_optimizer.state
        for name, parameter in self.trainable.items():
            tensors = {WEIGHT: parameter, **state_tensors(state.get(parameter, {}))}
            for kind, tensor in tensors.items():
                yield from self._written(kind, name, tensor)

    def _written(self, kind: str, name: str, tensor: Tensor) -> Iterator[Piece]:
        local, start, copy = _local(tensor)
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        if isinstance(tensor, DTensor):
            if copy == 0 and local.numel():
                yield Piece(kind, name, start, tuple(tensor.shape), local.detach().flatten())
            return
        each = -(-local.numel() // processes)
        mine = local.detach().flatten()[rank * each : (rank + 1) * each]
        if mine.numel():
            yield Piece(kind, name, rank * each, tuple(tensor.shape), mine)

    def load(self, pieces: Pieces, step: int) -> None:
        """Take this process's part out of a checkpoint that was written after `step` steps."""
        state = self._inner_optimizer.state
        for name, parameter in self.trainable.items():
            local, start, _ = _local(parameter)
            with torch.no_grad():
                values = pieces.read(WEIGHT, name, start, local.numel())
                local.copy_(values.view_as(local))
            if step == 0:
                continue
            state[parameter] = {"step": self._step_count(step, local.device)}
            for kind in pieces.kinds(name):
                state[parameter][kind] = self._like(parameter, pieces, kind, name)

    def _like(self, parameter: Tensor, pieces: Pieces, kind: str, name: str) -> Tensor:
        """An optimizer state as it lay in the checkpoint, distributed as its parameter."""
        shape = pieces.shapes[kind, name]
        if shape != tuple(parameter.shape):
            # Blocks of an 8-bit state, which have a shape of their own.
            return pieces.read(kind, name).view(shape).to(parameter.device)
        local, start, _ = _local(parameter)
        values = pieces.read(kind, name, start, local.numel()).view_as(local).to(local.device)
        if not isinstance(parameter, DTensor):
            return values
        return DTensor.from_local(
            values,
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def _step_count(self, step: int, device: torch.device) -> Any:
        """The count of steps as the optimizer would have it after them."""
        optimizer = self._inner_optimizer
        if not type(optimizer).__module__.startswith("torch."):
            # bitsandbytes counts in integers.
            return step
        on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        return torch.tensor(float(step), device=device if on_device else "cpu")

    @property
    def optimizer_name(self) -> str:
        """Class of the optimizer, by which a checkpoint's states are known."""
        return type(self._inner_optimizer).__name__

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        if isinstance(self.optimizer, AcceleratedOptimizer):
            return self.optimizer.optimizer
        return self.optimizer

    def whole_weights(self, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """Everything that is trained, by name, on the CPU of the main process; None in the others.

        A tensor at a time: no other process holds more than one whole.
        """
        gathered: dict[str, Tensor] = {}
        for name, parameter in self.trainable.items():
            whole = self._whole(parameter)
            if self.accelerator.is_main_process:
                gathered[name] = whole.detach().to(dtype=dtype, device="cpu", copy=True)
        return gathered if self.accelerator.is_main_process else None

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

    def describe(self) -> dict[str, Any]:
        """What it is, for a run's environment.json."""
        return {
            "kind": self.kind,
            "weights": sum(prod(whole_shape(p)) for p in self.trainable.values()),
            "weights_of_a_process": sum(_local(p)[0].numel() for p in self.trainable.values()),
        }

    @property
    def kind(self) -> str:
        """Its name."""
        if self.sharded:
            return "FSDP2"
        return "DDP" if self.accelerator.num_processes > 1 else "one process"

    def check(self, sharded: bool) -> None:
        """Make sure that the launch is what it says: its processes add up, its model is sharded.

        Raises:
            MallowsPOError: they do not, or it is not.
        """
        accelerator = self.accelerator
        one = torch.ones((), device=accelerator.device)
        total = accelerator.reduce(one, reduction="sum")
        if int(total) != accelerator.num_processes:  # type: ignore[arg-type]
            raise MallowsPOError(
                f"{accelerator.num_processes} processes, of which {int(total)} add up: "  # type: ignore[arg-type]
                "they would train apart."
            )
        if not self._joined:
            raise MallowsPOError(
                f"{accelerator.num_processes} processes, but accelerate left the model as it was: "
                "their gradients would never meet. Launch by torchrun, or with a file of "
                "recipes/accelerate."
            )
        if sharded and not self.sharded:
            raise MallowsPOError(
                "the accelerate file asks for a sharded model, but every process holds it whole."
            )

    @property
    def _joined(self) -> bool:
        """Whether something adds up the processes' gradients."""
        alone = self.accelerator.num_processes == 1
        return alone or isinstance(self.scorer, DistributedDataParallel) or self.sharded

    def release(self) -> None:
        """Give the device's memory back; nothing can be trained after this."""
        self._inner_optimizer.state.clear()
        self.scorer.to("cpu")


def state_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """An optimizer's states of a parameter; the count of steps is the run's own."""
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and k != "step"}


def _local(tensor: Tensor) -> tuple[Tensor, int, int]:
    """What this process holds of a tensor: the elements, where they begin in the whole, and which
    of several copies they are.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0, 0
    local, mesh = tensor.to_local().detach(), tensor.device_mesh
    start = copy = 0
    for dimension, placement in enumerate(tensor.placements):
        place = mesh.get_local_rank(dimension)
        if isinstance(placement, Shard):
            assert placement.dim == 0
            # As torch.chunk cuts: rows of equal number, of which the last process may lack some.
            rows = -(-tensor.shape[0] // mesh.size(dimension))
            start = min(place * rows, tensor.shape[0]) * prod(tensor.shape[1:])
        else:
            copy += place
    return local, start, copy
