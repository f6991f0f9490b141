"""Bytes of one process: weights and optimizer, what the backward pass needs, and the peak.

What a block keeps of each token, in bytes, by what it computes in. d is the width of the stream
between blocks; q, kv and f are those of queries, of keys with values, and of the MLP; H heads. A
tensor that two operators keep is one.

                                                     fp32   bf16 by    bf16 weights
                                                            autocast   (ZeRO-3)
    norm: its input, in float32                        4       4           4           d
    norm: normalised, before the weight                4       4           2           d
    its result, which matrices read                    4    2 for each     2           d
    queries; result of attention                       4       2           2           q, q
    keys and values                                    4       2           2           kv
    keys and values that rejected responses see too    4       2           2           kv
    log-sum-exp                                        4       4           4           H
    gate, activated gate, up, their product            4       2           2           f each
    on a CPU, result of attention by segment           4       2           2           q
    on a CPU, masks of rejected responses              4       2           2           entries

Derived from transformers' Llama block in plain torch; tests compare the peak with the live tensors
of a training step. Other architectures by the shapes of their parameters: a norm that is one
operator keeps its input, and an activation what it is seen to keep. Frozen weights keep no
normalised states. Compiled or fused kernels keep less. Attention with capped scores, which a CPU
computes with all scores at once, keeps more there.
"""

from dataclasses import dataclass, replace

from mallowspo_cli.models import head as output_layer
from mallowspo_cli.plan.setting import HALF, MOMENTS, SINGLE, PackSize, Setting
from mallowspo_cli.plan.shapes import BlockShape, ModelShape
from mallowspo_cli.recipe.choices import ActivationCheckpointing

LIVE_BLOCKS = 2
"""Blocks whose weights ZeRO-3 holds whole at a time."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, by part."""

    when: str
    weights: float
    gradients: float
    optimizer: float
    copies: float = 0.0
    """Of weights: in bf16, made by autocast, or gathered by ZeRO-3."""
    activations: float = 0.0
    """What blocks keep for the backward pass, and what one of them has computed again."""
    head: float = 0.0
    """The output layer: its inputs, logits, and its gradient before it is added up."""
    working: float = 0.0
    """Gradients on their way through a block."""

    @property
    def peak(self) -> float:
        """The sum."""
        states = self.weights + self.gradients + self.optimizer
        return states + self.copies + self.activations + self.head + self.working


def peak_memory(
    shape: ModelShape, setting: Setting, pack: PackSize, checkpointing: ActivationCheckpointing
) -> Memory:
    """The peak of a step of at least two packs as large as `pack`: gradients lie there throughout.

    The larger of four moments: forward and backward pass of the output layer, when all blocks keep
    what they keep; the backward pass of a block, which may have to compute it again first; and the
    embedding's gradient at the end.
    """
    states = state_memory(shape, setting)
    kept = [block_bytes(b, setting, pack, checkpointing, not shape.adapters) for b in shape.blocks]
    largest = max(shape.blocks, key=lambda block: block.parameters)
    again = block_bytes(largest, setting, pack, ActivationCheckpointing.none, not shape.adapters)
    final_norm = (
        pack.tokens * shape.hidden * (SINGLE + (setting.stream if not shape.adapters else 0))
    )
    everything = sum(kept) + final_norm
    is_kept = checkpointing is ActivationCheckpointing.none
    all_copies, one_copy = _copies(shape, setting, whole=True), _copies(shape, setting, whole=False)
    last_copies = all_copies if is_kept else one_copy
    head = head_bytes(shape, setting, pack)
    table = SINGLE * shape.vocab * shape.hidden if not shape.adapters else 0.0
    moments = [
        replace(
            states,
            when="output layer, forward",
            copies=all_copies + _head_copy(shape, setting),
            activations=everything,
            head=head.forward,
        ),
        replace(
            states,
            when="output layer, backward",
            copies=last_copies + _head_copy(shape, setting),
            activations=everything,
            head=head.backward,
        ),
        replace(
            states,
            when="a block, backward",
            copies=last_copies,
            activations=sum(kept) - max(kept) + again,
            working=_working(largest, shape, setting, pack),
        ),
        replace(states, when="embedding's gradient", working=table),
    ]
    return max(moments, key=lambda moment: moment.peak)


def state_memory(shape: ModelShape, setting: Setting) -> Memory:
    """Weights, gradients and the optimizer's states of one process, and nothing else.

    Bytes a parameter with AdamW, of which a process of ZeRO-3 has a G-th:

        one process                     4 + 4 + 8     float32 weights, gradients, two moments
        ZeRO-3, train.precision=bf16    2 + 4 + 12    gradients of packs are added up in float32;
                                                      masters beside the moments
        ZeRO-3, train.precision=fp32    4 + 4 + 8

    Frozen weights take the first number alone.
    """
    number = setting.compute if setting.sharded else SINGLE
    states = MOMENTS[setting.optimizer] + (SINGLE if number < SINGLE else 0)
    share = 1 / setting.world_size
    return Memory(
        when="states",
        weights=number * shape.parameters * share,
        gradients=SINGLE * shape.trained * share,
        optimizer=states * shape.trained * share,
    )


def block_bytes(
    block: BlockShape,
    setting: Setting,
    pack: PackSize,
    checkpointing: ActivationCheckpointing,
    trained: bool = True,
) -> float:
    """What a block keeps of a pack: the table above; full: its input; selective: its input, the
    results of its matrices, and of attention.

    `trained` says whether its own weights are, or adapters.
    """
    tokens, number, stream = pack.tokens, setting.compute, setting.stream
    if checkpointing is ActivationCheckpointing.full:
        return tokens * block.hidden * stream
    attended = tokens * (block.queries * number + SINGLE * block.heads)
    if checkpointing is ActivationCheckpointing.selective:
        # Adapters' results are products of their own, as wide as those they are added to.
        results = block.outputs * (1 if trained else 2)
        return tokens * (block.hidden * stream + results * number) + attended
    norms = block.norms * (SINGLE + (stream if trained else 0)) + block.fused_norms * stream
    inputs = block.inputs if setting.casts else block.shared_inputs
    attention = block.queries + block.keys + block.unrotated
    widths = inputs + block.last_inputs + attention + block.activations
    again = pack.seen_again * block.keys * number
    if setting.cpu and block.queries:
        again += (pack.rejected * block.keys + tokens * block.queries + pack.mask_entries) * number
    return tokens * (norms + widths * number + SINGLE * block.heads) + again


@dataclass(frozen=True)
class HeadBytes:
    """Of the output layer, beside its weight."""

    forward: float
    backward: float


def head_bytes(shape: ModelShape, setting: Setting, pack: PackSize) -> HeadBytes:
    """Bytes of the output layer: its inputs and their gradients, kept logits, a chunk of logits in
    work, and the weight's gradient (a float32 sum, and its copy in the type of the weight).
    """
    number, vocab = setting.compute, shape.vocab
    rows = pack.targets * shape.hidden * number
    at_once = max(1, output_layer.CHUNK_BYTES[setting.device] // (vocab * SINGLE))
    chunk = min(pack.targets, at_once) * vocab
    kept = min(pack.targets * vocab * number, output_layer.KEPT_BYTES[setting.device])
    if shape.adapters:
        # The gradient of each input is formed in the forward pass.
        work = chunk * (number + (SINGLE if setting.cpu else 0))
        return HeadBytes(2 * rows + work, 3 * rows)
    # Logits that are kept are not overwritten: on a CPU by a copy in float32.
    copy = chunk * (SINGLE + (number if number < SINGLE else 0) if setting.cpu else number)
    sums = SINGLE if number == SINGLE else SINGLE + HALF
    gradient = sums * vocab * shape.hidden
    logits = kept + copy
    return HeadBytes(rows + logits, 2 * rows + logits + gradient)


def _copies(shape: ModelShape, setting: Setting, whole: bool) -> float:
    """Copies of the blocks' weights: of all of them, or of those in work."""
    sizes = sorted((block.parameters for block in shape.blocks), reverse=True)
    if setting.sharded:
        return setting.compute * sum(sizes[:LIVE_BLOCKS])
    return HALF * (sum(sizes) if whole else sizes[0]) if setting.casts else 0.0


def _head_copy(shape: ModelShape, setting: Setting) -> float:
    copied = setting.sharded or setting.casts
    return setting.compute * shape.vocab * shape.hidden if copied else 0.0


def _working(block: BlockShape, shape: ModelShape, setting: Setting, pack: PackSize) -> float:
    """Gradients in a block: two of the widest, or one with that of a weight; and the stream's."""
    wide = pack.tokens * block.widest * setting.compute
    sums = setting.compute + (SINGLE if setting.casts else 0)
    weight = block.largest * sums if not shape.adapters else 0.0
    return wide + max(wide, weight) + pack.tokens * block.hidden * setting.stream
