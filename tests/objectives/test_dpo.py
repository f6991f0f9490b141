"""DPO: its arithmetic, label smoothing and length normalisation."""

import math

import pytest
import torch

from mallowspo_cli.objectives import PairScores, ReferenceScores
from mallowspo_cli.objectives.dpo import DPO

# By hand: log-ratios -10 + 12 = 2 and -20 + 17 = -3, so Delta = 5; means 2/4 and -3/6, Delta = 1.
POLICY = PairScores(
    torch.tensor([-10.0]), torch.tensor([-20.0]), torch.tensor([4]), torch.tensor([6])
)
REFERENCE = ReferenceScores(
    torch.tensor([-12.0]),
    torch.tensor([-17.0]),
    torch.tensor([4]),
    torch.tensor([6]),
    torch.tensor([9.0]),
)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_loss_and_rewards_by_hand() -> None:
    output = DPO(beta=0.2)(POLICY, REFERENCE)
    assert output.losses.item() == pytest.approx(-log_sigmoid(0.2 * 5))
    assert output.chosen_rewards.item() == pytest.approx(0.4)
    assert output.rejected_rewards.item() == pytest.approx(-0.6)


def test_label_smoothing_mixes_in_the_flipped_label() -> None:
    output = DPO(beta=0.2, label_smoothing=0.1)(POLICY, REFERENCE)
    expected = -0.9 * log_sigmoid(1.0) - 0.1 * log_sigmoid(-1.0)
    assert output.losses.item() == pytest.approx(expected)


def test_length_normalised_uses_mean_log_probs_in_loss_and_rewards() -> None:
    output = DPO(beta=2.0, length_normalised=True)(POLICY, REFERENCE)
    assert output.losses.item() == pytest.approx(-log_sigmoid(2.0 * (0.5 + 0.5)))
    assert output.chosen_rewards.item() == pytest.approx(1.0)
    assert output.rejected_rewards.item() == pytest.approx(-1.0)


def test_at_the_reference_the_loss_is_log_two_and_the_pull_half_beta() -> None:
    chosen = torch.tensor([-12.0], requires_grad=True)
    policy = PairScores(chosen, torch.tensor([-17.0]), torch.tensor([4]), torch.tensor([6]))
    losses = DPO(beta=0.2)(policy, REFERENCE).losses
    losses.sum().backward()
    assert losses.item() == pytest.approx(math.log(2))
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.1)
