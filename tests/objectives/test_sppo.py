"""SPPO with hard labels: a target for each response."""

import pytest

from mallowspo_cli.objectives.ipo import IPO, Scaling
from mallowspo_cli.objectives.sppo import SPPOHard
from tests.objectives.rewards import loss_and_pulls


def test_it_is_the_papers_form_in_log_ratios() -> None:
    found = loss_and_pulls(SPPOHard(beta=0.2), 1.0, 3.0)
    assert found == pytest.approx(((1 - 2.5) ** 2 + (3 + 2.5) ** 2, 2 * (1 - 2.5), 2 * (3 + 2.5)))


def test_it_holds_both_log_ratios_where_ipo_holds_their_gap() -> None:
    ipo = IPO(beta=0.1, scaling=Scaling.target)
    assert loss_and_pulls(SPPOHard(), 5.0, -5.0) == pytest.approx((0, 0, 0), abs=1e-9)
    assert loss_and_pulls(SPPOHard(), 25.0, 15.0)[0] == pytest.approx(2 * 20**2)
    assert loss_and_pulls(ipo, 105.0, 100.0)[0] == pytest.approx(0, abs=1e-9)


def test_the_targets_are_divided_by_the_weight() -> None:
    plugged = SPPOHard(dispersion=True)
    assert loss_and_pulls(plugged, 2.5, -2.5, weight=2.0) == pytest.approx((0, 0, 0), abs=1e-9)
