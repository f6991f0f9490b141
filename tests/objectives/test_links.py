"""The link functions against golden values, 60-digit arithmetic, enumeration and autograd."""

import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mallowspo_cli.objectives.links import (
    kendall_log_link,
    kendall_log_links,
    logistic_log_link,
)

FORMS = ("exact", "smooth")
E_HALF = math.exp(-0.5)
DISPERSIONS = (1e-6, 1e-3, 0.05, 0.3, E_HALF, 0.9, 0.99, 0.999, 0.9999, 1 - 1e-6)
# method notes, 1.5; columns -10, -2, -0.5, 0-, 0+, 0.5, 2, 10
GOLDEN_GAPS = (-10.0, -2.0, -0.5, -1e-9, 0.0, 0.5, 2.0, 10.0)
GOLDEN_EXACT = {
    0.1: (20.839800, 4.062903, 1.702351, 1.129535, 0.390355, 0.201204, 0.017349, 0.000000),
    0.3: (10.137613, 2.166704, 1.169321, 0.911273, 0.514185, 0.371901, 0.121664, 0.000040),
    E_HALF: (3.785496, 1.196327, 0.873415, 0.779782, 0.613423, 0.540466, 0.359970, 0.022959),
    0.9: (1.130599, 0.784813, 0.728882, 0.710860, 0.675743, 0.658645, 0.609183, 0.389848),
    0.99: (0.728943, 0.701558, 0.696503, 0.694824, 0.691474, 0.689803, 0.684807, 0.658588),
}
GOLDEN_SMOOTH = {
    E_HALF: (1.081741, 0.779782, 0.693147, 0.613423, 0.414009),
    0.3: (1.799927, 0.911273, 0.693147, 0.514185, 0.180696),
}


def link(gap: float, theta: float, form: str, dtype: torch.dtype = torch.float64) -> float:
    return kendall_log_link(
        torch.tensor([gap], dtype=dtype), torch.tensor([theta], dtype=dtype), form
    ).item()


def reference_log_link(gap: float, theta: float, form: str) -> mpmath.mpf:
    """log g from the textbook formula in 60 digits; s = 0 is 0+."""
    with mpmath.workdps(60):
        theta_, half = mpmath.mpf(theta), mpmath.mpf(1) / 2
        centre = abs(mpmath.mpf(gap)) + (half if form == "exact" else 0)

        def q(u: mpmath.mpf) -> mpmath.mpf:
            return 1 / theta_ if u == 0 else u / mpmath.expm1(theta_ * u)

        tail = q(centre - half) - q(centre + half)
        return mpmath.log1p(-tail) if gap >= 0 else mpmath.log(tail)


@pytest.mark.parametrize("phi", GOLDEN_EXACT)
def test_exact_link_has_the_golden_values(phi: float) -> None:
    theta = torch.full((8,), -math.log(phi), dtype=torch.float64)
    losses = -kendall_log_link(torch.tensor(GOLDEN_GAPS, dtype=torch.float64), theta)
    assert losses.tolist() == pytest.approx(GOLDEN_EXACT[phi], abs=6e-7)


@pytest.mark.parametrize("phi", GOLDEN_SMOOTH)
def test_smooth_link_has_the_golden_values(phi: float) -> None:
    gaps = torch.tensor((-2.0, -0.5, 0.0, 0.5, 2.0), dtype=torch.float64)
    losses = -kendall_log_link(gaps, torch.full((5,), -math.log(phi)), "smooth")
    assert losses.tolist() == pytest.approx(GOLDEN_SMOOTH[phi], abs=6e-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_kendall_link_agrees_with_sixty_digits(
    form: str, dtype: torch.dtype, tolerance: float
) -> None:
    sizes = (1e-12, 1e-7, 1e-4, 0.01, 0.3, 0.4999, 0.5, 0.5001, 0.7, 1, 2, 3.5, 10, 49, 50, 99, 200)
    gaps = torch.tensor([0.0, *sizes, *(-size for size in sizes)], dtype=dtype)
    for phi in DISPERSIONS:
        theta = torch.full_like(gaps, -math.log(phi))
        for gap, rate, found in zip(
            gaps.tolist(), theta.tolist(), kendall_log_link(gaps, theta, form).tolist(), strict=True
        ):
            expected = reference_log_link(gap, rate, form)
            underflow = torch.finfo(dtype).tiny
            assert abs(found - expected) <= tolerance * abs(expected) + underflow, (phi, gap)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_agrees_with_sixty_digits_in_float32(form: str) -> None:
    # Both sides of the switch between series and closed form, and theta too small for the
    # textbook formula; 0.5 is where the smooth form has its removable 0/0.
    for theta in (1e-4, 2e-3, 0.1, 0.4, 0.6, 3.0, 13.0):
        for gap in (-150.0, -20.0, -3.0, -0.5, -0.1, 0.1, 0.5, 1.5):
            s = torch.tensor([gap], requires_grad=True)
            rate = torch.tensor([theta])
            kendall_log_link(s, rate, form).backward()
            with mpmath.workdps(60):
                step = mpmath.mpf(10) ** -15
                ends = [reference_log_link(s.item() + h, rate.item(), form) for h in (-step, step)]
                expected = (ends[1] - ends[0]) / (2 * step)
            assert s.grad.item() == pytest.approx(float(expected), rel=2e-5), (theta, gap)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gap", [-7.0, -0.4, 0.0, 0.2, 3.0])
def test_series_and_closed_form_meet_where_they_switch(form: str, gap: float) -> None:
    above = abs(gap) + (1.0 if form == "exact" else 0.5)
    switch = 0.5 / above
    below, beyond = link(gap, switch * (1 - 1e-9), form), link(gap, switch * (1 + 1e-9), form)
    assert below == pytest.approx(beyond, abs=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_are_finite_everywhere_in_float32(form: str) -> None:
    sizes = torch.cat((torch.logspace(-30, math.log10(2000), 200), torch.tensor([0.5, 1.0, 2000])))
    gaps = torch.cat((-sizes, torch.zeros(1), -torch.zeros(1), sizes))
    thetas = torch.cat((torch.zeros(1), torch.logspace(-4, math.log10(20), 60), torch.ones(1) / 2))
    s, theta = (
        grid.clone().requires_grad_() for grid in torch.meshgrid(gaps, thetas, indexing="ij")
    )
    loss = -kendall_log_link(s, theta, form)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    for values in (loss, s.grad, theta.grad):
        assert torch.isfinite(values).all()
    pulled = (s <= 0) & (theta > 0)
    assert (s.grad[pulled] < 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_in_double(form: str) -> None:
    gaps = torch.tensor(
        (-40.0, -3.0, -0.7, -0.5, -0.2, 0.3, 0.5, 1.1, 6.0), dtype=torch.float64, requires_grad=True
    )
    for rate in (1e-3, 0.1, 0.45, 0.5, 2.0, 9.0):
        theta = torch.full_like(gaps, rate).requires_grad_()
        assert torch.autograd.gradcheck(lambda s, t: kendall_log_link(s, t, form), (gaps, theta))


def test_smooth_link_passes_gradcheck_at_zero_too() -> None:
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    theta = torch.tensor((0.1, 0.5, 5.0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, t: kendall_log_link(s, t, "smooth"), (zero, theta))


@given(
    gap=st.floats(-200, 200).filter(lambda gap: gap != 0),
    theta=st.floats(1e-6, 13.8),
    form=st.sampled_from(FORMS),
)
@settings(deadline=None)
def test_probabilities_of_the_two_orders_add_to_one(gap: float, theta: float, form: str) -> None:
    total = math.exp(link(gap, theta, form)) + math.exp(link(-gap, theta, form))
    assert total == pytest.approx(1, abs=1e-12)


@given(gap=st.floats(-150, 150), step=st.floats(1e-3, 5), theta=st.floats(1e-4, 13.8))
@settings(deadline=None)
def test_smooth_link_increases_and_exact_link_is_it_with_the_central_gap_cut_out(
    gap: float, step: float, theta: float
) -> None:
    assert link(gap, theta, "smooth") <= link(gap + step, theta, "smooth")
    shifted = gap + 0.5 if gap >= 0 else gap - 0.5
    assert link(gap, theta, "exact") == pytest.approx(link(shifted, theta, "smooth"), rel=1e-9)


@given(size=st.floats(0, 150), step=st.floats(1e-3, 5), theta=st.floats(1e-4, 13.8))
@settings(deadline=None)
def test_exact_link_increases_on_each_side(size: float, step: float, theta: float) -> None:
    assert link(size, theta, "exact") <= link(size + step, theta, "exact")
    assert link(-size - step, theta, "exact") < link(-max(size, 1e-9), theta, "exact")


def test_exact_link_takes_zero_from_the_right_and_so_does_its_slope() -> None:
    s = torch.tensor([0.0, 1e-9], dtype=torch.float64, requires_grad=True)
    values = kendall_log_link(s, torch.full((2,), 0.5, dtype=torch.float64))
    values.sum().backward()
    assert values[0].item() == pytest.approx(math.log(1 / (1 - E_HALF) - 2), abs=1e-12)
    assert s.grad[0].item() == pytest.approx(s.grad[1].item(), rel=1e-6)


def test_at_zero_the_flipped_label_is_the_left_limit() -> None:
    zero, theta = torch.zeros(1, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)
    kept, flipped = kendall_log_links(zero, theta, "exact")
    assert flipped.item() == pytest.approx(link(-1e-12, 0.5, "exact"), abs=1e-11)
    assert (kept.exp() + flipped.exp()).item() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("form", FORMS)
def test_no_consensus_gives_one_half(form: str) -> None:
    gaps = torch.tensor([-100.0, -1.0, 0.0, 1.0, 100.0])
    none = kendall_log_link(gaps, torch.zeros(5), form)
    little = kendall_log_link(gaps, torch.full((5,), 1e-7), form)
    assert none.tolist() == pytest.approx([math.log(0.5)] * 5, rel=1e-6)
    assert little.tolist() == pytest.approx([math.log(0.5)] * 5, abs=1e-5)
    assert logistic_log_link(gaps, torch.zeros(5)).tolist() == pytest.approx([math.log(0.5)] * 5)


def test_small_theta_follows_the_first_order_expansion() -> None:
    theta = 1e-4
    for gap in (-7.0, -0.3, 0.3, 7.0):
        expected = 0.5 + theta * (2 * abs(gap) + 1) * math.copysign(1, gap) / 12
        assert math.exp(link(gap, theta, "exact")) == pytest.approx(expected, abs=1e-11)


def test_full_consensus_gives_a_step() -> None:
    assert math.exp(link(0.3, 300.0, "exact")) == pytest.approx(1, abs=1e-12)
    assert math.exp(link(-0.3, 300.0, "exact")) == pytest.approx(0, abs=1e-12)
    # The smooth form is a ramp of width 1 there: the central unit gap is not cut out.
    assert math.exp(link(0.25, 3000.0, "smooth")) == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_slope_for_large_negative_gaps_is_theta_and_the_logistic_slope_twice_that(
    form: str,
) -> None:
    s = torch.tensor([-1900.0], dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([0.7], dtype=torch.float64)
    (slope,) = torch.autograd.grad(kendall_log_link(s, theta, form).sum(), s)
    (logistic,) = torch.autograd.grad(logistic_log_link(s, theta).sum(), s)
    assert slope.item() == pytest.approx(0.7, rel=2e-3)
    assert logistic.item() == pytest.approx(1.4)


def test_smooth_loss_is_convex() -> None:
    gaps = torch.linspace(-30, 30, 2001, dtype=torch.float64)
    for phi in (0.05, 0.3, E_HALF, 0.9, 0.99):
        losses = -kendall_log_link(gaps, torch.full_like(gaps, -math.log(phi)), "smooth")
        assert (losses.diff().diff() > -1e-12).all()


@pytest.mark.parametrize("num_items", [2, 3, 4, 5])
@pytest.mark.parametrize("phi", [0.3, E_HALF, 0.9])
def test_exact_link_is_the_kendall_marginal(num_items: int, phi: float) -> None:
    orders = list(itertools.permutations(range(num_items)))
    masses = [phi ** len(inversions(order)) for order in orders]
    for i, j in itertools.combinations(range(num_items), 2):
        agreeing = sum(
            mass
            for order, mass in zip(orders, masses, strict=True)
            if order.index(i) < order.index(j)
        )
        marginal = agreeing / sum(masses)
        assert math.exp(link(j - i, -math.log(phi), "exact")) == pytest.approx(marginal, abs=1e-12)


@pytest.mark.parametrize("phi", [0.3, E_HALF, 0.9])
def test_spearman_odds_are_products_of_logistic_odds(phi: float) -> None:
    theta = torch.tensor(-math.log(phi), dtype=torch.float64)
    for order in itertools.permutations(range(4)):
        distance = sum((order.index(item) - item) ** 2 for item in range(4))
        log_odds = sum(
            (
                logistic_log_link(-gap, theta) - logistic_log_link(gap, theta)
                for i, j in inversions(order)
                for gap in [torch.tensor(float(j - i), dtype=torch.float64)]
            ),
            start=torch.zeros((), dtype=torch.float64),
        )
        assert log_odds.item() == pytest.approx(distance * math.log(phi), abs=1e-12)


def inversions(order: tuple[int, ...]) -> list[tuple[int, int]]:
    """The pairs i < j that `order` (items by place) has the wrong way round."""
    pairs = itertools.combinations(range(len(order)), 2)
    return [(i, j) for i, j in pairs if order.index(i) > order.index(j)]


def test_logistic_link_is_the_log_sigmoid_of_twice_theta_s() -> None:
    found = logistic_log_link(torch.tensor([-3.0, 0.0, 2.0]), torch.tensor([0.5, 2.0, 0.25]))
    expected = [-math.log1p(math.exp(3)), math.log(0.5), -math.log1p(math.exp(-1))]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_input_is_refused(dtype: torch.dtype) -> None:
    values = torch.ones(2, dtype=dtype)
    with pytest.raises(TypeError, match="expected float32 or float64"):
        kendall_log_link(values, values)
    with pytest.raises(TypeError, match="expected float32 or float64"):
        logistic_log_link(values, values)


def test_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="exact or smooth"):
        kendall_log_link(torch.zeros(1), torch.ones(1), "exakt")  # type: ignore[arg-type]
