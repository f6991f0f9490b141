"""RainbowPO: the loss by hand, and the methods it turns into."""

import math

import pytest
import torch
from torch import Tensor

from mallowspo_cli.objectives import Objective, PairScores, ReferenceScores
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.mallows import MallowsTheta
from mallowspo_cli.objectives.rainbow import RainbowPO
from mallowspo_cli.objectives.sft import SFT
from mallowspo_cli.objectives.simpo import SimPO

CHOSEN_TOKENS, REJECTED_TOKENS = torch.tensor([4, 10, 2]), torch.tensor([6, 3, 9])


def pairs(weights: Tensor) -> tuple[PairScores, ReferenceScores]:
    tokens = (CHOSEN_TOKENS, REJECTED_TOKENS)
    policy = PairScores(
        torch.tensor([-10.0, -7.0, -1.0], dtype=torch.float64, requires_grad=True),
        torch.tensor([-18.0, -2.0, -30.0], dtype=torch.float64, requires_grad=True),
        *tokens,
    )
    reference = ReferenceScores(
        torch.tensor([-12.0, -9.0, -1.5], dtype=torch.float64),
        torch.tensor([-15.0, -2.5, -20.0], dtype=torch.float64),
        *tokens,
        weights / 2,
    )
    return policy, reference


def loss_and_gradients(
    objective: Objective, policy: PairScores, reference: ReferenceScores | None
) -> tuple[Tensor, ...]:
    losses = objective(policy, reference).losses
    return losses, *torch.autograd.grad(losses.sum(), (policy.chosen_logps, policy.rejected_logps))


UNIT = torch.ones(3, dtype=torch.float64)
VARIED = torch.tensor([0.5, 1.0, 1.6], dtype=torch.float64)


def test_loss_by_hand() -> None:
    policy, reference = pairs(VARIED)
    output = RainbowPO(beta=10, mixing=0.25, home_advantage=0.1)(policy, reference)
    # First pair: means -2.5 and -3, reference -3 and -2.5, weight 0.5.
    inside = (-2.5 + 3) - 0.25 * (-3 + 2.5) - 0.75 * 0.1
    assert output.losses[0].item() == pytest.approx(math.log1p(math.exp(-0.5 * 10 * inside)))
    assert output.metrics["weighted_margin"][0].item() == pytest.approx(0.5 * 10 * inside)
    assert output.chosen_rewards[0].item() == pytest.approx(10 * (-2.5 + 0.25 * 3))
    assert output.rejected_rewards[0].item() == pytest.approx(10 * (-3 + 0.25 * 2.5))


@pytest.mark.parametrize("home_advantage", [0.0, 0.5])
def test_full_mixing_is_length_normalised_dpo_whatever_the_home_advantage(
    home_advantage: float,
) -> None:
    policy, reference = pairs(UNIT)
    rainbow = RainbowPO(beta=3, mixing=1, home_advantage=home_advantage)
    torch.testing.assert_close(
        loss_and_gradients(rainbow, policy, reference),
        loss_and_gradients(DPO(beta=3, length_normalised=True), policy, reference),
    )


def test_full_mixing_is_length_normalised_theta_at_any_weight() -> None:
    policy, reference = pairs(VARIED)
    torch.testing.assert_close(
        loss_and_gradients(RainbowPO(beta=3, mixing=1), policy, reference),
        loss_and_gradients(MallowsTheta(beta=3, length_normalised=True), policy, reference),
    )


def test_no_mixing_is_simpo() -> None:
    policy, reference = pairs(UNIT)
    rainbow = RainbowPO(beta=3, mixing=0, home_advantage=0.4)
    torch.testing.assert_close(
        loss_and_gradients(rainbow, policy, reference),
        loss_and_gradients(SimPO(beta=3, home_advantage=0.4), policy, None),
    )
    simpo = SimPO(beta=3)(policy, None)
    torch.testing.assert_close(rainbow(policy, reference).chosen_rewards, simpo.chosen_rewards)


def test_no_mixing_reads_no_reference_log_probs_but_still_the_dispersion() -> None:
    rainbow = RainbowPO(mixing=0)
    assert not rainbow.needs_reference
    assert rainbow.needs_dispersion
    assert RainbowPO().needs_reference
    policy, reference = pairs(VARIED)
    nothing = torch.full((3,), torch.nan)
    blank = ReferenceScores(nothing, nothing, CHOSEN_TOKENS, REJECTED_TOKENS, reference.neg_log_phi)
    torch.testing.assert_close(rainbow(policy, blank).losses, rainbow(policy, reference).losses)


def test_the_weight_multiplies_the_home_advantage_too() -> None:
    policy, reference = pairs(VARIED)
    weighted = RainbowPO(beta=3, home_advantage=0.4)(policy, reference).losses
    for index, weight in enumerate(VARIED.tolist()):
        plain = RainbowPO(beta=3 * weight, home_advantage=0.4)(*pairs(UNIT)).losses
        assert weighted[index].item() == pytest.approx(plain[index].item())


def test_the_sft_term_adds_the_chosen_mean_token_nll() -> None:
    policy, reference = pairs(VARIED)
    plain, added = (
        RainbowPO(sft_coefficient=coefficient)(policy, reference).losses
        for coefficient in (0.0, 0.3)
    )
    torch.testing.assert_close(added - plain, 0.3 * SFT()(policy, None).losses)
