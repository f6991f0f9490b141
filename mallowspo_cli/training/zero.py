"""DeepSpeed's ZeRO-2 and ZeRO-3 as the loop's engine.

DeepSpeed clips and steps by itself, and keeps float32 masters in flat buffers of its own. Where a
process's parts lie in them is read from its fields, which tests of two processes hold in place.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from mallowspo_cli.models.flops import whole_shape
from mallowspo_cli.training.engine import Engine, state_tensors
from mallowspo_cli.training.pieces import WEIGHT, Piece, Pieces


class ZeroEngine(Engine):
    """DeepSpeed: ZeRO-2 (gradients and optimizer states are sharded) and ZeRO-3 (weights too)."""

    casts = True

    def __init__(self, accelerator: Accelerator, scorer: nn.Module, optimizer: Any):
        super().__init__(accelerator, scorer, optimizer)
        self.engine: Any = scorer
        self.zero: Any = self.engine.optimizer
        self.stage = self.engine.zero_optimization_stage()
        """2 or 3."""

    @property
    def sharded(self) -> bool:
        """Whether no process holds whole weights; small ones that DeepSpeed keeps do not count."""
        if self.stage < 3:
            return False
        parameters = list(self.bare_scorer.parameters())
        kept = [p for p in parameters if p.numel() > 0]
        return len(kept) < len(parameters) and all(p.ds_persist for p in kept)

    @property
    def _joined(self) -> bool:
        return True

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return self.zero.optimizer

    def release(self) -> None:
        """DeepSpeed keeps its buffers to the end of the process."""

    @property
    def kind(self) -> str:
        """Its name."""
        return f"ZeRO-{self.stage}"

    def forward_context(self, last: bool) -> Any:
        """Tells the engine whether this pack ends the step."""
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a pack's gradients, reduced onto the process that updates them."""
        self.engine.backward(loss)

    def step(self, max_norm: float) -> float:
        """DeepSpeed clips (by its configuration) and steps; it skips a norm that is not finite."""
        self.engine.step()
        if self.zero.overflow:
            return math.inf
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else math.inf

    def pieces(self) -> Iterator[Piece]:
        """The float32 masters and optimizer states that this process updates."""
        for name, parameter, start, count, flat, place in self._held():
            tensors = {WEIGHT: flat, **state_tensors(self.zero.optimizer.state.get(flat, {}))}
            for kind, tensor in tensors.items():
                values = tensor.narrow(0, place, count)
                yield Piece(kind, name, start, whole_shape(parameter), values.detach())

    def load(self, pieces: Pieces, step: int) -> None:
        """Masters, optimizer states, and the working weights that are made of the masters."""
        state = self.zero.optimizer.state
        for name, parameter, start, count, flat, place in self._held():
            values = pieces.read(WEIGHT, name, start, count)
            with torch.no_grad():
                flat.narrow(0, place, count).copy_(values)
                if self.stage == 3:
                    parameter.ds_tensor.narrow(0, 0, count).copy_(values)  # type: ignore[attr-defined]
            if step == 0:
                continue
            if flat not in state:
                kinds = pieces.kinds(name)
                state[flat] = {kind: torch.zeros_like(flat) for kind in kinds}
                state[flat]["step"] = self._step_count(step, flat.device)
            for kind in pieces.kinds(name):
                state[flat][kind].narrow(0, place, count).copy_(
                    pieces.read(kind, name, start, count)
                )
        self._refresh(pieces)

    def _refresh(self, pieces: Pieces) -> None:
        """Bring what the working weights hold beside the masters up to date."""
        if self.stage == 3:
            kept = [p for p in self.trainable.values() if p.ds_persist]  # type: ignore[attr-defined]
            if kept:
                kept[0].all_gather(kept)  # type: ignore[attr-defined]
            return
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(pieces.read(WEIGHT, name).view_as(parameter))

    def _held(self) -> Iterator[tuple[str, nn.Parameter, int, int, Tensor, int]]:
        """For each parameter that this process updates a part of: name, parameter, where the part
        begins in it, its elements, the flat buffer of masters that it lies in, and where there.
        """
        rank = self.accelerator.process_index
        for name, parameter in self.trainable.items():
            shaped: Any = parameter
            if self.stage == 3:
                group, place, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
                start = rank * size
                # The last processes' parts are filled up.
                count = min(size, shaped.ds_numel - start)
                flat = self.zero.fp32_partitioned_groups_flat[group]
            else:
                mapping = shaped._hp_mapping
                if mapping is None:
                    continue
                start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                place = mapping.hp_fragment_address.start
                flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
            if count > 0:
                yield name, parameter, start, count, flat, place

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        whole = safe_get_full_fp32_param(parameter)
        assert whole is not None
        return whole.view(whole_shape(parameter))


def engine_of(accelerator: Accelerator, scorer: nn.Module, optimizer: Any) -> Engine:
    """The engine of what the accelerator prepared."""
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        return ZeroEngine(accelerator, scorer, optimizer)
    return Engine(accelerator, scorer, optimizer)
