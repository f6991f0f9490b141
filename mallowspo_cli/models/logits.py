"""Statistics of rows of logits, and the gradient of a log-prob with respect to them.

Plain torch, or one Triton kernel each where there is one for the device.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mallowspo_cli.errors import ModelError
from mallowspo_cli.models import head_kernel
from mallowspo_cli.models.head_kernel import RowStatistics

SCALES = {
    "logit_scale": ("cohere", lambda value: value),
    "lm_head_multiplier": ("falcon_h1", lambda value: value),
    "logits_scaling": ("granite", lambda value: 1 / value),
}
"""Keys of transformers' configurations under which a model scales its logits: the family for which
it is known how (others use the same name in another way), and what it multiplies by."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Keys under which a model caps its logits."""
UNKNOWN = ("output_multiplier", "output_multiplier_scale", "logits_mup_width_multiplier")
"""Keys that may mean a scale, of which it is not known how it acts."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its output layer's result: z = scale x, then cap tanh(z / cap)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitTransform":
        """From a transformers configuration.

        Raises:
            ModelError: it is not known what the model does to its logits.
        """
        family, scale = str(getattr(config, "model_type", "")), 1.0
        for key in (*SCALES, *UNKNOWN):
            value = getattr(config, key, None)
            if value in (None, 1, 1.0):
                continue
            if key not in SCALES or not family.startswith(SCALES[key][0]):
                raise ModelError(
                    f"models of type {family} change their logits by {key}={value} in a way that "
                    "is not supported."
                )
            scale *= SCALES[key][1](value)
        caps = [cap for key in CAPS if (cap := getattr(config, key, None))]
        return cls(float(scale), float(caps[0]) if caps else None)

    def __call__(self, logits: Tensor, overwrite: bool) -> Tensor:
        """The model's logits, in float32 or better; in the place of `logits` if it may and can."""
        statistic = torch.promote_types(logits.dtype, torch.float32)
        z = logits if overwrite and logits.dtype == statistic else logits.to(statistic, copy=True)
        if self.scale != 1:
            z.mul_(self.scale)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z


def row_statistics(
    logits: Tensor, targets: Tensor, transform: LogitTransform, products: bool, overwrite: bool
) -> RowStatistics:
    """Statistics of the model's logits.

    Args:
        logits: (n, V) the output layer's result.
        targets: (n,) token ids.
        products: whether to compute what entropies need.
        overwrite: whether `logits` may be used as scratch space.
    """
    if _has_kernel(logits):
        return head_kernel.row_statistics(logits, targets, transform.scale, transform.softcap)
    z = transform(logits, overwrite)
    maxima = z.amax(dim=1)
    at_target = z.gather(1, targets[:, None]).squeeze(1)
    z.sub_(maxima[:, None])
    exponentials = z.exp() if products else z.exp_()
    sums = exponentials.sum(dim=1)
    # Where a logit is minus infinity, 0 times it is to be 0.
    product = exponentials.mul_(z.clamp_(min=-1000)).sum(dim=1) if products else None
    return RowStatistics(maxima, sums, at_target, product)


def log_collisions(
    logits: Tensor, found: RowStatistics, transform: LogitTransform, overwrite: bool
) -> Tensor:
    """log sum_v p_v^2, (n,) nats: how likely it is that two draws from a row are one token.

    sum_v p_v^2 = sum_v exp(2 (z_v - m)) / s^2, and 2 z is what twice the scale and twice the cap
    make of a logit: the sum of `row_statistics` once more, by whatever computes it.

    Args:
        logits: (n, V) the output layer's result.
        found: the rows' statistics under `transform`.
        overwrite: whether `logits` may be used as scratch space.
    """
    cap = None if transform.softcap is None else 2 * transform.softcap
    doubled = replace(transform, scale=2 * transform.scale, softcap=cap)
    targets = logits.new_zeros(len(logits), dtype=torch.int64)
    squares = row_statistics(logits, targets, doubled, products=False, overwrite=overwrite).sums
    return squares.log() - 2 * found.sums.log()


def logit_gradients(
    logits: Tensor,
    targets: Tensor,
    maxima: Tensor,
    sums: Tensor,
    weights: Tensor,
    transform: LogitTransform,
    overwrite: bool,
) -> Tensor:
    """The gradient of sum_i weights_i log p(target_i), (n, V), in the type of `logits`.

    d log p(y) / d z_v = 1[v = y] - p_v, times the slope of `transform`.
    """
    if _has_kernel(logits):
        place = logits if overwrite else logits.clone()
        options = (weights, transform.scale, transform.softcap)
        return head_kernel.logits_to_gradients_(place, targets, maxima, sums, *options)
    z = transform(logits, overwrite)
    slope = None if transform.softcap is None else 1 - (z / transform.softcap).square_()
    grad = z.sub_(maxima[:, None]).exp_().mul_((-weights / sums)[:, None])
    grad.scatter_add_(1, targets[:, None], weights[:, None])
    if slope is not None:
        grad.mul_(slope)
    if transform.scale != 1:
        grad.mul_(transform.scale)
    return grad.to(logits.dtype)


def _has_kernel(logits: Tensor) -> bool:
    return head_kernel.available(logits.device) and logits.dtype in head_kernel.DTYPES
