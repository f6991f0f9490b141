"""Robust DPO: without bias under flips, and without a minimum."""

import pytest

from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.robust_dpo import RobustDPO
from tests.objectives.rewards import loss_and_pulls


@pytest.mark.parametrize("gap", [-40.0, 0.0, 3.0, 40.0])
def test_its_mean_over_flipped_labels_is_dpo_on_the_true_ones(gap: float) -> None:
    kept = loss_and_pulls(RobustDPO(label_smoothing=0.3), gap, 0.0)
    flipped = loss_and_pulls(RobustDPO(label_smoothing=0.3), 0.0, gap)
    expected = loss_and_pulls(DPO(), gap, 0.0)
    assert 0.7 * kept[0] + 0.3 * flipped[0] == pytest.approx(expected[0])
    assert 0.7 * kept[1] + 0.3 * flipped[2] == pytest.approx(expected[1])


def test_without_flips_it_is_dpo() -> None:
    plain = RobustDPO(label_smoothing=0.0)
    assert loss_and_pulls(plain, 4.0, 1.0) == pytest.approx(loss_and_pulls(DPO(), 4.0, 1.0))


def test_it_falls_without_end_and_cdpo_turns() -> None:
    robust, cdpo = RobustDPO(label_smoothing=0.1), DPO(label_smoothing=0.1)
    assert loss_and_pulls(robust, 2000.0, 0.0)[1] == pytest.approx(-0.1 * 0.1 / 0.8)
    assert loss_and_pulls(robust, 4000.0, 0.0)[0] < loss_and_pulls(robust, 2000.0, 0.0)[0] < -20
    assert loss_and_pulls(cdpo, 2000.0, 0.0)[1] > 0
