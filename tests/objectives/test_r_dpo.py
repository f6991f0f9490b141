"""R-DPO: what the lengths explain need not be learnt."""

import math

import pytest

from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.r_dpo import RDPO
from tests.objectives.rewards import loss_and_pulls


def test_by_hand() -> None:
    objective = RDPO(beta=0.2, length_penalty=0.05)
    loss, *_ = loss_and_pulls(objective, 1.0, -1.5, tokens=(30, 10))
    assert loss == pytest.approx(math.log1p(math.exp(-(0.2 * 2.5 + 0.05 * 20))))


def test_the_length_term_has_the_precision_of_the_log_probs() -> None:
    loss, *_ = loss_and_pulls(RDPO(length_penalty=0.01), 1.0, -1.5, tokens=(30, 10))
    assert loss == pytest.approx(math.log1p(math.exp(-(0.1 * 2.5 + 0.01 * 20))), rel=1e-12)


def test_a_longer_chosen_response_pulls_less_and_a_shorter_one_more() -> None:
    pulls = [loss_and_pulls(RDPO(), 0.0, 0.0, tokens=t)[1] for t in ((90, 10), (50, 50), (10, 90))]
    assert pulls[0] > pulls[1] > pulls[2]
    assert pulls[1] == pytest.approx(loss_and_pulls(DPO(), 0.0, 0.0)[1])


def test_without_a_penalty_it_is_dpo() -> None:
    plain = RDPO(length_penalty=0.0)
    found = loss_and_pulls(plain, 4.0, 1.0, tokens=(90, 10))
    assert found == pytest.approx(loss_and_pulls(DPO(), 4.0, 1.0))


def test_the_weight_leaves_the_lengths_alone() -> None:
    plugged = RDPO(beta=0.2, length_penalty=0.05, dispersion=True)
    loss, *_ = loss_and_pulls(plugged, 1.0, -1.5, tokens=(30, 10), weight=3.0)
    assert loss == pytest.approx(math.log1p(math.exp(-(3 * 0.2 * 2.5 + 0.05 * 20))))
