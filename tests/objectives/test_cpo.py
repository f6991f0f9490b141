"""CPO: a flat reference, and the likelihood beside it."""

import math
from dataclasses import fields

import pytest
import torch

from mallowspo_cli.objectives import PairScores, ReferenceScores
from mallowspo_cli.objectives.cpo import CPO
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.simpo import SimPO

POLICY = PairScores(
    torch.tensor([-10.0, -31.0]),
    torch.tensor([-18.0, -30.0]),
    torch.tensor([4, 12]),
    torch.tensor([6, 20]),
)


def test_by_hand() -> None:
    output = CPO(beta=0.2, sft_coefficient=0.5)(POLICY, None)
    assert output.losses[0].item() == pytest.approx(math.log1p(math.exp(-0.2 * 8)) + 0.5 * 10 / 4)
    assert output.chosen_rewards[0].item() == pytest.approx(-2.0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_its_first_term_is_dpo_with_a_flat_reference(
    label_smoothing: float,
) -> None:
    flat = torch.full((2,), -7.0)
    reference = ReferenceScores(
        flat, flat, POLICY.chosen_tokens, POLICY.rejected_tokens, torch.full((2,), 0.5)
    )
    found = CPO(sft_coefficient=0.0, label_smoothing=label_smoothing)(POLICY, None)
    expected = DPO(label_smoothing=label_smoothing)(POLICY, reference)
    torch.testing.assert_close(found.losses, expected.losses)


def test_length_normalised_without_the_likelihood_it_is_simpo() -> None:
    found = CPO(beta=2.0, length_normalised=True, sft_coefficient=0.0)(POLICY, None)
    expected = SimPO(beta=2.0, home_advantage=0.0)(POLICY, None)
    for field in fields(found):
        torch.testing.assert_close(getattr(found, field.name), getattr(expected, field.name))
