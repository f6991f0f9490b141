"""APO: where the chosen response goes."""

import math

import pytest

from mallowspo_cli.objectives.apo import APODown, APOZero
from tests.objectives.rewards import loss_and_pulls


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(("r_w", "r_l"), [(0.0, 0.0), (1.5, -2.0), (-3.0, 1.0)])
def test_they_are_the_papers_losses_and_one(r_w: float, r_l: float) -> None:
    zero, down = -sigma(r_w) + sigma(r_l), sigma(r_w) - sigma(r_w - r_l)
    assert loss_and_pulls(APOZero(beta=0.1), 10 * r_w, 10 * r_l)[0] == pytest.approx(zero + 1)
    assert loss_and_pulls(APODown(beta=0.1), 10 * r_w, 10 * r_l)[0] == pytest.approx(down + 1)


def test_at_the_reference_zero_moves_both_and_down_the_rejected_alone() -> None:
    assert loss_and_pulls(APOZero(), 0.0, 0.0) == pytest.approx((1, -0.025, 0.025))
    assert loss_and_pulls(APODown(), 0.0, 0.0) == pytest.approx((1, 0, 0.025))


def test_down_pushes_the_chosen_one_while_it_is_nearer_to_zero_than_to_the_rejected() -> None:
    assert loss_and_pulls(APODown(), -10.0, -30.0)[1] > 0
    assert loss_and_pulls(APODown(), -10.0, -20.0)[1] == pytest.approx(0, abs=1e-12)
    assert loss_and_pulls(APODown(), -10.0, -15.0)[1] < 0


@pytest.mark.parametrize("log_ratio", [-400.0, 400.0])
def test_the_pull_dies_away_on_both_sides(log_ratio: float) -> None:
    for objective in (APOZero(), APODown()):
        _, chosen, rejected = loss_and_pulls(objective, log_ratio, -log_ratio)
        assert abs(chosen) < 1e-12
        assert abs(rejected) < 1e-12
