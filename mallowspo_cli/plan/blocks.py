"""What stands in a transformers block, seen from the shapes of its parameters."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.pytorch_utils import Conv1D

from mallowspo_cli.errors import ModelError
from mallowspo_cli.models.flops import experts_of_a_token


@dataclass(frozen=True)
class Matrix:
    """Widths of a matrix of a linear layer, as a token sees them, and its parameters."""

    inputs: int
    outputs: int
    size: int


@dataclass(frozen=True)
class Group:
    """Matrices of one module: those that read the stream, and the one that leads back to it."""

    first: tuple[Matrix, ...]
    last: Matrix

    @property
    def widths(self) -> tuple[int, int]:
        """Inputs of the last, and what goes into them."""
        return self.last.inputs, sum(matrix.outputs for matrix in self.first)

    def kept_before_last(self, by_activation: int) -> int:
        """Width of what an MLP keeps beside its last matrix's input; `by_activation` tensors are
        kept to differentiate what is activated.
        """
        last, before = self.widths
        gated = before >= 2 * last
        return last * (by_activation + 2 if gated else by_activation) if before else 0


def blocks_of(backbone: nn.Module) -> list[nn.Module]:
    """The modules of the longest list by parameters."""
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(backbone).__name__} has no list of blocks, so it has no plan.")
    return list(max(lists, key=lambda each: sum(p.numel() for p in each.parameters())))


def groups_of(block: nn.Module, config: Any) -> list[Group]:
    """A block's matrices by module, in the order of their definition; adapters left out."""
    found: dict[str, list[Matrix]] = {}
    for name, parameter in block.named_parameters():
        if parameter.ndim not in (2, 3) or ".lora_" in name:
            continue
        path = name.removesuffix(".weight").removesuffix(".base_layer")
        module = block.get_submodule(name.rpartition(".")[0])
        matrices = found.setdefault(path.rpartition(".")[0], [])
        rows, columns = parameter.shape[-2:]
        if parameter.ndim == 3:
            # Experts of a layer, of which a token uses a few; either way round.
            used = experts_of_a_token(config, len(parameter))
            size = used * rows * columns
            inner, outer = used * config.hidden_size, size // config.hidden_size
            matrices.append(Matrix(*((outer, inner) if matrices else (inner, outer)), size))
        elif isinstance(module, Conv1D):
            matrices.append(Matrix(rows, columns, parameter.numel()))
        else:
            matrices.append(Matrix(columns, rows, parameter.numel()))
    return [_group(matrices, config.hidden_size) for matrices in found.values()]


def _group(matrices: list[Matrix], hidden: int) -> Group:
    back = [index for index, matrix in enumerate(matrices) if matrix.outputs == hidden]
    last = back[-1] if back else len(matrices) - 1
    return Group((*matrices[:last], *matrices[last + 1 :]), matrices[last])


def kept_by_activation(block: nn.Module) -> int:
    """Tensors that a block's activation function keeps for its backward pass, its result left out:
    one where it is one operator, more where it is written out in Python.
    """
    places = (activations.__name__, nn.SiLU.__module__)
    found = next((m for m in block.modules() if type(m).__module__ in places), None)
    if found is None:
        return 1
    kept: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() == len(probe):
            kept.add(tensor.untyped_storage().data_ptr())
            held.append(tensor)
        return tensor

    held: list[Tensor] = []
    probe = torch.zeros(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = found(probe)
    return len(kept - {result.untyped_storage().data_ptr()})


def norms_of(
    block: nn.Module, hidden: int, head_dim: int, per_head: float
) -> Iterator[tuple[float, bool]]:
    """The width of each norm of a block, and whether it is one operator."""
    for module in block.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1:
            width = len(weight)
            # A norm within heads runs over all heads of the queries, or of the keys.
            over = per_head if width == head_dim != hidden else float(width)
            yield over, isinstance(module, (nn.LayerNorm, nn.RMSNorm))
