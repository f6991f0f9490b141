"""IPO: both scalings by hand, and where each is zero."""

import pytest
import torch

from mallowspo_cli.objectives import PairScores, ReferenceScores
from mallowspo_cli.objectives.ipo import IPO

# By hand: log-ratios 2 and -3, gap 5; means 2/4 and -3/6, gap 1.
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


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, (0.2 * 5 - 0.5) ** 2),
        ({"scaling": "target"}, (5 - 2.5) ** 2),
        ({"length_normalised": True}, (0.2 * 1 - 0.5) ** 2),
        ({"length_normalised": True, "scaling": "target"}, (1 - 2.5) ** 2),
    ],
)
def test_loss_by_hand(knobs: dict[str, object], expected: float) -> None:
    assert IPO(beta=0.2, **knobs)(POLICY, REFERENCE).losses.item() == pytest.approx(expected)


@pytest.mark.parametrize("scaling", ["margin", "target"])
def test_loss_is_zero_at_the_target_gap(scaling: str) -> None:
    objective = IPO(beta=0.1, scaling=scaling)
    assert objective(POLICY, REFERENCE).losses.item() == pytest.approx(0, abs=1e-10)
    assert IPO(beta=0.09, scaling=scaling)(POLICY, REFERENCE).losses.item() > 1e-3


def test_rewards_are_beta_times_the_log_ratios_in_both_scalings() -> None:
    for scaling in ("margin", "target"):
        output = IPO(beta=0.2, scaling=scaling)(POLICY, REFERENCE)
        assert output.chosen_rewards.item() == pytest.approx(0.4)
        assert output.rejected_rewards.item() == pytest.approx(-0.6)
