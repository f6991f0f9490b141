"""Our length control is alpaca_eval's, and its interval covers the truth.

The recorded figures are alpaca_eval's own (scripts/record_length_control.py).
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.model_selection import GroupKFold

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.win_rates.calibration import Gamed
from mallowspo_cli.evaluation.win_rates.difficulty import difficulty_of
from mallowspo_cli.evaluation.win_rates.length_control import (
    FOLDS,
    LENGTH,
    MODEL,
    Judged,
    LengthControlled,
    baseline_itself,
    bootstrap_length_controlled,
    length_controlled,
    refit_of,
)

ROOT = Path(__file__).parent.parent.parent.parent
RECORDED = json.loads((ROOT / "tests" / "golden" / "length_control.json").read_text())
VARIANTS = ("length_controlled_v1", "length_controlled_noreg", "length_controlled_minimal")
WRONG = [("every judgement a loss", variant) for variant in VARIANTS[1:]]
"""Where alpaca_eval says 50 % of a model that never wins."""
ONE_KIND = [("every judgement a win", variant) for variant in VARIANTS[1:]]
"""Where its solver stops on the way to infinite coefficients."""
RIGHT = [
    (case["name"], variant)
    for case in RECORDED["cases"]
    for variant in VARIANTS
    if (case["name"], variant) not in WRONG
]


def judged_of(record: dict[str, Any], name: str, variant: str = VARIANTS[0]) -> Judged:
    """The input of a recorded case."""
    (case,) = (case for case in record["cases"] if case["name"] == name)
    drawn = record["sets"][case["set"]]
    _, *columns = zip(*drawn["gamed"], strict=True)
    return Judged(
        np.asarray([math.nan if value is None else value for value in case["preference"]]),
        np.asarray(case["baseline_lengths"]),
        np.asarray(case["model_lengths"]),
        None if variant == VARIANTS[2] else np.asarray(drawn["difficulty"]),
        Gamed(*map(np.asarray, columns)) if variant == VARIANTS[0] else None,
    )


def assert_equal_to(record: dict[str, Any], name: str, variant: str) -> None:
    (case,) = (case for case in record["cases"] if case["name"] == name)
    expected = case["figures"][variant]
    found = length_controlled(judged_of(record, name, variant))
    metrics = expected["metrics"]
    assert found.variant == variant
    assert found.c == expected["c"]
    if (name, variant) in ONE_KIND:
        assert found.win_rate == pytest.approx(metrics["length_controlled_winrate"], rel=1e-6)
        return
    # Bit for bit on the machine that recorded them; other processors round otherwise.
    assert found.win_rate == pytest.approx(metrics["length_controlled_winrate"], rel=1e-7)
    assert found.standard_error == pytest.approx(metrics["lc_standard_error"], rel=1e-7, abs=1e-9)
    assert found.coefficients == pytest.approx(expected["coefficients"], rel=1e-7, abs=1e-9)
    assert found.predictions[:5] == pytest.approx(expected["predictions"], rel=1e-7)


@pytest.mark.parametrize(("name", "variant"), RIGHT)
def test_every_figure_is_the_recorded_one(name: str, variant: str) -> None:
    assert_equal_to(RECORDED, name, variant)


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("alpaca_eval", "patsy")),
    reason="alpaca_eval is not installed",
)
def test_every_figure_is_that_of_the_installed_alpaca_eval(tmp_path: Path) -> None:
    target, names = tmp_path / "fresh.json", ("failed judgements", "length decides")
    script = ROOT / "scripts" / "record_length_control.py"
    command = [sys.executable, str(script), str(target), "--only", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(target.read_text())
    for name in names:
        for variant in VARIANTS:
            assert_equal_to(record, name, variant)


@pytest.mark.parametrize(("name", "variant"), WRONG)
def test_a_model_that_never_wins_gets_no_half(name: str, variant: str) -> None:
    (case,) = (case for case in RECORDED["cases"] if case["name"] == name)
    assert case["figures"][variant]["metrics"]["length_controlled_winrate"] == 50
    assert length_controlled(judged_of(RECORDED, name, variant)).win_rate < 0.01


@pytest.mark.parametrize("count", [5, 23, 120])
def test_the_folds_are_those_of_scikit_learn(count: int) -> None:
    groups = np.tile(np.arange(count), 2)
    ours = (count - 1 - np.arange(count)) % FOLDS
    for fold, (_, left_out) in enumerate(GroupKFold(FOLDS).split(groups, groups=groups)):
        assert set(groups[left_out]) == set(np.flatnonzero(ours == fold))


@pytest.mark.parametrize(("name", "variant"), RIGHT)
def test_a_refit_of_all_rows_is_the_fit_but_for_liblinears_tolerance(
    name: str, variant: str
) -> None:
    judged = judged_of(RECORDED, name, variant)
    found = length_controlled(judged)
    refitted = refit_of(judged, found.c)(np.arange(len(judged.preference)))
    assert refitted == pytest.approx(found.win_rate, abs=0.005)


def test_a_shuffled_file_gives_the_same_figure(tmp_path: Path) -> None:
    judged = judged_of(RECORDED, "failed judgements")
    assert judged.difficulty is not None
    instructions = [f"Tell me fact {row}." for row in range(len(judged.preference))]
    file = tmp_path / "instruction_difficulty.csv"
    lines = [f"{row},{value}" for row, value in enumerate(judged.difficulty.tolist())]
    file.write_text("\n".join([",instruction_difficulty", *lines]) + "\n")
    rows = np.random.default_rng(0).permutation(len(instructions))
    joined = difficulty_of([instructions[row] for row in rows], file, None, order=instructions)
    shuffled = Judged(
        judged.preference[rows],
        judged.baseline_lengths[rows],
        judged.model_lengths[rows],
        joined.values,
        judged.gamed,
        joined.position,
    )
    in_order, out_of_order = length_controlled(judged), length_controlled(shuffled)
    assert out_of_order.win_rate == in_order.win_rate
    assert out_of_order.coefficients == in_order.coefficients
    assert out_of_order.predictions.tolist() == in_order.predictions[rows].tolist()


def test_without_known_positions_the_order_of_rows_moves_the_figure_little() -> None:
    judged = judged_of(RECORDED, "official size")
    rows = np.random.default_rng(0).permutation(len(judged.preference))
    found = length_controlled(judged.rows(rows)).win_rate
    assert found == pytest.approx(length_controlled(judged).win_rate, abs=0.1)


def simulated(
    generator: np.random.Generator, count: int, *, skill: float, length: float, longer: float
) -> tuple[Judged, float]:
    """Hard judgements by the very model that is fitted, and its true win rate at equal length."""
    difficulty = generator.normal(0.0, 1.0, count)
    baseline = generator.lognormal(7.0, 0.5, count).astype(int)
    model = (baseline * longer * generator.lognormal(0, 0.4, count)).astype(int)
    delta = baseline - model
    shape = np.tanh(delta / delta.std(ddof=1))
    chance = expit(skill + 0.5 * difficulty + length * shape)
    preference = 1 + (generator.random(count) < chance).astype(float)
    truth = 100 * expit(skill + 0.5 * np.random.default_rng(9).normal(size=100_000)).mean()
    return Judged(preference, baseline, model, difficulty), float(truth)


def test_a_win_rate_by_length_alone_is_taken_back() -> None:
    generator = np.random.default_rng(5)
    judged, truth = simulated(generator, 3000, skill=-0.8, length=-2.0, longer=1.8)
    plain = 100 * (judged.preference.mean() - 1)
    found = length_controlled(judged)
    assert plain > truth + 10
    assert found.win_rate == pytest.approx(truth, abs=4)
    assert found.coefficients[LENGTH] == pytest.approx(-2.0, abs=0.25)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(6)
    trials, inside = 60, 0
    for _ in range(trials):
        judged, truth = simulated(generator, 120, skill=0.4, length=-1.0, longer=1.2)
        # A C by cross-validation each time would take most of the time.
        low, high = bootstrap_length_controlled(judged, 20.0, resamples=100)
        inside += low <= truth <= high
    # 95 % of 60, give or take three standard errors.
    assert 52 <= inside <= 60


def test_alpaca_evals_standard_error_says_far_too_little() -> None:
    judged, _ = simulated(np.random.default_rng(7), 400, skill=0.4, length=-1.0, longer=1.2)
    found = length_controlled(judged)
    low, high = bootstrap_length_controlled(judged, found.c, resamples=200)
    assert 2 * 1.96 * found.standard_error < 0.5 * (high - low)


def test_the_interval_goes_with_the_seed_and_holds_the_figure() -> None:
    judged = judged_of(RECORDED, "failed judgements")
    found = length_controlled(judged)
    intervals = [
        bootstrap_length_controlled(judged, found.c, resamples=100, seed=seed) for seed in (1, 1, 2)
    ]
    assert intervals[0] == intervals[1] != intervals[2]
    assert intervals[0][0] < found.win_rate < intervals[0][1]


def test_a_resample_without_a_judgement_does_not_count() -> None:
    judged = small(preference=[2.0, 1.0, 1.75, *[math.nan] * 17])
    assert math.isnan(refit_of(judged, 1.0)(np.full(20, 19)))
    low, high = bootstrap_length_controlled(judged, 1.0, resamples=200)
    assert 0 < low < high < 100


def small(
    preference: list[float],
    delta: NDArray[np.int64] | None = None,
    gamed: bool = True,
) -> Judged:
    """A few pairs beside the recorded gamed rows."""
    drawn = judged_of(RECORDED, "soft")
    assert drawn.difficulty is not None
    count = len(preference)
    baseline = drawn.baseline_lengths[:count]
    return Judged(
        np.asarray(preference),
        baseline,
        drawn.model_lengths[:count] if delta is None else baseline - delta,
        drawn.difficulty[:count],
        drawn.gamed if gamed else None,
    )


@pytest.mark.parametrize("gamed", [True, False])
def test_answers_as_long_as_the_baselines_leave_the_win_rate(gamed: bool) -> None:
    preference = np.random.default_rng(1).uniform(1.2, 2.0, 100).tolist()
    found = length_controlled(small(preference, np.zeros(100, dtype=np.int64), gamed=gamed))
    assert found.win_rate == pytest.approx(100 * (np.mean(preference) - 1), abs=1.0)


def test_one_difference_everywhere_is_refused_without_the_gamed_rows() -> None:
    preference, delta = [2.0, 1.0, 1.5, 2.0, 2.0, 1.0], np.full(6, -30)
    with pytest.raises(EvalError, match="each answer differs from the baseline's by 30 characters"):
        length_controlled(small(preference, delta, gamed=False))
    assert 50 < length_controlled(small(preference, delta)).win_rate < 100


def test_fewer_than_five_judgements_are_refused() -> None:
    with pytest.raises(EvalError, match="4 of 6 pairs are judged; length control needs 5"):
        length_controlled(small([2.0, 1.0, math.nan, 1.5, 1.0, math.nan]))


@pytest.mark.parametrize("value", [1.0, 1.5, 1.7, 2.0])
@pytest.mark.parametrize("gamed", [True, False])
def test_judgements_that_are_all_the_same_give_that_win_rate(value: float, gamed: bool) -> None:
    found = length_controlled(small([value] * 60, gamed=gamed))
    assert found.win_rate == pytest.approx(100 * (value - 1), abs=1.0)


def test_a_fit_that_the_penalty_emptied_is_told() -> None:
    assert not length_controlled(judged_of(RECORDED, "soft")).is_shrunk
    judged = judged_of(RECORDED, "few judgements")
    found = length_controlled(judged)
    assert found.is_shrunk
    assert found.win_rate == 50
    assert bootstrap_length_controlled(judged, found.c, resamples=20) == (50, 50)


def test_the_baseline_against_itself_is_half() -> None:
    found = baseline_itself(3)
    assert isinstance(found, LengthControlled)
    assert (found.win_rate, found.standard_error) == (50.0, 0.0)
    assert found.coefficients[MODEL] == 0
    assert not found.is_shrunk
    assert found.predictions.tolist() == [0.5] * 3
