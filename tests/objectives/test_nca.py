"""NCA: each reward has a place of its own to go to."""

import math

import pytest

from mallowspo_cli.objectives.nca import NCA
from tests.objectives.rewards import loss_and_pulls


def test_it_starts_at_twice_log_two_with_a_quarter_of_beta_on_each() -> None:
    assert loss_and_pulls(NCA(), 0.0, 0.0) == pytest.approx((2 * math.log(2), -0.025, 0.025))


@pytest.mark.parametrize("rejected", [-300.0, 0.0, 300.0])
def test_the_chosen_reward_is_drawn_to_log_two_whatever_the_other_is(
    rejected: float,
) -> None:
    target = math.log(2) / 0.1
    assert loss_and_pulls(NCA(), target, rejected)[1] == pytest.approx(0, abs=1e-12)
    assert loss_and_pulls(NCA(), target - 1, rejected)[1] < 0
    assert loss_and_pulls(NCA(), target + 1, rejected)[1] > 0


def test_the_rejected_one_is_pushed_less_and_less() -> None:
    pushes = [loss_and_pulls(NCA(), 0.0, h)[2] for h in (20.0, 0.0, -20.0, -400.0)]
    assert pushes == sorted(pushes, reverse=True)
    assert pushes[-1] == pytest.approx(0, abs=1e-12)


def test_the_weight_divides_the_log_ratio_that_the_chosen_one_is_drawn_to() -> None:
    plugged = NCA(dispersion=True)
    found = loss_and_pulls(plugged, math.log(2) / (0.1 * 1.5), 0.0, weight=1.5)
    assert found[1] == pytest.approx(0, abs=1e-12)
