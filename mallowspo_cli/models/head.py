"""Log-probs of chosen tokens, and entropies, without ever holding all logits.

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

CHUNK_ROWS = 512
"""Rows of logits that exist at a time."""

LOGIT_CHANGES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)
"""Keys of transformers' configurations under which a model changes its logits behind the layer."""


class TokenStatistics(NamedTuple):
    """Per token, float32 (float64 for float64 input), nats."""

    logps: Tensor
    """(N,) log-prob of the target token."""
    entropies: Tensor | None
    """(N,) entropy of the next-token distribution, without a gradient; None unless asked for."""


class LogprobHead(nn.Linear):
    """A linear output layer that can also score targets."""

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "LogprobHead":
        """A head that shares the parameters of `linear`."""
        with torch.device("meta"):
            head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor | None = None, entropy: bool = False
    ) -> Tensor | TokenStatistics:
        """Logits without targets; with targets their statistics.

        Args:
            hidden: (N, d) last hidden states; any leading shape without targets.
            targets: (N,) token ids.
            entropy: whether to compute entropies too (no gradient flows through them).
        """
        if targets is None:
            return super().forward(hidden)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = bias.to(dtype) if bias is not None else None
        logps, entropies = _ChunkedLogprobs.apply(hidden, weight, bias, targets, entropy)
        return TokenStatistics(logps, entropies if entropy else None)


class _ChunkedLogprobs(torch.autograd.Function):
    """log-softmax and gather over chunks of rows; the backward pass recomputes the logits.

    The row maximum m and the sum s of exp(z - m) are saved apart: exp(z - m) / s is more exact
    than exp(z - lse) with a rounded lse.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, entropy):
        statistic = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logps = hidden.new_empty(len(hidden), dtype=statistic)
        entropies = torch.empty_like(logps) if entropy else logps.new_empty(0)
        maxima, sums = torch.empty_like(logps), torch.empty_like(logps)
        for rows in _chunks(len(hidden)):
            logits = _logits(hidden[rows], weight, bias, statistic)
            maximum = logits.amax(dim=1)
            target_logits = logits.gather(1, targets[rows, None]).squeeze(1)
            shifted = logits.sub_(maximum[:, None])
            exponentials = shifted.exp()
            total = exponentials.sum(dim=1)
            logps[rows] = target_logits - maximum - total.log()
            if entropy:
                # H = log s - sum_v p_v (z_v - m)
                entropies[rows] = total.log() - (exponentials.mul_(shifted)).sum(dim=1) / total
            maxima[rows], sums[rows] = maximum, total
        ctx.save_for_backward(hidden, weight, bias, targets, maxima, sums)
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, _grad_entropies):
        hidden, weight, bias, targets, maxima, sums = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=maxima.dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=maxima.dtype) if need_bias else None
        for rows in _chunks(len(hidden)):
            logits = _logits(hidden[rows], weight, bias, maxima.dtype)
            # d log p(y) / d z_v = 1[v = y] - p_v
            grad = logits.sub_(maxima[rows, None]).exp_().div_(sums[rows, None]).neg_()
            grad.scatter_add_(1, targets[rows, None], torch.ones_like(sums[rows, None]))
            grad.mul_(grad_logps[rows, None])
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def install_head(model: nn.Module) -> None:
    """Put a `LogprobHead` in the place of the model's output layer.

    Raises:
        ModelError: the output is not one linear layer whose result is the logits as they are.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    name = type(model).__name__
    # A subclass may do more to its input than the layer that would stand in its place.
    if type(head) not in (nn.Linear, LogprobHead):
        raise ModelError(f"{name} has no linear output layer, so its log-probs cannot be computed.")
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    for key in LOGIT_CHANGES:
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise ModelError(f"{name} changes its logits ({key}), which is not supported yet.")
    model.set_output_embeddings(LogprobHead.from_linear(head))  # type: ignore[operator]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, statistic: torch.dtype) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    return logits.to(statistic)


def _chunks(rows: int) -> list[slice]:
    return [slice(start, start + CHUNK_ROWS) for start in range(0, rows, CHUNK_ROWS)]
