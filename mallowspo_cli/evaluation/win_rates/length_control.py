"""The length-controlled win rate of AlpacaEval 2, fitted by ourselves.

A logistic regression explains the preferences by difference in length, difficulty of the
instruction, and a constant for the model; then it predicts for answers as long as the baseline's
(Dubois et al., 2024). Equal to alpaca_eval 0.6.6 on the same rows, except where that goes wrong:
all answers as long as the baseline's (fails), no win and no gamed rows (says 50 %).
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.win_rates.calibration import Gamed
from mallowspo_cli.evaluation.win_rates.sparse_logistic import fit_sparse_logistic

LENGTH, DIFFICULTY = "np.tanh(std_delta_len)", "instruction_difficulty"
MODEL = "not_gamed_baseline.astype(float)"
"""AlpacaEval's names of the coefficients."""

FOLDS = 5
GAMED_WEIGHT = 0.2 / 2
"""A judgement of the gamed baselines counts this much; there are two of them."""
CANDIDATES = tuple(np.logspace(-4, 4, 10).tolist())
"""Values of C (inverse of the L1 penalty) that cross-validation chooses from."""
UNPENALISED = 1e4
"""C without a penalty to speak of, the largest of the candidates. Where nothing but the judgements
is known a penalty pulls the win rate to 50 %."""
SEED = 123
Floats = NDArray[np.float64]
Sample = tuple[Floats, Floats, Floats]
"""Features (M, K), targets (M,) in [0, 1] and weights (M,)."""


@dataclass(frozen=True)
class Judged:
    """Judged pairs: a row for each instruction, failed judgements included.

    With difficulty and gamed judgements the fit is AlpacaEval's length_controlled_v1, without the
    latter length_controlled_noreg, without both length_controlled_minimal.
    """

    preference: Floats
    """(N,) in [1, 2], 2 where the model's answer is better; NaN where the judge failed."""
    baseline_lengths: NDArray[np.int64]
    """(N,) characters of the baseline's answers."""
    model_lengths: NDArray[np.int64]
    """(N,) characters of the model's answers."""
    difficulty: Floats | None = None
    """(N,) difficulty of the instructions (evaluation/win_rates/difficulty.py)."""
    gamed: Gamed | None = None
    position: NDArray[np.int64] | None = None
    """(N,) number of the instruction in its set. The rows are fitted in this order, so that a
    shuffled file gives the same figure; None: as they are."""

    def __post_init__(self) -> None:
        columns = (self.baseline_lengths, self.model_lengths, self.difficulty, self.position)
        assert all(c is None or c.shape == self.preference.shape for c in columns)
        assert self.gamed is None or self.difficulty is not None

    @property
    def variant(self) -> str:
        """AlpacaEval's name of the fit."""
        if self.gamed is not None:
            return "length_controlled_v1"
        return "length_controlled_minimal" if self.difficulty is None else "length_controlled_noreg"

    def rows(self, rows: NDArray[np.int64]) -> "Judged":
        """The pairs of these row numbers, in their order."""
        return replace(
            self,
            preference=self.preference[rows],
            baseline_lengths=self.baseline_lengths[rows],
            model_lengths=self.model_lengths[rows],
            difficulty=None if self.difficulty is None else self.difficulty[rows],
            position=None if self.position is None else self.position[rows],
        )


@dataclass(frozen=True)
class LengthControlled:
    """A fit, and the win rate that it predicts at equal length."""

    variant: str
    """AlpacaEval's name of it."""
    win_rate: float
    """Percent."""
    standard_error: float
    """Percent; AlpacaEval's, of the mean of `predictions`. It leaves out that the coefficients are
    estimates, and so says far too little: use `bootstrap_length_controlled`."""
    coefficients: dict[str, float]
    c: float
    """Inverse of the penalty, as chosen; infinite where nothing was fitted."""
    predictions: Floats
    """(N,) chance that the model's answer is better, at equal length; failed judgements too."""

    @property
    def is_shrunk(self) -> bool:
        """Whether the penalty left no coefficient, as with few judgements: the win rate is then 50
        and its interval 50 to 50, whatever the model. Say so wherever either is shown."""
        return self.c < math.inf and not any(self.coefficients.values())


def length_controlled(judged: Judged) -> LengthControlled:
    """Fit and predict, C being chosen by cross-validation.

    Raises:
        EvalError: fewer than 5 judgements, or lengths and quality cannot be told apart.
    """
    delta = judged.baseline_lengths - judged.model_lengths
    count, known = len(delta), int((~np.isnan(judged.preference)).sum())
    if known < FOLDS:
        raise EvalError(
            f"{known} of {count} pairs are judged; length control needs {FOLDS}. Judge more "
            "instructions, or go by the plain win rate."
        )
    if judged.gamed is None and delta[0] != 0 and (delta == delta[0]).all():
        raise EvalError(
            f"each answer differs from the baseline's by {-delta[0]} characters, so length cannot "
            "be told from quality. Go by the plain win rate, or give the gamed judgements."
        )
    order = np.arange(count) if judged.position is None else np.argsort(judged.position)
    ordered = judged.rows(order)
    coefficients, c = _cross_validated(_sample(ordered))
    predictions = _at_equal_length(ordered, coefficients)
    # The last digits of a sum go with its order, so it is taken before the rows go back.
    win_rate = float(predictions.mean() * 100)
    error = float(predictions.std(ddof=1) / np.sqrt(count) * 100)
    names = [LENGTH, *([] if judged.difficulty is None else [DIFFICULTY]), MODEL]
    named = dict(zip(names, coefficients.tolist(), strict=True))
    as_given = predictions[np.argsort(order)]
    return LengthControlled(judged.variant, win_rate, error, named, c, as_given)


def baseline_itself(count: int) -> LengthControlled:
    """Of `count` answers of the baseline against themselves: 50 %, and no fit to be done again."""
    none: dict[str, float] = dict.fromkeys((LENGTH, DIFFICULTY, MODEL), 0.0)
    return LengthControlled("length_controlled_v1", 50.0, 0.0, none, math.inf, np.full(count, 0.5))


def refit_of(judged: Judged, c: float) -> Callable[[NDArray[np.int64]], float]:
    """A function from resampled row numbers (N,) to their length-controlled win rate, percent.

    Coefficients and the standard deviation of the lengths are the resample's; C and the gamed rows
    stay. The problem of `length_controlled` is solved to the end, where liblinear stops within its
    tolerance, in about a millisecond. NaN where no row is judged.
    """
    start = fit_sparse_logistic(*_sample(judged), 1 / c)

    def refit(rows: NDArray[np.int64]) -> float:
        drawn = judged.rows(rows)
        if np.isnan(drawn.preference).all():
            return math.nan
        coefficients = fit_sparse_logistic(*_sample(drawn), 1 / c, start)
        return float(_at_equal_length(drawn, coefficients).mean() * 100)

    return refit


def bootstrap_length_controlled(
    judged: Judged, c: float, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the win rate, fitted anew on resampled instructions.

    Unlike AlpacaEval's lc_standard_error it holds the uncertainty of the fit. A resample without a
    judgement does not count.
    """
    refit, count = refit_of(judged, c), len(judged.preference)
    generator = np.random.default_rng(seed)
    drawn = [refit(generator.integers(count, size=count)) for _ in range(resamples)]
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _sample(judged: Judged) -> Sample:
    """What is judged, the gamed rows first."""
    delta = (judged.baseline_lengths - judged.model_lengths).astype(np.float64)
    spread = delta.std(ddof=1) if len(delta) > 1 else 0.0
    # Where all differ by the same, the limit of tanh.
    length = np.tanh(delta / spread) if spread > 0 else np.sign(delta)
    columns, targets, weights = [length], judged.preference - 1, np.ones(len(delta))
    if judged.difficulty is not None:
        columns.append(judged.difficulty)
    features = np.stack([*columns, np.ones(len(delta))], axis=1)
    if (gamed := judged.gamed) is not None:
        lengths, own = np.tanh(gamed.std_delta_len), np.zeros(len(gamed.index))
        twins = np.stack([lengths, gamed.instruction_difficulty, own], axis=1)
        features = np.concatenate([twins, features])
        targets = np.concatenate([gamed.preference, targets])
        weights = np.concatenate([np.full(len(own), GAMED_WEIGHT), weights])
    known = ~np.isnan(targets)
    return features[known], targets[known], weights[known]


def _at_equal_length(judged: Judged, coefficients: Floats) -> Floats:
    """(N,) predicted chances of the model's answers."""
    if judged.difficulty is None:
        return np.full(len(judged.preference), expit(coefficients[1]))
    return expit(judged.difficulty * coefficients[1] + coefficients[2])


def _cross_validated(sample: Sample) -> tuple[Floats, float]:
    """Coefficients at the C whose log loss on left-out rows is least, and that C."""
    count = len(sample[1])
    # As scikit-learn's GroupKFold deals out groups of equal size.
    fold_of = (count - 1 - np.arange(count)) % FOLDS
    with warnings.catch_warnings():
        # AlpacaEval goes on with what liblinear has after 100 steps, and so do we.
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores = sum(_scores(sample, fold_of == fold) for fold in range(FOLDS))
        c = CANDIDATES[np.argmax(scores)]
        return _liblinear(sample, c, np.random.RandomState(SEED)), c


def _scores(sample: Sample, left_out: NDArray[np.bool_]) -> Floats:
    """(candidates,) mean log likelihood of rows left out, fitted on the others."""
    features, targets, weights = sample
    kept = (features[~left_out], targets[~left_out], weights[~left_out])
    features, targets, weights = features[left_out], targets[left_out], weights[left_out]
    # AlpacaEval has each row twice, as a win and as a loss; the second comes back from 1 - t.
    features, weights = np.concatenate([features] * 2), np.concatenate([weights] * 2)
    targets = np.concatenate([targets, 1 - (1 - targets)])
    # One stream of random numbers through all values of C, as in LogisticRegressionCV.
    stream = np.random.RandomState(SEED)
    scores = np.empty(len(CANDIDATES))
    for place, c in enumerate(CANDIDATES):
        chance = expit(features @ _liblinear(kept, c, stream))
        chance = np.clip(chance, 1e-15, 1 - 1e-15)
        losses = targets * np.log(chance) + (1 - targets) * np.log(1 - chance)
        scores[place] = np.mean(losses * weights)
    return scores


def _liblinear(sample: Sample, c: float, stream: np.random.RandomState) -> Floats:
    """(K,) coefficients by the solver that AlpacaEval uses, from the same stream."""
    features, targets, weights = sample
    if not (weights * targets).any() or not (weights * (1 - targets)).any():
        # With all rows of one kind liblinear takes a row's label for another.
        return fit_sparse_logistic(features, targets, weights, 1 / c)
    model = LogisticRegression(
        C=c, l1_ratio=1.0, solver="liblinear", fit_intercept=False, random_state=stream
    )
    labels = np.repeat([1, 0], len(targets))
    shares = np.concatenate([targets, 1 - targets]) * np.concatenate([weights] * 2)
    model.fit(np.concatenate([features] * 2), labels, sample_weight=shares)
    return model.coef_[0]
