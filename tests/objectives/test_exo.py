"""EXO: its target margin, and the pairs that it gives up."""

import math

import pytest

from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.exo import EXO
from tests.objectives.rewards import loss_and_pulls


def test_it_is_zero_and_flat_at_the_target_margin() -> None:
    target = math.log(0.999 / 0.001)
    assert target == pytest.approx(6.9, abs=0.01)
    assert loss_and_pulls(EXO(), 10 * target, 0.0) == pytest.approx((0, 0, 0), abs=1e-12)
    assert loss_and_pulls(EXO(), 10 * target - 1, 0.0)[1] < 0
    assert loss_and_pulls(EXO(), 10 * target + 1, 0.0)[1] > 0


@pytest.mark.parametrize("margin", [-5.0, 0.0, 2.0])
def test_the_slope_is_that_of_the_docstring(margin: float) -> None:
    share = 1 / (1 + math.exp(-margin))
    slope = share * (1 - share) * (margin - math.log(0.9 / 0.1))
    objective = EXO(beta=0.2, label_smoothing=0.1)
    assert loss_and_pulls(objective, 5 * margin, 0.0)[1] == pytest.approx(0.2 * slope)


def test_pairs_far_behind_are_hardly_pulled_where_dpo_pulls_hardest() -> None:
    assert loss_and_pulls(EXO(), -400.0, 0.0)[1] == pytest.approx(0, abs=1e-12)
    assert loss_and_pulls(DPO(), -400.0, 0.0)[1] == pytest.approx(-0.1)


def test_smoothed_dpo_is_the_kl_the_other_way_round_and_a_constant() -> None:
    def kl(margin: float) -> float:
        q = 1 / (1 + math.exp(-margin))
        return 0.9 * math.log(0.9 / q) + 0.1 * math.log(0.1 / (1 - q))

    smoothed = DPO(beta=0.1, label_smoothing=0.1)
    constant = [loss_and_pulls(smoothed, 10 * m, 0.0)[0] - kl(m) for m in (-3.0, 0.0, 4.0)]
    assert constant == pytest.approx([constant[0]] * 3)


def test_the_weight_brings_the_target_gap_nearer() -> None:
    gap = math.log(0.999 / 0.001) / (0.1 * 2)
    plugged = EXO(dispersion=True)
    assert loss_and_pulls(plugged, gap, 0.0, weight=2.0)[0] == pytest.approx(0, abs=1e-12)
