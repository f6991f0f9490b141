"""What a tabular policy is worth: collapse, divergence, reward and order. Arm 0 is the best arm.

The **reward** of an arm is its place in the central ranking, from 1 (the best) to 0 (the worst) in
equal steps; regret is 1 less the expected reward. It does not depend on the dispersion.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mallowspo_cli.experiments.mallows_model import Floats

TIE = 1e-3
"""Arms whose logits, times the strength of the link, differ by less are tied in the order."""
COLLAPSED = 0.95
"""Max-arm probability above which a policy counts as collapsed onto one arm."""
OUTCOMES = ("max_arm", "kl", "regret", "wrong_collapse", "accuracy")
KL_MISSED = 1e-3
"""Nats from the KL asked for by which a policy counts as not having it."""


def outcomes(logits: Floats, strength: Floats | float) -> dict[str, Floats]:
    """Each of OUTCOMES, (...,), of policies softmax(logits), (..., arms); reference uniform.

    Args:
        logits: log-ratios to the reference, up to a constant.
        strength: beta times the mean weight, (...,) or one: the unit of TIE.

    `kl` in nats; `wrong_collapse` is 1 where the policy is COLLAPSED and another arm than arm 0 is
    the likeliest; `accuracy` is the share of arm pairs in their central order, ties half.
    """
    probabilities = softmax(logits)
    most = probabilities.max(axis=-1)
    return {
        "max_arm": most,
        "kl": divergence(logits),
        "regret": regret(probabilities),
        "wrong_collapse": ((most > COLLAPSED) & (probabilities[..., 0] < most)).astype(np.float64),
        "accuracy": order_accuracy(logits, tie_width(strength, logits)),
    }


def only_at_kl(found: Mapping[str, Floats], target: float) -> dict[str, Floats]:
    """Outcomes, `kl` among them, with NaN where the policy does not have the KL asked for.

    Arms that are tied at the top bound the KL of a whole path.
    """
    there = np.abs(found["kl"] - target) <= KL_MISSED
    return {name: np.where(there, values, np.nan) for name, values in found.items()}


def kl_targets(targets: Sequence[float], arms: int) -> tuple[float, ...]:
    """Those that a policy of so many arms can have: below log(arms), a single arm's."""
    return tuple(target for target in targets if target < np.log(arms))


def mean_by_seed(values: Floats) -> Floats:
    """(seed,) means of (..., seed) over all that is not NaN; NaN where nothing is."""
    flat = values.reshape(-1, values.shape[-1])
    known = ~np.isnan(flat)
    count = known.sum(axis=0)
    total = np.where(known, flat, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def tie_width(strength: Floats | float, logits: Floats) -> Floats:
    """(..., 1) TIE in nats of log-ratio, of (..., arms) logits."""
    return TIE / np.broadcast_to(strength, logits.shape[:-1])[..., None]


def with_ties(logits: Floats, tie: Floats) -> Floats:
    """(..., arms) with arms that are tied, one after another, at their mean.

    The solver leaves them a hair apart; scaling would make that hair a preference.
    """
    order = np.argsort(logits, axis=-1)
    ranked = np.take_along_axis(logits, order, axis=-1)
    apart = np.diff(ranked, axis=-1, prepend=ranked[..., :1]) >= tie
    group = np.cumsum(apart, axis=-1)
    same = group[..., :, None] == group[..., None, :]
    means = np.where(same, ranked[..., None, :], 0.0).sum(axis=-1) / same.sum(axis=-1)
    found = np.empty_like(means)
    np.put_along_axis(found, order, means, axis=-1)
    return found


def softmax(logits: Floats) -> Floats:
    """Along the last axis."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def regret(probabilities: Floats) -> Floats:
    """(...,) from (..., arms): 1 less the expected reward."""
    return probabilities @ np.linspace(0, 1, probabilities.shape[-1])


def order_accuracy(logits: Floats, tie: Floats) -> Floats:
    """(...,) share of pairs of arms that stand as in the central ranking; (..., 1) tie width."""
    better, worse = np.triu_indices(logits.shape[-1], 1)
    gaps = logits[..., better] - logits[..., worse]
    return np.where(np.abs(gaps) < tie, 0.5, gaps > 0).mean(axis=-1)


def divergence(logits: Floats) -> Floats:
    """(...,) KL to the uniform reference, in nats."""
    return np.log(logits.shape[-1]) - _entropy(softmax(logits))


def scale_to_kl(logits: Floats, target: float, prompts: int = 0) -> Floats:
    """(...,) factor by which logits (..., [prompts,] arms) have that mean KL.

    The divergence grows with the factor, so halving finds it. The factor ends at 1e6 where ties or
    a policy at the reference leave less KL than asked for (`only_at_kl` leaves those out).

    Args:
        logits: log-ratios to a uniform reference.
        target: nats, averaged over the axis of prompts where there is one.
        prompts: 1 if the axis before the last is one of prompts, 0 if not.
    """
    low = np.full(logits.shape[: -1 - prompts], -14.0)
    high = np.full_like(low, 14.0)
    for _ in range(42):
        middle = (low + high) / 2
        factor = np.exp(middle)[(...,) + (None,) * (1 + prompts)]
        found = divergence(factor * logits)
        less = (found.mean(axis=-1) if prompts else found) < target
        low, high = np.where(less, middle, low), np.where(less, high, middle)
    return np.exp((low + high) / 2)


def _entropy(probabilities: Floats) -> Floats:
    return -(probabilities * np.log(np.maximum(probabilities, 1e-300))).sum(axis=-1)
