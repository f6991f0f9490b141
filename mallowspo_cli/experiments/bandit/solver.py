"""Where training on weighted pairs comes to rest: many small problems at once, in float64.

The loss is the objective's own, called on PairScores; its slope and curvature in the log-ratio gap
come from autograd, so that what is solved is what trains. A problem has E pairs, M parameters, and
gaps that are linear in them.

**Converged** is the minimum of the mean loss plus |parameters|^2 / (2 budget). Where the loss has a
minimum, the second term hardly moves it. Where it has none (all pairs go one way, and the loss
falls for ever), the gaps grow with the logarithm of the budget, as with the steps of plain gradient
descent of learning rate 1, which are a little ahead of it; the budget is the same for all
objectives. Parameters of which no pair speaks stay at the reference.

**The exact Kendall link** jumps at 0. A gradient does not see the jump, only the bend beside it,
and the loss with its jump taken out is convex: training rests at its minimum, and that is what is
solved. The bend holds near ties at a gap of 0, as a fused lasso does. Jump and bend are measured
on the objective itself; for every other loss they are 0.
"""

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from mallowspo_cli.objectives import Objective, PairScores, ReferenceScores

BUDGET: Final = 1e8
MOST_STEPS, MOST_HALVINGS = 200, 40
TOLERANCE: Final = 1e-14
"""Of the decrease that a Newton step promises, in nats of the mean loss."""
ROUNDINGS: Final = (1.0, 1e-2, 1e-4)
"""Widths by which a bend is rounded in turn, as gaps times beta."""


@dataclass(frozen=True)
class Problem:
    """B problems alike in shape: E weighted pairs, M parameters."""

    design: Tensor
    """(E, M), or (B, E, M): gaps = design @ parameters, in nats of log-ratio."""
    share: Tensor
    """(B, E) weight of each pair in the mean loss; a row adds to 1."""
    neg_log_phi: Tensor
    """(B, E) theta that the objective is told."""
    budget: Tensor
    """(B,) plain gradient steps of learning rate 1 that bound what has no minimum."""

    def gaps(self, parameters: Tensor) -> Tensor:
        """(B, E) log-ratio gaps of (B, M) parameters."""
        return torch.einsum("...em,...m->...e", self.design, parameters)

    def pull(self, values: Tensor) -> Tensor:
        """(B, M) from (B, E): the design's transpose."""
        return torch.einsum("...em,...e->...m", self.design, values)

    def rows(self, index: Tensor) -> "Problem":
        """Some of the problems."""
        design = self.design[index] if self.design.ndim == 3 else self.design
        return Problem(design, self.share[index], self.neg_log_phi[index], self.budget[index])

    def curvature(self, values: Tensor) -> Tensor:
        """(B, M, M) from (B, E): design' diag(values) design."""
        return self.design.mT @ (values.unsqueeze(-1) * self.design)


def solve(objective: Objective, problem: Problem) -> Tensor:
    """(B, M) parameters at which training rests; "converged" as above.

    Raises:
        ArithmeticError: a problem has not come to rest in MOST_STEPS Newton steps.
    """
    loss = _rounded_loss(objective, problem)
    shape = (len(problem.share), problem.design.shape[-1])
    parameters = torch.zeros(shape, dtype=problem.share.dtype)
    for rounding in ROUNDINGS if loss.bends else (0.0,):
        parameters = _newton(loss, parameters, rounding)
    return parameters


def first_step(objective: Objective, problem: Problem) -> Tensor:
    """(B, M) first plain gradient step from the reference, of rate 1; of the exact Kendall link,
    with the slope from above, as it gives at a gap of 0.
    """
    gaps = torch.zeros_like(problem.share)
    slope, _ = derivatives(objective, gaps, problem.neg_log_phi)
    return -problem.pull(problem.share * slope)


def pair_losses(objective: Objective, gaps: Tensor, neg_log_phi: Tensor) -> Tensor:
    """Losses of pairs with these log-ratio gaps, any shape.

    The gap stands for chosen minus rejected log-prob: a softmax's normaliser and a uniform
    reference cancel in it. Each response has one token.
    """
    flat = gaps.reshape(-1)
    zeros, ones = torch.zeros_like(flat), torch.ones_like(flat)
    policy = PairScores(flat, zeros, ones, ones)
    reference = ReferenceScores(zeros, zeros, ones, ones, neg_log_phi.reshape(-1))
    return objective(policy, reference).losses.view_as(gaps)


def derivatives(
    objective: Objective, gaps: Tensor, neg_log_phi: Tensor, second: bool = False
) -> tuple[Tensor, Tensor]:
    """(slope, curvature) of each pair's loss in its gap, by autograd; curvature if `second`."""
    gaps = gaps.detach().requires_grad_()
    total = pair_losses(objective, gaps, neg_log_phi).sum()
    (slope,) = torch.autograd.grad(total, gaps, create_graph=second)
    if not second:
        return slope, slope
    (curvature,) = torch.autograd.grad(slope.sum(), gaps)
    return slope.detach(), curvature


@dataclass(frozen=True)
class _RoundedLoss:
    """The mean loss without its jump at a gap of 0 and with its bend there rounded off."""

    objective: Objective
    beta: float
    problem: Problem
    jump: Tensor
    """(B, E) loss just below 0 less loss at 0, in nats."""
    bend: Tensor
    """(B, E) slope at 0 less slope just below."""

    @property
    def bends(self) -> bool:
        return bool((self.bend / self.beta > 1e-6).any())

    def rows(self, index: Tensor) -> "_RoundedLoss":
        problem = self.problem.rows(index)
        return replace(self, problem=problem, jump=self.jump[index], bend=self.bend[index])

    def value(self, parameters: Tensor, rounding: float) -> Tensor:
        """(B,) in nats."""
        problem, gaps = self.problem, self.problem.gaps(parameters)
        losses = pair_losses(self.objective, gaps, problem.neg_log_phi)
        if rounding:
            width = rounding / self.beta
            rounded_off = torch.sqrt(gaps**2 + width**2) - gaps.abs()
            losses = losses - torch.where(gaps < 0, self.jump, 0.0) + self.bend / 2 * rounded_off
        near = (parameters**2).sum(-1) / (2 * problem.budget)
        return (problem.share * losses).sum(-1) + near

    def slopes(self, parameters: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
        """Gradient (B, M) and Hessian (B, M, M)."""
        problem, gaps = self.problem, self.problem.gaps(parameters)
        slope, curve = derivatives(self.objective, gaps, problem.neg_log_phi, second=True)
        if rounding:
            width = rounding / self.beta
            radius = torch.sqrt(gaps**2 + width**2)
            # At 0 the objective gives the slope from above.
            side = torch.where(gaps < 0, -1.0, 1.0)
            slope = slope + self.bend / 2 * (gaps / radius - side)
            curve = curve + self.bend / 2 * width**2 / radius**3
        near = 1 / problem.budget[:, None]
        gradient = problem.pull(problem.share * slope) + near * parameters
        identity = torch.eye(parameters.shape[-1], dtype=parameters.dtype)
        return gradient, problem.curvature(problem.share * curve) + near[:, None] * identity


def _rounded_loss(objective: Objective, problem: Problem) -> _RoundedLoss:
    """Jump and bend measured a billionth of a link's unit below 0, and led on to 0: a jump that is
    left over, however small, would stop a line search at a tie.
    """
    beta = float(getattr(objective, "beta"))  # noqa: B009 (each of them has one)
    theta, zero = problem.neg_log_phi, torch.zeros_like(problem.share)
    step = 1e-9 / beta
    below, above = (derivatives(objective, gap, theta)[0] for gap in (zero - step, zero))
    return _RoundedLoss(
        objective,
        beta,
        problem,
        jump=pair_losses(objective, zero - step, theta)
        + step * below
        - pair_losses(objective, zero, theta),
        bend=above - below,
    )


def _newton(loss: _RoundedLoss, parameters: Tensor, rounding: float) -> Tensor:
    """Newton's method, each step halved until the loss falls as it should (Armijo).

    A problem that has come to rest leaves the batch, so its result does not depend on the others.
    """
    parameters = parameters.clone()
    moving = torch.arange(len(parameters))
    for _ in range(MOST_STEPS):
        gradient, hessian = loss.slopes(parameters[moving], rounding)
        step = -_solved(hessian, gradient)
        promise = (gradient * step).sum(-1)
        on = (promise < -TOLERANCE).nonzero().flatten()
        if not len(on):
            return parameters
        loss, moving = loss.rows(on), moving[on]
        parameters[moving] = _shortened(loss, parameters[moving], step[on], promise[on], rounding)
    name = type(loss.objective).__name__
    raise ArithmeticError(f"{len(moving)} problems of {name} are not solved in {MOST_STEPS} steps")


def _solved(hessian: Tensor, gradient: Tensor) -> Tensor:
    """(B, M) Newton steps. Directions that no pair reads are held by 1 / budget alone, which a
    large beta's curvature drowns in float64: there a hair of that curvature holds them.
    """
    found, failed = torch.linalg.solve_ex(hessian, gradient)
    if bool(failed.any()):
        hair = 1e-14 * hessian.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
        held = hessian + torch.diag_embed(hair.expand(gradient.shape))
        again, _ = torch.linalg.solve_ex(held, gradient)
        found = torch.where(failed[:, None] > 0, again, found)
    return found


def _shortened(
    loss: _RoundedLoss, start: Tensor, step: Tensor, promise: Tensor, rounding: float
) -> Tensor:
    """(B, M) parameters after the step, or after the first of its halves that is good enough."""
    before, length = loss.value(start, rounding), torch.ones_like(promise)
    for _ in range(MOST_HALVINGS):
        moved = start + length[:, None] * step
        # The last term is what float64 resolves.
        worse = loss.value(moved, rounding) > before + 1e-4 * length * promise + 1e-15
        if not bool(worse.any()):
            return moved
        length = torch.where(worse, length / 2, length)
    return start + length[:, None] * step
