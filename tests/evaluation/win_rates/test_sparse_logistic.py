"""The L1-penalised logistic regression finds the minimum, and liblinear's where that is exact."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from mallowspo_cli.evaluation.win_rates.sparse_logistic import fit_sparse_logistic

TARGETS = ("soft", "hard", "all won", "all lost", "separable", "even")


@pytest.mark.parametrize("kind", TARGETS)
def test_no_direction_lowers_the_objective(kind: str) -> None:
    generator = np.random.default_rng(TARGETS.index(kind))
    for trial in range(200):
        features = _features(generator, trial)
        targets = _targets(generator, kind, features)
        weights = np.where(generator.random(len(features)) < 0.5, 1.0, 0.1)
        penalty = 10.0 ** generator.uniform(-4, 4)
        start = generator.normal(size=features.shape[1]) * 5 if trial % 3 == 0 else None
        found = fit_sparse_logistic(features, targets, weights, penalty, start)
        # The condition for a minimum of a convex function with an L1 penalty.
        slope = features.T @ (weights * (expit(features @ found) - targets))
        off = np.where(
            found == 0, np.abs(slope) - penalty, np.abs(slope + penalty * np.sign(found))
        )
        scale = np.abs(features).T @ weights + penalty
        assert (off / scale).max() < 1e-9


def test_the_minimum_is_the_one_that_liblinear_approaches() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(200, 3))
    labels = (generator.random(200) < expit(features @ [1.0, -0.5, 0.1])).astype(float)
    for c in (0.05, 1.0, 100.0):
        model = LogisticRegression(
            C=c,
            l1_ratio=1.0,
            solver="liblinear",
            fit_intercept=False,
            tol=1e-10,
            max_iter=10_000,
            random_state=0,
        ).fit(features, labels)
        found = fit_sparse_logistic(features, labels, np.ones(200), 1 / c)
        assert found == pytest.approx(model.coef_[0], abs=1e-6)


def test_a_soft_target_counts_as_two_rows() -> None:
    generator = np.random.default_rng(1)
    features, targets = generator.normal(size=(50, 2)), generator.random(50)
    twice = np.concatenate([features, features])
    both = np.repeat([1.0, 0.0], 50), np.concatenate([targets, 1 - targets])
    assert fit_sparse_logistic(features, targets, np.ones(50), 0.1) == pytest.approx(
        fit_sparse_logistic(twice, *both, 0.1), abs=1e-9
    )


def _features(generator: np.random.Generator, trial: int) -> NDArray[np.float64]:
    """Of widely different scales; some constant, some all 0, some twice there."""
    columns = int(generator.integers(1, 4))
    features = generator.normal(size=(int(generator.integers(1, 200)), columns))
    features *= 10.0 ** generator.uniform(-3, 2, columns)
    if trial % 5 == 0:
        features[:, -1] = 1
    if trial % 7 == 0:
        features[:, 0] = 0
    if trial % 11 == 0:
        features[:, 0] = features[:, -1]
    return features


def _targets(
    generator: np.random.Generator, kind: str, features: NDArray[np.float64]
) -> NDArray[np.float64]:
    drawn = generator.random(len(features))
    return {
        "soft": drawn,
        "hard": (drawn < 0.5).astype(float),
        "all won": np.ones(len(drawn)),
        "all lost": np.zeros(len(drawn)),
        "separable": (features[:, 0] > 0).astype(float),
        "even": np.full(len(drawn), 0.5),
    }[kind]


def test_features_that_hardly_differ_are_told_apart_all_the_same() -> None:
    length = np.asarray([0.9998, 0.9998, 0.9999, 0.9911, 0.9999, 0.9911, 0.9999, 0.9998])
    features = np.stack([length, np.ones(8)], axis=1)
    targets = np.asarray([0.808, 0.359, 0.694, 0.858, 0.694, 0.858, 0.694, 0.808])
    found = fit_sparse_logistic(features, targets, np.ones(8), 1e-4)
    chance = expit(features @ found)
    slope = features.T @ (chance - targets)
    # The minimum's own condition.
    assert np.abs(slope + 1e-4 * np.sign(found)).max() < 1e-9
