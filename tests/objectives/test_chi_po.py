"""chi-PO: harder on what becomes likelier, DPO on what becomes unlikely."""

import math

import pytest

from mallowspo_cli.objectives.chi_po import ChiPO
from mallowspo_cli.objectives.dpo import DPO
from tests.objectives.rewards import loss_and_pulls


def test_it_starts_twice_as_steep_as_dpo() -> None:
    found, dpo = (loss_and_pulls(loss, 0.0, 0.0) for loss in (ChiPO(), DPO()))
    assert found == pytest.approx((dpo[0], 2 * dpo[1], 2 * dpo[2]))


def test_a_log_ratio_of_five_nats_counts_as_a_hundred_and_fifty_three() -> None:
    loss, *_ = loss_and_pulls(ChiPO(beta=0.01), 5.0, -1000.0)
    # 153.4 for the chosen, -1000 for the rejected response.
    assert math.exp(5) + 5 == pytest.approx(153.4, abs=0.05)
    assert loss == pytest.approx(math.log1p(math.exp(-0.01 * (math.exp(5) + 5 + 1000))))


def test_it_is_dpo_where_both_have_become_far_less_likely() -> None:
    found, dpo = (loss_and_pulls(loss, -50.0, -70.0) for loss in (ChiPO(), DPO()))
    assert found == pytest.approx(dpo)


@pytest.mark.parametrize("sign", [1, -1])
def test_outside_the_clip_there_is_no_gradient(sign: int) -> None:
    loss, *pulls = loss_and_pulls(ChiPO(reward_bound=3.0), -100.0, -100.0 - sign * 61)
    assert loss == pytest.approx(math.log1p(math.exp(-sign * 6)))
    assert pulls == [0, 0]
    assert loss_and_pulls(ChiPO(reward_bound=3.0), -100.0, -100.0 - sign * 59)[1] < 0
