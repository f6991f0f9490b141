"""Logistic regression with an L1 penalty, solved to the end and quickly for a few features."""

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

MAX_STEPS = 500
MAX_SWEEPS = 2000
SETTLED = 1e-7
"""A Newton step of this size (relative) is the last one: the next would be of its square."""
WORST_CONDITION = 1e10
"""Of a matrix that is solved directly: behind it, rounding decides on the step."""
NO_GAIN = 1e-15
"""A step that promises to lower the objective by this share is the last one: it is no digit."""


def fit_sparse_logistic(
    features: NDArray[np.float64],
    targets: NDArray[np.float64],
    weights: NDArray[np.float64],
    penalty: float,
    start: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """The (K,) coefficients that minimise the weighted log loss plus `penalty` * sum |coefficient|.

    The log loss of row i is -t ln p - (1 - t) ln(1 - p) with p = expit(features[i] @ coefficients).
    A row with a target t between 0 and 1 thus counts as two rows of weights t and 1 - t, and
    `penalty` is 1 / C in scikit-learn's terms. Proximal Newton steps with a line search (derived;
    as in Lee, Sun and Saunders, 2014).

    Args:
        features: (M, K), K small; no constant is added.
        targets: (M,) in [0, 1].
        weights: (M,), not negative.
        penalty: above 0, which keeps the coefficients finite where the rows can be separated.
        start: where to begin; zeros otherwise.
    """
    assert penalty > 0

    def objective(point: NDArray[np.float64]) -> float:
        logits = features @ point
        size = np.abs(logits)
        # The usual ln(1 + e^logit) - t * logit loses digits where the two are large.
        loss = np.log1p(np.exp(-size)) + size * np.where(logits > 0, 1 - targets, targets)
        return float(weights @ loss + penalty * np.abs(point).sum())

    at = np.zeros(features.shape[1])
    value = objective(at)
    # From a start worse than nothing, where all chances are 0 or 1, no curvature shows the way.
    if start is not None and (begun := objective(start)) < value:
        at, value = start, begun
    for _ in range(MAX_STEPS):
        chance = expit(features @ at)
        gradient = features.T @ (weights * (chance - targets))
        curvature = (features.T * (weights * chance * (1 - chance))) @ features
        step = _penalised_step(at, gradient, curvature, penalty)
        promised = gradient @ step + penalty * (np.abs(at + step).sum() - np.abs(at).sum())
        small = np.abs(step).max() <= SETTLED * (1 + np.abs(at).max())
        if small or -promised <= NO_GAIN * value:
            return at + step
        size = 1.0
        while (reached := objective(at + size * step)) > value + 1e-4 * size * promised:
            size /= 2
            if size < 1e-12:
                return at
        at, value = at + size * step, reached
    # Not settled, as where rows can nearly be separated; the objective has only fallen on the way.
    return at


def _penalised_step(
    at: NDArray[np.float64],
    gradient: NDArray[np.float64],
    curvature: NDArray[np.float64],
    penalty: float,
) -> NDArray[np.float64]:
    """The step to the minimum of the quadratic model plus the penalty, by coordinate descent where
    a coefficient changes its sign or is 0.
    """
    direct = _smooth_step(at, gradient, curvature, penalty)
    if direct is not None:
        return direct
    # Plain numbers: arrays of three are slower.
    point: list[float] = at.tolist()
    slope: list[float] = gradient.tolist()
    rows: list[list[float]] = curvature.tolist()
    places = range(len(point))
    for _ in range(MAX_SWEEPS):
        largest = 0.0
        for place in places:
            bend = rows[place][place]
            # A feature that is 0 everywhere can only cost.
            target = bend * point[place] - slope[place] if bend > 0 else 0.0
            shrunk = max(abs(target) - penalty, 0.0)
            new = (shrunk if target > 0 else -shrunk) / bend if shrunk else 0.0
            change = new - point[place]
            if change:
                point[place] = new
                for other in places:
                    slope[other] += rows[other][place] * change
                largest = max(largest, abs(change))
        if largest <= 1e-11 * (1 + max(map(abs, point))):
            break
    return np.asarray(point) - at


def _smooth_step(
    at: NDArray[np.float64],
    gradient: NDArray[np.float64],
    curvature: NDArray[np.float64],
    penalty: float,
) -> NDArray[np.float64] | None:
    """The same where no coefficient is 0 behind it and the signs are as without a penalty; None
    elsewhere.

    Exact also where two features hardly differ, over which coordinate descent takes for ever.
    """
    if not np.linalg.cond(curvature) < WORST_CONDITION:
        return None
    try:
        signs = np.sign(at - np.linalg.solve(curvature, gradient))
        found = at - np.linalg.solve(curvature, gradient + penalty * signs)
    except np.linalg.LinAlgError:
        return None
    settled = np.isfinite(found).all() and (np.sign(found) == signs).all() and signs.all()
    return found - at if settled else None
