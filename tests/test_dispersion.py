"""From token entropies to the weight: values, calibration, empty responses and the controls."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mallowspo_cli import dispersion
from mallowspo_cli.errors import DataError

VOCAB = 128_256


def weigh(entropy: torch.Tensor, scale: float) -> torch.Tensor:
    """w of normalised entropies."""
    return dispersion.weight(dispersion.raw_weight(entropy), scale)


def fit(entropy: torch.Tensor) -> float:
    """The scale of normalised entropies."""
    return dispersion.unit_mean_scale(dispersion.raw_weight(entropy))


def entropies(*nats_per_token: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normalised entropies of pairs whose two responses, of 5 and 9 tokens, have these means."""
    mean = torch.tensor(nats_per_token, dtype=dtype)
    five, nine = torch.full_like(mean, 5), torch.full_like(mean, 9)
    return dispersion.normalised_entropy(mean * 5, five, mean * 9, nine, VOCAB)


def test_each_response_counts_alike_whatever_its_length() -> None:
    found = dispersion.normalised_entropy(
        torch.tensor([4.0]), torch.tensor([2]), torch.tensor([90.0]), torch.tensor([90]), 1000
    )
    assert found.item() == pytest.approx((2.0 + 1.0) / 2 / math.log(1000))


def test_the_releases_scale_gives_the_tabled_weights() -> None:
    # method notes, 2.3: with c = 0.29.
    weights = weigh(entropies(0.2, 0.3, 0.5, 0.8, 1.2, 2.0), 0.29)
    assert weights.tolist() == pytest.approx([1.18, 1.06, 0.92, 0.78, 0.66, 0.51], abs=6e-3)


def test_a_long_response_keeps_its_weight_positive_where_the_printed_sum_does_not() -> None:
    tokens = torch.tensor([300])
    summed = torch.tensor([0.37 * 300])
    entropy = dispersion.normalised_entropy(summed, tokens, summed, tokens, VOCAB)
    assert weigh(entropy, 1.0).item() > 0
    assert -math.log(2 * summed.item() / (2 * math.log(VOCAB))) < 0


def test_uniform_logits_give_no_weight_and_one_hot_logits_are_clamped() -> None:
    tokens = torch.tensor([7, 7])
    summed = torch.tensor([7 * math.log(VOCAB), 0.0], dtype=torch.float64)
    entropy = dispersion.normalised_entropy(summed, tokens, summed, tokens, VOCAB)
    assert entropy.tolist() == pytest.approx([1.0, 0.0], abs=2e-6)
    assert dispersion.clamped_count(entropy) == 2
    weights = weigh(entropy, 1.0)
    assert weights.tolist() == pytest.approx([0.0, -math.log(1e-6)], abs=2e-6)
    assert (weights > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_values_on_a_bound_count_as_clamped(dtype: torch.dtype) -> None:
    found = entropies(0.0, 0.3, math.log(VOCAB) * 2, 1.2, dtype=dtype)
    assert dispersion.clamped_count(found) == 2
    assert dispersion.clamped_count(found[[1, 3]]) == 0


@given(
    means=st.lists(st.floats(0, 20), min_size=1, max_size=30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None)
def test_entropy_is_inside_the_bounds_and_more_of_it_never_weighs_more(
    means: list[float], dtype: torch.dtype
) -> None:
    found = entropies(*sorted(means), dtype=dtype)
    assert found.dtype == dtype
    assert ((found > 0) & (found < 1)).all()
    assert (weigh(found, 0.29).diff() <= 0).all()


@given(
    means=st.lists(st.floats(0, 12), min_size=1, max_size=200),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None)
def test_the_scale_makes_the_mean_weight_one(means: list[float], dtype: torch.dtype) -> None:
    found = entropies(*means, dtype=dtype)
    weights = weigh(found, fit(found))
    assert weights.double().mean().item() == pytest.approx(1, abs=1e-6)


def test_the_scale_is_computed_in_double_and_near_the_releases_at_its_entropy() -> None:
    found = entropies(0.374, dtype=torch.float32)
    scale = fit(found)
    assert scale == pytest.approx(1 / -math.log(found[0].item()), rel=1e-12)
    assert scale == pytest.approx(0.29, abs=1e-3)


def test_sixteen_bit_entropies_are_upcast() -> None:
    half = torch.tensor([100.0], dtype=torch.bfloat16)
    found = dispersion.normalised_entropy(half, torch.tensor([33]), half, torch.tensor([33]), 1000)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(100 / 33 / math.log(1000), rel=1e-6)


def test_an_empty_response_gives_weight_one_and_is_counted_and_kept_out_of_the_scale() -> None:
    summed = torch.tensor([5.0, 0.0, 4.0, 30.0])
    tokens = torch.tensor([10, 0, 10, 10])
    other = torch.tensor([10, 10, 0, 10])
    found = dispersion.normalised_entropy(summed, tokens, summed, other, VOCAB)
    assert dispersion.empty_count(found) == 2
    assert dispersion.clamped_count(found) == 0
    scale = fit(found)
    weights = weigh(found, scale)
    assert weights[1:3].tolist() == [1.0, 1.0]
    assert scale == fit(found[[0, 3]])
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)


def test_no_scale_can_be_had_from_empty_responses_alone() -> None:
    with pytest.raises(DataError, match="none of the 2 training pairs has a dispersion"):
        fit(torch.full((2,), torch.nan))


def test_a_vocabulary_without_a_choice_is_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="at least 2 tokens, found 1"):
        dispersion.normalised_entropy(one, one, one, one, 1)


def test_a_pairs_entropy_does_not_depend_on_the_rest_of_the_batch() -> None:
    together = entropies(0.2, 0.9, 1.4)
    assert [entropies(mean).item() for mean in (0.2, 0.9, 1.4)] == together.tolist()


def test_neg_log_phi_is_half_the_weight_so_that_unit_weight_is_dpo() -> None:
    found = dispersion.neg_log_phi(torch.tensor([1.0, 0.4]))
    assert found.tolist() == pytest.approx([0.5, 0.2])


def test_the_shuffled_control_keeps_the_values_and_depends_on_the_seed_alone() -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    once, again, other = (dispersion.shuffled(values, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert not torch.equal(once, values)
    assert torch.equal(once.sort().values, values.sort().values)


def test_the_constant_control_is_all_ones() -> None:
    assert dispersion.constant(torch.tensor([0.3, 2.0])).tolist() == [1.0, 1.0]


def test_terciles_follow_the_ranks() -> None:
    assert dispersion.terciles(torch.tensor([0.9, 0.1, 0.5, 7.0, 0.2, 0.6])).tolist() == [
        2, 0, 1, 2, 0, 1,
    ]  # fmt: skip


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40))
@settings(deadline=None)
def test_terciles_are_near_equal_in_size_and_ordered(values: list[float]) -> None:
    given_values = torch.tensor(values)
    found = dispersion.terciles(given_values)
    sizes = found.bincount(minlength=3)
    assert sizes.max() - sizes.min() <= 1
    for label in (0, 1):
        below, above = given_values[found <= label], given_values[found > label]
        assert above.numel() == 0 or below.max() <= above.min()


def test_the_inverse_control_turns_the_order_and_leaves_the_unknown() -> None:
    raw = torch.tensor([0.0, 0.5, 2.0, math.nan], dtype=torch.float64)
    found = dispersion.inverse(raw)
    assert found[1:3].tolist() == [2.0, 0.5]
    assert found[0].isfinite()
    assert found[0] > found[1]
    assert found[3].isnan()
