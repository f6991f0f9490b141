"""The MallowsPO family: special cases, the phi loss from scores to value, the IPO minimiser."""

import math

import pytest
import torch
from torch import Tensor

from mallowspo_cli.objectives import Objective, PairScores, ReferenceScores
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.ipo import IPO
from mallowspo_cli.objectives.links import kendall_log_link
from mallowspo_cli.objectives.mallows import MallowsIPO, MallowsPhi, MallowsTheta

NUM_PAIRS = 40
TOKENS = torch.arange(1, NUM_PAIRS + 1)


def pairs(
    dtype: torch.dtype = torch.float64, weight: float | None = None
) -> tuple[PairScores, ReferenceScores]:
    generator = torch.Generator().manual_seed(3)
    values = -80 * torch.rand(4, NUM_PAIRS, generator=generator, dtype=torch.float64)
    chosen, rejected, reference_chosen, reference_rejected = values.to(dtype)
    weights = 2 * torch.rand(NUM_PAIRS, generator=generator, dtype=torch.float64)
    weights = weights if weight is None else torch.full_like(weights, weight)
    policy = PairScores(chosen.requires_grad_(), rejected.requires_grad_(), TOKENS, TOKENS.flip(0))
    return policy, ReferenceScores(
        reference_chosen, reference_rejected, TOKENS, TOKENS.flip(0), weights.to(dtype) / 2
    )


def at_gap(
    gap: float, theta: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, PairScores, ReferenceScores]:
    """Two pairs whose log-ratio difference is `gap`, all of it in the chosen log-prob (first)."""
    zero = torch.zeros(2, dtype=dtype)
    chosen = torch.full((2,), gap, dtype=dtype, requires_grad=True)
    ones = torch.ones(2)
    policy = PairScores(chosen, zero, ones, ones)
    return chosen, policy, ReferenceScores(zero, zero, ones, ones, torch.full_like(zero, theta))


def loss_and_gradients(
    objective: Objective, policy: PairScores, reference: ReferenceScores
) -> tuple[Tensor, ...]:
    losses = objective(policy, reference).losses
    return losses, *torch.autograd.grad(losses.sum(), (policy.chosen_logps, policy.rejected_logps))


@pytest.mark.parametrize("knobs", [{}, {"label_smoothing": 0.1}, {"length_normalised": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_theta_with_unit_weight_is_dpo_in_value_and_gradient(
    knobs: dict[str, float], dtype: torch.dtype
) -> None:
    policy, reference = pairs(dtype, weight=1.0)
    found = loss_and_gradients(MallowsTheta(**knobs), policy, reference)
    expected = loss_and_gradients(DPO(**knobs), policy, reference)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weight", [0.3, 1.7])
def test_theta_with_a_constant_weight_is_dpo_with_beta_times_it(weight: float) -> None:
    policy, reference = pairs(weight=weight)
    found = loss_and_gradients(MallowsTheta(beta=0.1), policy, reference)
    torch.testing.assert_close(found, loss_and_gradients(DPO(beta=0.1 * weight), policy, reference))


def test_theta_weighs_inside_the_sigmoid_and_not_the_loss() -> None:
    _, policy, reference = at_gap(3.0, theta=0.8)
    loss = MallowsTheta(beta=0.5)(policy, reference).losses[0].item()
    assert loss == pytest.approx(math.log1p(math.exp(-1.6 * 0.5 * 3)))


def test_theta_limits_are_a_step_and_log_two_without_a_pull() -> None:
    chosen, policy, reference = at_gap(3.0, theta=0.0)
    losses = MallowsTheta()(policy, reference).losses
    (pull,) = torch.autograd.grad(losses.sum(), chosen)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert pull.tolist() == [0.0, 0.0]
    _, policy, reference = at_gap(3.0, theta=1000.0)
    assert MallowsTheta()(policy, reference).losses.tolist() == pytest.approx([0.0] * 2)


@pytest.mark.parametrize("objective", [MallowsTheta(), MallowsPhi(), MallowsIPO()])
def test_rewards_leave_the_weight_out_and_the_weighted_margin_has_it(objective: Objective) -> None:
    policy, reference = pairs()
    output = objective(policy, reference)
    chosen = policy.chosen_logps - reference.chosen_logps
    rejected = policy.rejected_logps - reference.rejected_logps
    torch.testing.assert_close(output.chosen_rewards, 0.1 * chosen.detach())
    torch.testing.assert_close(output.rejected_rewards, 0.1 * rejected.detach())
    weight = 2 * reference.neg_log_phi
    torch.testing.assert_close(output.metrics["weight"], weight)
    margin = (weight * 0.1 * (chosen - rejected)).detach()
    torch.testing.assert_close(output.metrics["weighted_margin"], margin)


@pytest.mark.parametrize("link", ["exact", "smooth"])
def test_phi_is_the_kendall_link_at_beta_delta(link: str) -> None:
    policy, reference = pairs()
    margin = 0.1 * (
        policy.chosen_logps
        - policy.rejected_logps
        - reference.chosen_logps
        + reference.rejected_logps
    )
    expected = -kendall_log_link(margin, reference.neg_log_phi, link)
    found = MallowsPhi(link=link)(policy, reference).losses
    torch.testing.assert_close(found, expected)


def test_phi_at_unit_weight_has_the_golden_value_and_is_not_dpo() -> None:
    _, policy, reference = at_gap(20.0, theta=0.5)
    phi = MallowsPhi(beta=0.1)(policy, reference).losses[0].item()
    dpo = DPO(beta=0.1)(policy, reference).losses[0].item()
    assert phi == pytest.approx(0.359970, abs=6e-7)
    assert dpo == pytest.approx(math.log1p(math.exp(-2)))


def test_phi_takes_mean_log_probs_when_length_normalised() -> None:
    policy, reference = pairs()
    chosen = (policy.chosen_logps - reference.chosen_logps) / TOKENS
    rejected = (policy.rejected_logps - reference.rejected_logps) / TOKENS.flip(0)
    expected = -kendall_log_link(10 * (chosen - rejected), reference.neg_log_phi)
    found = MallowsPhi(beta=10, length_normalised=True)(policy, reference).losses
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("link", ["exact", "smooth"])
def test_phi_label_smoothing_mixes_in_the_flipped_label(link: str) -> None:
    for gap in (-25.0, -1.0, 0.5, 25.0):
        _, policy, reference = at_gap(gap, theta=0.7)
        margin, theta = torch.tensor([0.1 * gap]).double(), torch.tensor([0.7]).double()
        kept = kendall_log_link(margin, theta, link).item()
        flipped = kendall_log_link(-margin, theta, link).item()
        losses = MallowsPhi(link=link, label_smoothing=0.2)(policy, reference).losses
        assert losses[0].item() == pytest.approx(-0.8 * kept - 0.2 * flipped)


def test_phi_label_smoothing_at_zero_takes_both_limits_from_the_right() -> None:
    _, policy, reference = at_gap(0.0, theta=0.5)
    loss = MallowsPhi(label_smoothing=0.2)(policy, reference).losses[0].item()
    assert loss == pytest.approx(0.8 * 0.613423 + 0.2 * 0.779782, abs=1e-6)
    _, policy, reference = at_gap(1e-9, theta=0.5)
    nearby = MallowsPhi(label_smoothing=0.2)(policy, reference).losses[0].item()
    assert loss == pytest.approx(nearby, abs=1e-9)


@pytest.mark.parametrize("link", ["exact", "smooth"])
def test_phi_pulls_at_the_start_where_every_gap_is_zero(link: str) -> None:
    chosen, policy, reference = at_gap(0.0, theta=0.5, dtype=torch.float32)
    losses = MallowsPhi(link=link)(policy, reference).losses
    (pull,) = torch.autograd.grad(losses.sum(), chosen)
    assert torch.isfinite(losses).all()
    assert (pull < 0).all()


def test_smooth_phi_starts_three_times_slower_than_theta() -> None:
    pulls = []
    for objective in (MallowsTheta(), MallowsPhi(link="smooth")):
        chosen, policy, reference = at_gap(0.0, theta=0.5)
        pulls += torch.autograd.grad(objective(policy, reference).losses[0], chosen)[0][:1].tolist()
    # method notes, 1.5: G'(0) = 0.0832 against 0.25.
    assert pulls[0] / pulls[1] == pytest.approx(0.25 / 0.0832, rel=1e-3)


def test_mallows_ipo_with_unit_weight_is_ipo() -> None:
    policy, reference = pairs(weight=1.0)
    for scaling in ("margin", "target"):
        found = loss_and_gradients(MallowsIPO(scaling=scaling), policy, reference)
        expected = loss_and_gradients(IPO(scaling=scaling), policy, reference)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scaling", ["margin", "target"])
@pytest.mark.parametrize("rate", [0.55, 0.8, 1.0])
def test_mallows_ipo_is_least_at_the_derived_gap(scaling: str, rate: float) -> None:
    beta, weight = 0.2, 1.6
    best = (rate - 0.5) / (beta * weight)
    objective = MallowsIPO(beta=beta, scaling=scaling)

    def slope(gap: float) -> float:
        """Of the expected loss when the first response is preferred at `rate`."""
        total = 0.0
        for sign, mass in ((1, rate), (-1, 1 - rate)):
            chosen, policy, reference = at_gap(sign * gap, theta=weight / 2)
            losses = objective(policy, reference).losses
            total += sign * mass * torch.autograd.grad(losses[0], chosen)[0][0].item()
        return total

    assert slope(best) == pytest.approx(0, abs=1e-12)
    assert slope(best - 0.1) < 0 < slope(best + 0.1)


def test_mallows_ipo_scalings_differ_by_beta_squared_in_value_and_gradient() -> None:
    policy, reference = pairs()
    margin = loss_and_gradients(MallowsIPO(beta=0.1, scaling="margin"), policy, reference)
    target = loss_and_gradients(MallowsIPO(beta=0.1, scaling="target"), policy, reference)
    torch.testing.assert_close(margin, tuple(0.01 * values for values in target))
