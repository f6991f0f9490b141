"""f-DPO: its divergences, and what they tend to."""

import math

import pytest

from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.f_dpo import FDPO, Divergence
from tests.objectives.rewards import loss_and_pulls

PLACES = [(0.0, 0.0), (3.0, -2.0), (-4.0, 1.0)]


@pytest.mark.parametrize(("chosen", "rejected"), PLACES)
def test_reverse_kl_is_dpo(chosen: float, rejected: float) -> None:
    found = loss_and_pulls(FDPO(divergence=Divergence.reverse_kl), chosen, rejected)
    assert found == pytest.approx(loss_and_pulls(DPO(), chosen, rejected))


@pytest.mark.parametrize(("chosen", "rejected"), PLACES)
def test_alpha_lies_between_dpo_and_the_forward_kl(chosen: float, rejected: float) -> None:
    low, high = (FDPO(divergence=Divergence.alpha, alpha=a) for a in (1e-7, 1 - 1e-7))
    forward = FDPO(divergence=Divergence.forward_kl)
    assert loss_and_pulls(low, chosen, rejected) == pytest.approx(
        loss_and_pulls(DPO(), chosen, rejected), rel=1e-4
    )
    assert loss_and_pulls(high, chosen, rejected) == pytest.approx(
        loss_and_pulls(forward, chosen, rejected), rel=1e-4
    )


def test_js_starts_half_as_steep_as_dpo_and_the_others_as_steep() -> None:
    pulls = {d: loss_and_pulls(FDPO(divergence=d), 0.0, 0.0)[1] for d in Divergence}
    assert pulls.pop(Divergence.js) == pytest.approx(-0.025)
    assert list(pulls.values()) == pytest.approx([-0.05] * 3)


@pytest.mark.parametrize(
    ("divergence", "most"),
    [(Divergence.forward_kl, 1.0), (Divergence.js, math.log(2)), (Divergence.alpha, 1 / 0.5)],
)
def test_a_chosen_response_gains_so_much_at_most_by_becoming_likelier(
    divergence: Divergence, most: float
) -> None:
    loss, *_ = loss_and_pulls(FDPO(beta=1.0, divergence=divergence), 500.0, 0.0)
    assert loss == pytest.approx(math.log1p(math.exp(-most)))


def test_a_chosen_response_far_behind_is_still_pulled() -> None:
    for divergence in Divergence:
        assert loss_and_pulls(FDPO(divergence=divergence), -300.0, 0.0)[1] <= -0.09
