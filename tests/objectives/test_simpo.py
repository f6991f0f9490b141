"""SimPO: its arithmetic, where gamma stands, and what it is the special case of."""

import math

import pytest
import torch

from mallowspo_cli.objectives import PairScores, ReferenceScores
from mallowspo_cli.objectives.mallows import MallowsTheta
from mallowspo_cli.objectives.simpo import SimPO

# By hand: mean log-probs -10/4 = -2.5 and -18/6 = -3.
POLICY = PairScores(
    torch.tensor([-10.0]), torch.tensor([-18.0]), torch.tensor([4]), torch.tensor([6])
)


def test_loss_and_rewards_by_hand() -> None:
    output = SimPO(beta=2.0, home_advantage=0.3)(POLICY, None)
    assert output.losses.item() == pytest.approx(math.log1p(math.exp(-2.0 * (0.5 - 0.3))))
    assert output.chosen_rewards.item() == pytest.approx(-5.0)
    assert output.rejected_rewards.item() == pytest.approx(-6.0)


def test_the_papers_gamma_is_beta_times_the_home_advantage() -> None:
    beta, gamma = 2.5, 1.4
    output = SimPO(beta=beta, home_advantage=gamma / beta)(POLICY, None)
    assert output.losses.item() == pytest.approx(math.log1p(math.exp(-(beta * 0.5 - gamma))))


def test_it_is_length_normalised_theta_with_a_flat_reference_and_unit_weight() -> None:
    zero = torch.zeros(1)
    flat = ReferenceScores(
        zero, zero, POLICY.chosen_tokens, POLICY.rejected_tokens, torch.tensor([0.5])
    )
    simpo = SimPO(beta=2.0, home_advantage=0.0)(POLICY, None)
    theta = MallowsTheta(beta=2.0, length_normalised=True)(POLICY, flat)
    torch.testing.assert_close(simpo.losses, theta.losses)


def test_it_asks_for_nothing_from_the_reference() -> None:
    assert not SimPO().needs_reference
    assert not SimPO().needs_dispersion


def test_summed_log_probs_on_request() -> None:
    output = SimPO(beta=0.1, home_advantage=1.0, length_normalised=False)(POLICY, None)
    assert output.losses.item() == pytest.approx(math.log1p(math.exp(-0.1 * (8 - 1))))
