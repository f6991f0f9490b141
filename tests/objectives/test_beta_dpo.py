"""beta-DPO: a beta that follows the gaps of earlier steps."""

import math

import pytest
import torch

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.objectives.base import PairScores, ReferenceScores
from mallowspo_cli.objectives.beta_dpo import BetaDPO
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.mallows import MallowsTheta

TOKENS = torch.tensor([4, 6, 9])


def drawn(seed: int) -> tuple[PairScores, ReferenceScores]:
    generator = torch.Generator().manual_seed(seed)
    values = -60 * torch.rand(4, 3, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.5, 1.0, 1.6], dtype=torch.float64)
    policy = PairScores(values[0], values[1], TOKENS, TOKENS)
    return policy, ReferenceScores(values[2], values[3], TOKENS, TOKENS, weights / 2)


def gap(policy: PairScores, reference: ReferenceScores) -> torch.Tensor:
    """(B,) nats."""
    ours = policy.chosen_logps - policy.rejected_logps
    return ours - (reference.chosen_logps - reference.rejected_logps)


@pytest.mark.parametrize("dispersion", [False, True])
def test_beta_follows_the_authors_recursion_one_step_late(dispersion: bool) -> None:
    objective, running = BetaDPO(beta=0.2, dispersion=dispersion), {}
    expected_beta, usual, betas = 0.2, 0.0, []
    for step in range(6):
        policy, reference = drawn(step)
        loss = objective.at_step(running)
        output = loss(policy, reference)
        gaps = gap(policy, reference)
        if dispersion:
            gaps = 2 * reference.neg_log_phi * gaps
        expected = torch.log1p(torch.exp(-expected_beta * gaps))
        torch.testing.assert_close(output.losses, expected, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(
            output.metrics["beta"], torch.full((3,), expected_beta, dtype=torch.float64)
        )
        margins = output.chosen_rewards - output.rejected_rewards
        values = {"rewards/margins": float(margins.mean())}
        values |= {f"objective/{k}": float(v.mean()) for k, v in output.metrics.items()}
        running = loss.updated(values)
        # In the authors' code the step's own gaps: first the average, then beta from both.
        mean = float(gaps.mean())
        usual = 0.9 * usual + 0.1 * mean
        expected_beta = max(0.2 * (1 + 0.6 * (mean - usual)), 1e-3)
        betas.append(expected_beta)
    assert min(betas) == 1e-3
    assert max(betas) > 0.4


def test_without_earlier_steps_and_without_sensitivity_it_is_dpo() -> None:
    policy, reference = drawn(0)
    expected = DPO(beta=0.2)(policy, reference)
    for loss in (
        BetaDPO(beta=0.2),
        BetaDPO(beta=0.2, sensitivity=0.0).at_step({"gap": 9.0, "usual_gap": -9.0}),
    ):
        found = loss(policy, reference)
        torch.testing.assert_close(found.losses, expected.losses)
        assert torch.equal(found.chosen_rewards, expected.chosen_rewards)
    weighted = BetaDPO(beta=0.2, dispersion=True)(policy, reference)
    torch.testing.assert_close(weighted.losses, MallowsTheta(beta=0.2)(policy, reference).losses)


def test_rewards_are_logged_with_beta_itself() -> None:
    policy, reference = drawn(0)
    output = BetaDPO(beta=0.2).at_step({"gap": 3.0, "usual_gap": 1.0})(policy, reference)
    expected = 0.2 * (policy.chosen_logps - reference.chosen_logps)
    torch.testing.assert_close(output.chosen_rewards, expected)
    assert output.metrics["beta"][0].item() == pytest.approx(0.2 * (1 + 0.6 * 2))


@pytest.mark.parametrize(
    ("knob", "bad"),
    [("sensitivity", -0.1), ("sensitivity", math.inf), ("decay", 1.0), ("decay", -0.1)],
)
def test_a_knob_out_of_range_is_refused(knob: str, bad: float) -> None:
    with pytest.raises(RecipeError, match=rf"objective\.{knob}="):
        BetaDPO(**{knob: bad})
