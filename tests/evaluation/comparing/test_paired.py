"""Intervals cover, tests keep their level, and single values are the arithmetic by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from mallowspo_cli.evaluation.comparing.paired import (
    Array,
    Difference,
    Replicates,
    contrast,
    difference,
    drawn_counts,
    holm,
    judges_agreement,
    resampled_means,
    sign_test,
)


def compare(first: Array, second: Array, resamples: int = 400, seed: int = 0) -> Difference:
    """Of (S, N) values, one a prompt."""
    both = np.concatenate([first, second])
    units = both.shape[1]
    (found,) = resampled_means(both[None], np.ones((1, units)), resamples, seed)
    cut = len(first)
    return difference(
        Replicates(found.values[:cut], found.resampled[:, :cut]),
        Replicates(found.values[cut:], found.resampled[:, cut:]),
        units,
    )


def preferences(
    generator: np.random.Generator, hardness: Array, seeds: int, quality: float, spread: float
) -> Array:
    """(S, N) in (0, 1): correlated over models by the prompts' hardness."""
    of_seed = quality + spread * generator.normal(size=(seeds, 1))
    noise = generator.normal(size=(seeds, len(hardness)))
    return 1 / (1 + np.exp(-2 * (of_seed - hardness + noise)))


def true_mean(quality: float, spread: float) -> float:
    """Of `preferences`, over prompts, seeds and noise."""
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    deviation = math.sqrt(2 + spread**2)
    values = 1 / (1 + np.exp(-2 * (quality + deviation * points)))
    return float((values * weights).sum() / weights.sum())


def simulated(
    prompts: int, seeds: tuple[int, int], quality: float, spread: float, times: int
) -> tuple[float, Array]:
    """Share of intervals that hold the true difference, and all p."""
    truth = true_mean(quality, spread) - true_mean(0, spread)
    generator = np.random.default_rng(7)
    covered, found = 0, []
    for time in range(times):
        hardness = generator.normal(size=prompts)
        first = preferences(generator, hardness, seeds[0], 0, spread)
        second = preferences(generator, hardness, seeds[1], quality, spread)
        result = compare(first, second, 200, time)
        assert result.low is not None
        assert result.high is not None
        covered += result.low <= truth <= result.high
        found.append(result.p)
    return covered / times, np.array(found)


@pytest.mark.parametrize(("prompts", "quality"), [(30, 0.3), (100, 0.0), (100, 0.5)])
def test_the_interval_of_two_models_covers_the_truth_in_95_percent(
    prompts: int, quality: float
) -> None:
    covered, _ = simulated(prompts, (1, 1), quality, 0, 500)
    # Three standard errors of the simulation are 0.029.
    assert 0.925 <= covered <= 0.975


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("seeds", [(3, 3), (1, 3)])
def test_the_interval_of_seeds_covers_in_at_least_95_percent(
    seeds: tuple[int, int], spread: float
) -> None:
    covered, _ = simulated(60, seeds, 0.3, spread, 250)
    # Three standard errors are 0.041; where seeds do not differ it covers a little more.
    assert 0.92 <= covered <= 0.995


def test_an_interval_over_prompts_alone_says_nothing_of_other_seeds() -> None:
    """Why seeds are a source of error of their own."""
    truth, generator, covered = 0.0, np.random.default_rng(3), 0
    for time in range(100):
        hardness = generator.normal(size=60)
        sides = [preferences(generator, hardness, 1, 0, 0.5) for _ in range(2)]
        result = compare(sides[0], sides[1], 200, time)
        assert result.low is not None
        assert result.high is not None
        covered += result.low <= truth <= result.high
    assert covered / 100 < 0.7


@pytest.mark.parametrize("seeds", [(1, 1), (3, 3)])
def test_p_is_nearly_uniform_where_there_is_no_difference(seeds: tuple[int, int]) -> None:
    _, found = simulated(60, seeds, 0, 0.1 if max(seeds) > 1 else 0, 500)
    for level in (0.05, 0.2, 0.5, 0.8):
        assert (found <= level).mean() == pytest.approx(level, abs=0.06)
    assert (found <= 0.05).mean() <= 0.07


def test_a_model_against_itself_has_no_difference_and_p_1() -> None:
    values = np.random.default_rng(0).random((1, 50))
    found = compare(values, values)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)
    three = np.random.default_rng(0).random((3, 50))
    found = compare(three, three)
    assert (found.value, found.p) == (0, 1)


@pytest.mark.parametrize("seeds", [(1, 1), (3, 2), (1, 3)])
def test_the_difference_turns_around_with_its_sides(seeds: tuple[int, int]) -> None:
    generator = np.random.default_rng(1)
    first, second = (generator.random((count, 80)) for count in seeds)
    found, turned = compare(first, second), compare(second, first)
    assert found.low is not None
    assert found.high is not None
    assert turned.value == pytest.approx(-found.value)
    assert turned.low == pytest.approx(-found.high)
    assert turned.high == pytest.approx(-found.low)
    assert turned.p == pytest.approx(found.p)
    assert turned.standard_error == pytest.approx(found.standard_error)
    assert (turned.first, turned.second) == (found.second, found.first)


def test_the_standard_error_is_that_of_paired_values_and_2_8_of_them_are_detectable() -> None:
    generator = np.random.default_rng(2)
    hardness = generator.normal(size=300)
    first, second = (preferences(generator, hardness, 1, q, 0) for q in (0, 0.3))
    found = compare(first, second, 4000)
    by_hand = (second - first).std(ddof=1) / math.sqrt(300)
    assert found.standard_error == pytest.approx(by_hand, rel=0.04)
    assert found.detectable == pytest.approx(2.80 * (found.standard_error or 0), rel=1e-3)
    assert found.degrees_of_freedom is None


def test_the_error_of_seeds_is_the_sum_of_its_parts_by_hand() -> None:
    generator = np.random.default_rng(4)
    effects = (np.array([[0.0], [0.3], [0.1]]), np.array([[0.5], [0.2]]))
    first, second = (e + 0.2 * generator.normal(size=(len(e), 90)) for e in effects)
    found = compare(first, second, 20_000)
    between = [side.mean(axis=1).var(ddof=1) / len(side) for side in (first, second)]
    gaps = second.mean(axis=0) - first.mean(axis=0)
    over_prompts = gaps.var(ddof=1) / 90
    noise = 0.0
    for side in (first, second):
        apart = side - side.mean(axis=0) - side.mean(axis=1, keepdims=True) + side.mean()
        noise += (apart**2).sum() / (len(side) - 1) / 89 / 90 / len(side)
    variance = over_prompts + sum(between) - noise
    assert found.standard_error == pytest.approx(math.sqrt(variance), rel=0.01)
    doubt = between[0] ** 2 / 2 + between[1] ** 2 + over_prompts**2 / 89
    assert found.degrees_of_freedom == pytest.approx(variance**2 / doubt, rel=0.01)
    assert found.detectable is not None
    assert found.detectable > 2.8 * math.sqrt(variance)


def test_copies_of_a_seed_add_no_error() -> None:
    values = np.random.default_rng(5).random((2, 1, 70))
    alone = compare(values[0], values[1])
    copied = compare(np.repeat(values[0], 3, axis=0), np.repeat(values[1], 3, axis=0))
    assert copied.standard_error == pytest.approx(alone.standard_error)
    assert copied.degrees_of_freedom == pytest.approx(69)


def test_one_prompt_gives_no_interval() -> None:
    found = compare(np.array([[0.2]]), np.array([[0.9]]))
    assert found.value == pytest.approx(0.7)
    assert found.low is found.high is found.p is found.standard_error is found.detectable is None


def test_all_prompts_alike_give_a_difference_without_error() -> None:
    found = compare(np.full((1, 40), 0.25), np.full((1, 40), 0.75))
    assert (found.value, found.low, found.high, found.standard_error) == (0.5, 0.5, 0.5, 0)
    assert found.p == pytest.approx(1 / 401)
    several = compare(np.full((2, 40), 0.25), np.full((2, 40), 0.75))
    assert (several.value, several.standard_error, several.p) == (0.5, 0, 0)


def test_means_go_by_how_many_values_a_prompt_has() -> None:
    # Two prompts, of one and of three values.
    (found,) = resampled_means(np.array([[[1.0, 0.0]]]), np.array([[1.0, 3.0]]), 200, 0)
    assert found.values.tolist() == [0.25]
    assert set(found.resampled.flatten().tolist()) == {0.0, 0.25, 1.0}


def test_a_kind_that_a_resample_leaves_out_is_not_a_number() -> None:
    counts = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    sums = np.array([[[0.5, 0.0, 0.0]], [[0.0, 1.0, 0.0]]])
    first, second = resampled_means(sums, counts, 300, 0)
    assert np.isnan(first.resampled).any()
    assert not np.isnan(first.resampled).all()
    gap = contrast(first, second)
    assert gap.values.tolist() == [0.0]
    assert not math.isnan(difference(gap, gap, 3).p or 0)


def test_resamples_hold_as_many_prompts_and_do_not_depend_on_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = np.concatenate(list(drawn_counts(7, 50, 3)))
    assert whole.shape == (50, 7)
    assert (whole.sum(axis=1) == 7).all()
    monkeypatch.setattr("mallowspo_cli.evaluation.comparing.paired.BLOCK_VALUES", 20)
    assert (np.concatenate(list(drawn_counts(7, 50, 3))) == whole).all()


def test_the_sign_test_is_scipys_and_leaves_ties_out() -> None:
    second = np.array([1.0] * 8 + [0.0] * 2 + [0.5] * 5)
    found = sign_test(np.full(15, 0.5), second)
    assert (found.better, found.worse, found.ties) == (8, 2, 5)
    # 2 (1 + 10 + 45) / 2^10
    assert found.p == pytest.approx(0.109375)
    assert found.p == binomtest(8, 10).pvalue
    assert sign_test(second, second).p == 1


def test_holms_correction_by_hand() -> None:
    # In order: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 is raised to the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([0.3]) == [0.3]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8), st.randoms())
def test_holms_correction_does_not_depend_on_order_and_keeps_it(values, random) -> None:
    adjusted = holm(values)
    assert all(p <= after <= 1 for p, after in zip(values, adjusted, strict=True))
    order = list(range(len(values)))
    random.shuffle(order)
    assert sorted(holm([values[i] for i in order])) == pytest.approx(sorted(adjusted))
    by_p = sorted(zip(values, adjusted, strict=True))
    assert [after for _, after in by_p] == sorted(adjusted)


def test_kappa_by_hand() -> None:
    # 20 + 15 of 50 agree: 0.7; by chance (25 x 30 + 25 x 20) / 50^2 = 0.5.
    first = np.array([0] * 25 + [1] * 25)
    second = np.array([0] * 20 + [1] * 5 + [0] * 10 + [1] * 15)
    found = judges_agreement(first, second, [str(i) for i in range(50)])
    assert (found.count, found.equal) == (50, 0.7)
    assert found.kappa == pytest.approx(0.4)
    # The textbook standard error is 0.13 (Fleiss, Cohen and Everitt 1969).
    assert found.low == pytest.approx(0.4 - 2 * 0.128, abs=0.06)
    assert found.high == pytest.approx(0.4 + 2 * 0.128, abs=0.06)


def test_judges_that_never_vary_have_no_kappa_and_equal_ones_have_1() -> None:
    same = np.array([0, 1, 2, 1])
    assert judges_agreement(same, same, list("abcd")).kappa == 1
    found = judges_agreement(np.zeros(3, dtype=int), np.zeros(3, dtype=int), list("abc"))
    assert found.equal == 1
    assert math.isnan(found.kappa)
    assert math.isnan(found.low)


def test_verdicts_on_one_prompt_are_drawn_together() -> None:
    generator = np.random.default_rng(8)
    first, second = (np.repeat(generator.integers(2, size=30), 6) for _ in range(2))
    apart = judges_agreement(first, second, [str(i) for i in range(180)])
    together = judges_agreement(first, second, [str(i // 6) for i in range(180)])
    assert together.kappa == apart.kappa
    assert together.high - together.low > 1.8 * (apart.high - apart.low)
