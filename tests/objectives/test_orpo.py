"""ORPO: its odds, and what they tend to."""

import math

import pytest
import torch

from mallowspo_cli.objectives import PairScores
from mallowspo_cli.objectives.orpo import ORPO
from mallowspo_cli.objectives.sft import SFT
from mallowspo_cli.objectives.simpo import SimPO


def pair(chosen: float, rejected: float, tokens: tuple[int, int]) -> PairScores:
    return PairScores(
        torch.tensor([chosen], dtype=torch.float64, requires_grad=True),
        torch.tensor([rejected], dtype=torch.float64, requires_grad=True),
        torch.tensor(tokens[:1]),
        torch.tensor(tokens[1:]),
    )


def test_by_hand() -> None:
    # Probabilities per token 1/2 and 1/4: odds 1 and 1/3.
    output = ORPO(beta=0.3)(pair(4 * math.log(0.5), 6 * math.log(0.25), (4, 6)), None)
    assert output.losses.item() == pytest.approx(math.log(2) + 0.3 * math.log(1 + 1 / 3))
    assert output.chosen_rewards.item() == pytest.approx(0.3 * math.log(0.5))


def test_for_small_probabilities_the_second_term_is_simpos() -> None:
    policy = pair(-90.0, -150.0, (3, 6))
    simpo = SimPO(beta=1.0, home_advantage=0.0)(policy, None).losses
    found = ORPO(beta=1.0)(policy, None).losses - SFT()(policy, None).losses
    torch.testing.assert_close(found, simpo)


def test_an_empty_response_has_finite_odds_and_no_pull_from_them() -> None:
    policy = pair(0.0, -3.0, (0, 2))
    losses = ORPO()(policy, None).losses
    chosen, rejected = torch.autograd.grad(
        losses.sum(), (policy.chosen_logps, policy.rejected_logps)
    )
    assert torch.isfinite(losses).all()
    assert chosen.item() == -1  # of -l_w alone
    assert rejected.item() > 0
