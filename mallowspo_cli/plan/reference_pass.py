"""Bytes of a process in the reference pass: the whole frozen model, in every process.

Nothing is dealt out there, and nothing is sent: each process takes blocks of pairs. What a layer
has computed goes when the next one has its input, so a process holds, in `model.dtype` (b bytes a
number) and in what matrices are multiplied in (n bytes, 2 where autocast makes copies),

    weights           b for each parameter, adapters left out
    in a block        3 b d (its input, what attention added to, and normalised) and n for each
                      number that its MLP computes, for each token
    or behind it      2 b d for each token, b d for each response token, and a chunk of logits

Derived as in `memory.py`; a test compares it with the live tensors of a pass (10 %).
"""

from dataclasses import replace

from mallowspo_cli.models import head as output_layer
from mallowspo_cli.plan.memory import Memory
from mallowspo_cli.plan.setting import HALF, SINGLE, PackSize, Setting
from mallowspo_cli.plan.shapes import ModelShape
from mallowspo_cli.recipe.choices import Dtype


def reference_memory(shape: ModelShape, setting: Setting, dtype: Dtype, pack: PackSize) -> Memory:
    """The peak of the pass over packs of that size; `dtype` is the recipe's `model.dtype`."""
    stored = HALF if dtype is Dtype.bfloat16 else SINGLE
    number = min(stored, setting.compute)
    copied = HALF if number < stored else 0
    parameters = shape.parameters - (shape.trained if shape.adapters else 0)
    states = Memory("states", weights=stored * parameters, gradients=0.0, optimizer=0.0)
    block = max(shape.blocks, key=lambda each: each.activations + each.widest)
    stream = pack.tokens * shape.hidden * stored
    rows = pack.targets * shape.hidden * (stored + copied)
    moments = [
        replace(
            states,
            when="a block",
            copies=copied * block.largest,
            activations=3 * stream + pack.tokens * (block.activations + block.widest) * number,
        ),
        replace(
            states,
            when="output layer",
            copies=copied * shape.vocab * shape.hidden,
            activations=2 * stream,
            head=rows + _chunk_bytes(shape, setting, number, pack),
        ),
    ]
    return max(moments, key=lambda moment: moment.peak)


def _chunk_bytes(shape: ModelShape, setting: Setting, number: int, pack: PackSize) -> float:
    """A chunk of logits; on a CPU its exponentials too, and copies of both in float32."""
    most = max(1, output_layer.CHUNK_BYTES[setting.device] // (shape.vocab * SINGLE))
    chunks = max(1, -(-pack.targets // most))
    logits = pack.targets / chunks * shape.vocab
    if not setting.cpu:
        return logits * number
    return logits * (2 * SINGLE + (number if number < SINGLE else 0))
