"""What the baselines share: each is its formula, plugs the weight in, and stays finite.

The formulas are written once more below, one pair at a time and with 60 digits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.objectives import Objective, PairScores, ReferenceScores
from mallowspo_cli.objectives.apo import APODown, APOZero
from mallowspo_cli.objectives.baseline import RewardLoss, tangent_exp
from mallowspo_cli.objectives.chi_po import ChiPO
from mallowspo_cli.objectives.cpo import CPO
from mallowspo_cli.objectives.exo import EXO
from mallowspo_cli.objectives.f_dpo import FDPO, Divergence
from mallowspo_cli.objectives.hinge import Hinge
from mallowspo_cli.objectives.nca import NCA
from mallowspo_cli.objectives.orpo import ORPO
from mallowspo_cli.objectives.r_dpo import RDPO
from mallowspo_cli.objectives.robust_dpo import RobustDPO
from mallowspo_cli.objectives.sppo import SPPOHard

NUM_PAIRS = 24
Number = Any
"""An mpmath number."""


@dataclass(frozen=True)
class Pair:
    """One pair: log-ratios h, mean log-probs l, sums, the lengths' difference, the multipliers."""

    h_w: Number
    h_l: Number
    l_w: Number
    l_l: Number
    sum_w: Number
    sum_l: Number
    longer: int
    beta: Number
    weight: Number

    @property
    def r_w(self) -> Number:
        return self.weight * self.beta * self.h_w

    @property
    def r_l(self) -> Number:
        return self.weight * self.beta * self.h_l

    @property
    def m(self) -> Number:
        return self.r_w - self.r_l


def sigma(x: Number) -> Number:
    return 1 / (1 + mpmath.exp(-x))


def nll(x: Number) -> Number:
    """-log sigma(x)."""
    return mpmath.log(1 + mpmath.exp(-x))


def power(x: Number) -> Number:
    """e^x, from 20 on its tangent."""
    return mpmath.exp(x) if x <= 20 else mpmath.exp(20) * (x - 19)


def exo(pair: Pair, e: float) -> Number:
    found = 0
    for q, p in ((sigma(pair.m), 1 - e), (sigma(-pair.m), e)):
        found += q * mpmath.log(q / p)
    return found


def chi_po(pair: Pair, bound: float) -> Number:
    scores = [power(h) + h for h in (pair.h_w, pair.h_l)]
    margin = pair.weight * pair.beta * (scores[0] - scores[1])
    return nll(max(-2 * bound, min(2 * bound, margin)))


def f_dpo(pair: Pair, slope: Callable[[Number], Number]) -> Number:
    return nll(pair.weight * pair.beta * (slope(pair.h_w) - slope(pair.h_l)))


def cpo(pair: Pair, e: float, coefficient: float) -> Number:
    margin = pair.weight * pair.beta * (pair.sum_w - pair.sum_l)
    return (1 - e) * nll(margin) + e * nll(-margin) - coefficient * pair.l_w


def orpo(pair: Pair) -> Number:
    p_w, p_l = mpmath.exp(pair.l_w), mpmath.exp(pair.l_l)
    odds_ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
    return -pair.l_w + pair.beta * nll(pair.weight * mpmath.log(odds_ratio))


# Half of an exact 1/8 is 1/16: knobs that both sides read as one number.
CASES: dict[str, tuple[Objective, Callable[[Pair], Number]]] = {
    "hinge": (Hinge(), lambda p: max(mpmath.mpf(0), 1 - p.m)),
    "robust_dpo": (
        RobustDPO(label_smoothing=0.125),
        lambda p: (0.875 * nll(p.m) - 0.125 * nll(-p.m)) / 0.75,
    ),
    "exo": (EXO(label_smoothing=0.0625), lambda p: exo(p, 0.0625)),
    "nca": (NCA(), lambda p: nll(p.r_w) + nll(-p.r_w) / 2 + nll(-p.r_l) / 2),
    "sppo_hard": (
        SPPOHard(),
        lambda p: (
            (p.weight * p.h_w - 1 / (2 * p.beta)) ** 2 + (p.weight * p.h_l + 1 / (2 * p.beta)) ** 2
        ),
    ),
    "apo_zero": (APOZero(), lambda p: 1 - sigma(p.r_w) + sigma(p.r_l)),
    "apo_down": (APODown(), lambda p: 1 + sigma(p.r_w) - sigma(p.m)),
    "r_dpo": (RDPO(length_penalty=0.25), lambda p: nll(p.m + 0.25 * p.longer)),
    "chi_po": (ChiPO(reward_bound=4.0), lambda p: chi_po(p, 4)),
    "f_dpo_reverse_kl": (FDPO(divergence=Divergence.reverse_kl), lambda p: f_dpo(p, lambda h: h)),
    "f_dpo_forward_kl": (
        FDPO(divergence=Divergence.forward_kl),
        lambda p: f_dpo(p, lambda h: -power(-h)),
    ),
    "f_dpo_js": (
        FDPO(divergence=Divergence.js),
        lambda p: f_dpo(p, lambda h: mpmath.log(2 * mpmath.exp(h) / (1 + mpmath.exp(h)))),
    ),
    "f_dpo_alpha": (
        FDPO(divergence=Divergence.alpha, alpha=0.25),
        lambda p: f_dpo(p, lambda h: (1 - power(-h / 4)) * 4),
    ),
    "cpo": (CPO(label_smoothing=0.125, sft_coefficient=0.5), lambda p: cpo(p, 0.125, 0.5)),
    "orpo": (ORPO(), orpo),
}
REWARD_LOSSES = [name for name, (loss, _) in CASES.items() if isinstance(loss, RewardLoss)]


def scores(
    dtype: torch.dtype = torch.float64, spread: float = 30.0, weight: float | None = None
) -> tuple[PairScores, ReferenceScores]:
    """Pairs whose log-ratios lie within +-spread; the first lies at the reference."""
    generator = torch.Generator().manual_seed(11)
    chosen, rejected = -1 - 80 * torch.rand(2, NUM_PAIRS, generator=generator).double()
    ratios = spread * (2 * torch.rand(2, NUM_PAIRS, generator=generator).double() - 1)
    ratios[:, 0] = 0
    weights = 0.2 + 1.8 * torch.rand(NUM_PAIRS, generator=generator).double()
    weights = weights if weight is None else torch.full_like(weights, weight)
    tokens = torch.randint(1, 60, (2, NUM_PAIRS), generator=generator)
    policy = PairScores(
        chosen.to(dtype, copy=True).requires_grad_(),
        rejected.to(dtype, copy=True).requires_grad_(),
        tokens[0],
        tokens[1],
    )
    return policy, ReferenceScores(
        (chosen - ratios[0]).to(dtype),
        (rejected - ratios[1]).to(dtype),
        tokens[0],
        tokens[1],
        weights.to(dtype) / 2,
    )


def by_hand(
    formula: Callable[[Pair], Number],
    objective: Any,
    policy: PairScores,
    reference: ReferenceScores,
) -> list[float]:
    """The formula of each pair, with w(x) where the objective has it."""
    found = []
    with mpmath.workdps(60):
        for i in range(NUM_PAIRS):

            def number(values: Tensor, i: int = i) -> Number:
                return mpmath.mpf(values[i].item())

            sum_w, sum_l = number(policy.chosen_logps), number(policy.rejected_logps)
            t_w, t_l = int(policy.chosen_tokens[i]), int(policy.rejected_tokens[i])
            pair = Pair(
                h_w=sum_w - number(reference.chosen_logps),
                h_l=sum_l - number(reference.rejected_logps),
                l_w=sum_w / t_w,
                l_l=sum_l / t_l,
                sum_w=sum_w,
                sum_l=sum_l,
                longer=t_w - t_l,
                beta=mpmath.mpf(objective.beta),
                weight=2 * number(reference.neg_log_phi) if objective.dispersion else mpmath.mpf(1),
            )
            found.append(float(formula(pair)))
    return found


def value_and_gradients(
    objective: Objective, policy: PairScores, reference: ReferenceScores
) -> tuple[Tensor, ...]:
    losses = objective(policy, reference).losses
    return losses, *torch.autograd.grad(losses.sum(), (policy.chosen_logps, policy.rejected_logps))


def with_weight(name: str, **knobs: Any) -> Any:
    return replace(CASES[name][0], dispersion=True, **knobs)  # type: ignore[type-var]


@pytest.mark.parametrize("spread", [3.0, 30.0, 700.0])
@pytest.mark.parametrize("dispersion", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_its_formula(name: str, dispersion: bool, spread: float) -> None:
    objective = with_weight(name) if dispersion else CASES[name][0]
    policy, reference = scores(spread=spread)
    losses = objective(policy, reference).losses
    expected = by_hand(CASES[name][1], objective, policy, reference)
    assert losses.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_losses(name: str) -> None:
    # Near enough that neither a hinge nor a clip lies within the step of the finite differences.
    policy, reference = scores(spread=3.0)

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        moved = replace(policy, chosen_logps=chosen, rejected_logps=rejected)
        return with_weight(name)(moved, reference).losses

    assert torch.autograd.gradcheck(losses, (policy.chosen_logps, policy.rejected_logps))


@pytest.mark.parametrize("dispersion", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_finite_in_single_precision_however_far_apart(
    name: str, dispersion: bool
) -> None:
    objective = with_weight(name) if dispersion else CASES[name][0]
    policy, reference = scores(torch.float32, spread=3000.0)
    for values in value_and_gradients(objective, policy, reference):
        assert values.dtype == torch.float32
        assert torch.isfinite(values).all()


@pytest.mark.parametrize("name", CASES)
def test_a_weight_of_one_changes_nothing_and_others_do(name: str) -> None:
    policy, reference = scores(spread=3.0, weight=1.0)
    plain = value_and_gradients(CASES[name][0], policy, reference)
    torch.testing.assert_close(
        value_and_gradients(with_weight(name), policy, reference), plain, rtol=1e-12, atol=1e-12
    )
    policy, reference = scores(spread=3.0, weight=2.0)
    assert not torch.allclose(with_weight(name)(policy, reference).losses, plain[0])


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_a_weight_of_two_is_twice_the_beta(name: str) -> None:
    policy, reference = scores(spread=3.0, weight=2.0)
    doubled: Any = replace(CASES[name][0], beta=0.2)  # type: ignore[type-var]
    # SPPO's squares are divided by its own beta^2, not by the prompt's.
    size = 4 if name == "sppo_hard" else 1
    expected = tuple(size * v for v in value_and_gradients(doubled, policy, reference))
    torch.testing.assert_close(value_and_gradients(with_weight(name), policy, reference), expected)


@pytest.mark.parametrize("name", CASES)
def test_rewards_leave_the_weight_out_and_it_is_logged_where_it_is_in_the_loss(name: str) -> None:
    policy, reference = scores(spread=3.0)
    plain, weighted = CASES[name][0](policy, reference), with_weight(name)(policy, reference)
    torch.testing.assert_close(weighted.chosen_rewards, plain.chosen_rewards)
    torch.testing.assert_close(weighted.rejected_rewards, plain.rejected_rewards)
    assert plain.metrics == {}
    torch.testing.assert_close(weighted.metrics["weight"], 2 * reference.neg_log_phi)
    assert weighted.metrics["weighted_margin"].shape == (NUM_PAIRS,)
    if name in REWARD_LOSSES:
        log_ratio = (policy.chosen_logps - reference.chosen_logps).detach()
        torch.testing.assert_close(plain.chosen_rewards, 0.1 * log_ratio)


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_length_normalised_takes_mean_log_probs(name: str) -> None:
    policy, reference = scores(spread=3.0)

    def means(values: PairScores) -> Any:
        chosen = values.chosen_logps / values.chosen_tokens
        rejected = values.rejected_logps / values.rejected_tokens
        return replace(values, chosen_logps=chosen, rejected_logps=rejected)

    normalised: Any = replace(CASES[name][0], length_normalised=True)  # type: ignore[type-var]
    found = normalised(policy, reference)
    expected = CASES[name][0](means(policy), means(reference))
    torch.testing.assert_close(found.losses, expected.losses)
    torch.testing.assert_close(found.chosen_rewards, expected.chosen_rewards)


@pytest.mark.parametrize("name", ["cpo", "orpo"])
def test_without_a_reference_the_weight_alone_is_read_of_it(name: str) -> None:
    policy, reference = scores(spread=3.0)
    unread = torch.full_like(reference.chosen_logps, torch.nan)
    partial = replace(reference, chosen_logps=unread, rejected_logps=unread)
    objective = with_weight(name)
    assert (objective.needs_reference, objective.needs_dispersion) == (False, True)
    torch.testing.assert_close(
        objective(policy, partial).losses, objective(policy, reference).losses
    )
    with pytest.raises(ValueError, match="needs ReferenceScores"):
        objective(policy, None)


@pytest.mark.parametrize(
    ("objective", "knob", "bad"),
    [
        *((type(loss), "beta", 0.0) for loss, _ in CASES.values()),
        (RobustDPO, "label_smoothing", 0.5),
        (RobustDPO, "label_smoothing", -0.1),
        (EXO, "label_smoothing", 0.0),
        (EXO, "label_smoothing", 0.5),
        (CPO, "label_smoothing", 0.5),
        (CPO, "sft_coefficient", -1.0),
        (RDPO, "length_penalty", -0.1),
        (RDPO, "length_penalty", float("inf")),
        (ChiPO, "reward_bound", 0.0),
        (FDPO, "alpha", 0.0),
        (FDPO, "alpha", 1.0),
        (FDPO, "divergence", "total_variation"),
    ],
)
def test_a_knob_out_of_range_is_refused(objective: Any, knob: str, bad: object) -> None:
    with pytest.raises(RecipeError, match=rf"^objective\.{knob}={bad}.*expected"):
        objective(**{knob: bad})


def test_the_exponential_goes_on_along_its_tangent_and_keeps_its_slope() -> None:
    x = torch.tensor([-800.0, 0.0, 20.0, 21.0, 3000.0], requires_grad=True)
    values = tangent_exp(x)
    (slopes,) = torch.autograd.grad(values.sum(), x)
    top = torch.tensor(20.0).exp().item()
    assert values.tolist() == pytest.approx([0, 1, top, 2 * top, 2981 * top])
    assert slopes.tolist() == pytest.approx([0, 1, top, top, top])
