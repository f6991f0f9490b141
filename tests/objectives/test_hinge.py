"""The hinge: what its docstring says of the pull."""

import pytest

from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.hinge import Hinge
from tests.objectives.rewards import loss_and_pulls


def test_by_hand() -> None:
    assert loss_and_pulls(Hinge(beta=0.2), 1.0, -1.5)[0] == pytest.approx(1 - 0.2 * 2.5)


def test_the_pull_is_beta_up_to_the_target_gap_and_none_beyond() -> None:
    assert loss_and_pulls(Hinge(beta=0.2), 2.4, -2.5) == pytest.approx((0.02, -0.2, 0.2))
    assert loss_and_pulls(Hinge(beta=0.2), 2.6, -2.5) == (0, 0, 0)


def test_the_pull_is_twice_dpos_at_the_start_and_dpos_far_behind() -> None:
    at_start = [loss_and_pulls(loss(beta=0.2), 0.0, 0.0)[1] for loss in (Hinge, DPO)]
    behind = [loss_and_pulls(loss(beta=0.2), -500.0, 0.0)[1] for loss in (Hinge, DPO)]
    assert at_start == pytest.approx([-0.2, -0.1])
    assert behind == pytest.approx([-0.2, -0.2])


def test_the_target_gap_is_divided_by_the_weight() -> None:
    plugged = Hinge(beta=0.2, dispersion=True)
    assert loss_and_pulls(plugged, 1.24, -1.25, weight=2.0)[1] == pytest.approx(-0.4)
    assert loss_and_pulls(plugged, 1.26, -1.25, weight=2.0)[1] == 0
