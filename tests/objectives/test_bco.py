"""BCO: its arithmetic, and a threshold that is the mean of earlier steps."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mallowspo_cli.objectives.base import PairScores, ReferenceScores
from mallowspo_cli.objectives.bco import BCO

TOKENS = torch.tensor([4, 6, 9])
STEPS, PAIRS = 5, 3


def drawn(seed: int) -> tuple[PairScores, ReferenceScores]:
    generator = torch.Generator().manual_seed(seed)
    values = -40 * torch.rand(4, PAIRS, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.5, 1.0, 1.6], dtype=torch.float64)
    policy = PairScores(values[0], values[1], TOKENS, TOKENS)
    return policy, ReferenceScores(values[2], values[3], TOKENS, TOKENS, weights / 2)


def rewards(policy: PairScores, reference: ReferenceScores, beta: float) -> tuple[Tensor, Tensor]:
    return (
        beta * (policy.chosen_logps - reference.chosen_logps),
        beta * (policy.rejected_logps - reference.rejected_logps),
    )


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-x))


def means(output: Any) -> dict[str, float]:
    """What the training loop has after a step: means over its pairs."""
    return {f"objective/{key}": float(value.mean()) for key, value in output.metrics.items()}


def test_by_hand() -> None:
    policy = PairScores(
        torch.tensor([-10.0]), torch.tensor([-20.0]), torch.tensor([4]), torch.tensor([6])
    )
    reference = ReferenceScores(
        *(torch.tensor([-12.0]), torch.tensor([-17.0])),
        *(torch.tensor([4]), torch.tensor([6]), torch.tensor([9.0])),
    )
    # Rewards 0.2 * 2 and 0.2 * -3; the threshold is 0.1.
    output = BCO(beta=0.2).at_step({"shift": 0.1, "steps": 3.0})(policy, reference)
    assert output.losses.item() == pytest.approx(
        math.log1p(math.exp(-(0.4 - 0.1))) + math.log1p(math.exp(-0.6 - 0.1))
    )
    assert output.metrics["shift"].item() == pytest.approx(0.1)
    assert output.metrics["centre"].item() == pytest.approx((0.4 - 0.6) / 2)


def test_without_earlier_steps_the_threshold_is_zero_which_is_trls_bco_pair() -> None:
    policy, reference = drawn(0)
    chosen, rejected = rewards(policy, reference, 0.1)
    expected = -log_sigmoid(chosen) - log_sigmoid(-rejected)
    torch.testing.assert_close(BCO()(policy, reference).losses, expected)
    torch.testing.assert_close(BCO().at_step({})(policy, reference).losses, expected)


@pytest.mark.parametrize("dispersion", [False, True])
def test_the_threshold_is_the_mean_of_all_rewards_of_the_steps_before(dispersion: bool) -> None:
    """TRL's running mean over all responses so far, as it stood before the step."""
    objective, running, seen = BCO(dispersion=dispersion), {}, []
    for step in range(STEPS):
        policy, reference = drawn(step)
        chosen, rejected = rewards(policy, reference, 0.1)
        if dispersion:
            weights = 2 * reference.neg_log_phi
            chosen, rejected = weights * chosen, weights * rejected
        shift = torch.cat(seen).mean() if seen else torch.tensor(0.0)
        loss = objective.at_step(running)
        output = loss(policy, reference)
        expected = -log_sigmoid(chosen - shift) - log_sigmoid(-(rejected - shift))
        torch.testing.assert_close(output.losses, expected, rtol=1e-10, atol=0)
        running = loss.updated(means(output))
        seen += [chosen, rejected]
    assert running["steps"] == STEPS
    assert running["shift"] == pytest.approx(float(torch.cat(seen).mean()))
    assert abs(running["shift"]) > 0.1


def test_a_step_leaves_the_objective_itself_as_it_was() -> None:
    objective = BCO(beta=0.3)
    bound = objective.at_step({"shift": 2.0, "steps": 1.0})
    assert dict(objective.running) == {}
    assert dict(bound.running) == {"shift": 2.0, "steps": 1.0}
    assert bound == objective == BCO(beta=0.3)


def test_a_pairs_loss_does_not_depend_on_the_rest_of_the_batch() -> None:
    policy, reference = drawn(0)
    loss = BCO().at_step({"shift": -0.4, "steps": 2.0})
    whole = loss(policy, reference).losses
    for index in range(PAIRS):
        one = slice(index, index + 1)
        alone = loss(
            PairScores(*(value[one] for value in vars(policy).values())),
            ReferenceScores(
                *(getattr(reference, name)[one] for name in ReferenceScores.__dataclass_fields__)
            ),
        )
        torch.testing.assert_close(alone.losses, whole[one])


def test_the_threshold_that_is_the_centre_bounds_dpo_most_tightly() -> None:
    policy, reference = drawn(1)
    chosen, rejected = rewards(policy, reference, 0.1)
    dpo = -log_sigmoid(chosen - rejected)
    losses = [
        BCO().at_step({"shift": shift, "steps": 1.0})(policy, reference).losses
        for shift in torch.linspace(-4, 4, 161, dtype=torch.float64).tolist()
    ]
    assert all((values > dpo).all() for values in losses)
    best = torch.stack(losses).argmin(dim=0) * 0.05 - 4
    torch.testing.assert_close(best, ((chosen + rejected) / 2).float(), atol=0.03, rtol=0)
