"""Log-probs of response tokens, and entropies, without ever holding all logits.

`LogprobHead` stands in the place of a model's output layer. With targets it returns, for N hidden
states, log p(target) and the entropy of the whole next-token distribution, a chunk of rows at a
time. The weight is reached by the module's own forward, so that engines which gather parameters
around a module's call (ZeRO-3, FSDP) need nothing special.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mallowspo_cli.errors import ModelError
from mallowspo_cli.models.logits import (
    LogitTransform,
    log_collisions,
    logit_gradients,
    row_statistics,
)

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**29}
"""Float32 logits that exist at a time, by type of device. On a CPU they stay near its cache; on a
GPU matrix products want many rows."""
KEPT_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""Logits of a pack that are kept for the backward pass, which computes those of the other rows
again."""


class TokenStatistics(NamedTuple):
    """Per token, float32 (float64 for float64 input), nats."""

    logps: Tensor
    """(N,) log-prob of the target token."""
    entropies: Tensor | None
    """(N,) entropy of the next-token distribution, without a gradient; None unless asked for."""
    log_collisions: Tensor | None = None
    """(N,) log sum_v p_v^2 of that distribution, without a gradient; None unless asked for."""


class LogprobHead(nn.Linear):
    """A linear output layer that can also score targets."""

    transform = LogitTransform()
    """What the model does to this layer's result."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, transform: LogitTransform = transform) -> "LogprobHead":
        """A head that shares the parameters of `linear`."""
        with torch.device("meta"):
            head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        head.weight, head.bias = linear.weight, linear.bias
        head.transform = transform
        return head.train(linear.training)

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        entropy: bool = False,
        collision: bool = False,
    ) -> Tensor | TokenStatistics:
        """The linear layer without targets; with targets the statistics of the model's logits.

        Args:
            hidden: (N, d) last hidden states; any leading shape without targets.
            targets: (N,) token ids.
            entropy: whether to compute entropies too (no gradient flows through them).
            collision: whether to compute log sum_v p_v^2 too (nor through these).
        """
        if targets is None:
            return super().forward(hidden)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = bias.to(dtype) if bias is not None else None
        wanted, backward = (entropy, collision), torch.is_grad_enabled()
        logps, entropies, collisions = _ChunkedLogprobs.apply(
            *(hidden, weight, bias, targets, wanted, self.transform, backward)
        )
        return TokenStatistics(
            logps, entropies if entropy else None, collisions if collision else None
        )


class _ChunkedLogprobs(torch.autograd.Function):
    """log-softmax and gather over chunks of rows.

    The backward pass takes kept logits, or computes them again. With a frozen layer it needs
    neither: the gradient of each log-prob with respect to its hidden state is formed in the forward
    pass.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, wanted, transform, backward):
        entropy, collision = wanted
        # Which are true also where no backward pass will come.
        need_hidden, need_weight, need_bias = (backward and n for n in ctx.needs_input_grad[:3])
        trained = need_weight or need_bias
        frozen = need_hidden and not trained
        statistic = torch.promote_types(hidden.dtype, torch.float32)
        logps = hidden.new_empty(len(hidden), dtype=statistic)
        entropies = torch.empty_like(logps) if entropy else logps.new_empty(0)
        collisions = torch.empty_like(logps) if collision else logps.new_empty(0)
        maxima, sums = torch.empty_like(logps), torch.empty_like(logps)
        directions = torch.empty_like(hidden) if frozen else hidden.new_empty(0)
        chunks, kept = _chunks(hidden, weight, statistic), []
        for rows, keep in zip(chunks, _which_kept(chunks, weight, trained), strict=True):
            logits = _logits(hidden[rows], weight, bias)
            free = not (keep or frozen)
            found = row_statistics(
                logits, targets[rows], transform, entropy, overwrite=free and not collision
            )
            logps[rows], maxima[rows], sums[rows] = found.logps, found.maxima, found.sums
            if entropy:
                entropies[rows] = found.entropies
            if collision:
                collisions[rows] = log_collisions(logits, found, transform, overwrite=free)
            if keep:
                kept.append(logits)
            if frozen:
                ones = torch.ones_like(found.sums)
                options = (targets[rows], found.maxima, found.sums, ones, transform)
                directions[rows] = logit_gradients(logits, *options, overwrite=True) @ weight
            # Before the next chunk's are there.
            del logits
        ctx.save_for_backward(hidden, weight, bias, targets, maxima, sums, directions, *kept)
        ctx.frozen, ctx.transform = frozen, transform
        ctx.mark_non_differentiable(entropies, collisions)
        return logps, entropies, collisions

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, *_):
        hidden, weight, bias, targets, maxima, sums, directions, *kept = ctx.saved_tensors
        if ctx.frozen:
            return (directions * grad_logps[:, None]).to(hidden.dtype), *[None] * 6
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=maxima.dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=maxima.dtype) if need_bias else None
        for index, rows in enumerate(_chunks(hidden, weight, maxima.dtype)):
            again = index >= len(kept)
            logits = _logits(hidden[rows], weight, bias) if again else kept[index]
            grad = logit_gradients(
                logits,
                *(targets[rows], maxima[rows], sums[rows], grad_logps[rows], ctx.transform),
                overwrite=again,
            )
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0, dtype=maxima.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                _add_product_(grad_weight, grad.T, hidden[rows])
            del logits, grad
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def install_head(model: nn.Module) -> None:
    """Put a `LogprobHead` in the place of the model's output layer.

    Raises:
        ModelError: the output is no linear layer.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    # A subclass may do more to its input than the layer that would stand in its place.
    if type(head) not in (nn.Linear, LogprobHead):
        name, found = type(model).__name__, type(head).__name__
        raise ModelError(
            f"{name} has no linear output layer, so its log-probs cannot be computed: found "
            f"{found}. Adapters on the output layer are not supported (model.lora.target_modules)."
        )
    others = [
        path
        for path, child in model.named_children()
        if child not in (head, model.base_model) and any(True for _ in child.parameters())
    ]
    if others:
        raise ModelError(
            f"{type(model).__name__} has layers of its own beside its blocks and its output layer "
            f"({', '.join(others)}), which is not supported."
        )
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    transform = LogitTransform.of(config)
    model.set_output_embeddings(LogprobHead.from_linear(head, transform))  # type: ignore[operator]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)


def _chunks(hidden: Tensor, weight: Tensor, statistic: torch.dtype) -> list[slice]:
    """Even pieces of the rows, whose logits take about CHUNK_BYTES each."""
    limit = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"])
    most = max(1, limit // (len(weight) * statistic.itemsize))
    pieces = -(-len(hidden) // most)
    size = -(-len(hidden) // pieces) if pieces else 1
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]


def _which_kept(chunks: list[slice], weight: Tensor, trained: bool) -> list[bool]:
    """The first chunks, as many as may be kept."""
    limit = KEPT_BYTES.get(weight.device.type, KEPT_BYTES["cpu"]) if trained else 0
    each = len(weight) * weight.element_size()
    return [rows.stop * each <= limit for rows in chunks]


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; the sum over chunks is not rounded to a smaller type."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
