"""SFT: the mean token negative log-likelihood of the chosen responses."""

import pytest
import torch

from mallowspo_cli.objectives import PairScores
from mallowspo_cli.objectives.sft import SFT


def policy() -> PairScores:
    return PairScores(
        torch.tensor([-6.0, -20.0], requires_grad=True),
        torch.tensor([-8.0, -3.0], requires_grad=True),
        torch.tensor([3, 5]),
        torch.tensor([2, 3]),
    )


def test_loss_is_the_mean_over_tokens_and_rewards_are_mean_log_probs() -> None:
    output = SFT()(policy(), None)
    assert output.losses.tolist() == pytest.approx([2.0, 4.0])
    assert output.chosen_rewards.tolist() == pytest.approx([-2.0, -4.0])
    assert output.rejected_rewards.tolist() == pytest.approx([-4.0, -1.0])


def test_only_the_chosen_response_is_trained_on() -> None:
    scores = policy()
    SFT()(scores, None).losses.sum().backward()
    assert scores.chosen_logps.grad is not None
    assert scores.chosen_logps.grad.tolist() == pytest.approx([-1 / 3, -1 / 5])
    assert scores.rejected_logps.grad is None


def test_it_asks_for_nothing_from_the_reference() -> None:
    assert not SFT().needs_reference
    assert not SFT().needs_dispersion
