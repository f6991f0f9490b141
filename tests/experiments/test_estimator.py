"""The estimate from exact conditionals, and from a transformer trained on sampled rankings."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr

from mallowspo_cli.dispersion import HIGHEST, LOWEST
from mallowspo_cli.experiments.estimator import ranking_model
from mallowspo_cli.experiments.estimator.exact import (
    EVEN_VALUES,
    SWEEP,
    ExactSweep,
    exact_claims,
    exact_estimate,
    exact_sweep,
    flat_below,
    pearson,
    step_entropies,
)
from mallowspo_cli.experiments.estimator.experiment import (
    Settings,
    compare,
    over_seeds,
    transformer_claim,
)
from mallowspo_cli.experiments.estimator.ranking_model import (
    PAIRS_PER_PROMPT,
    Measured,
    RankingPrompts,
    measure,
    train_model,
)

RECORDED = {
    5: (0.9924, 1.416),
    10: (0.9987, 1.209),
    20: (0.9998, 1.081),
    50: (0.9970, 0.963),
    100: (0.9945, 0.896),
}
"""Items to Pearson's r and the best scale, as recorded in the method's notes."""
THETA = np.asarray([0.05, 0.5, 2.0, 4.0])


def all_ranks(num_items: int) -> np.ndarray:
    """(n!, n) ranks of each item."""
    return np.asarray(list(permutations(range(num_items))))


def kendall_probabilities(theta: float, ranks: np.ndarray) -> np.ndarray:
    """By the definition: phi to the power of the number of inversions, over its sum."""
    inversions = np.asarray(
        [sum(row[i] > row[j] for i in range(len(row)) for j in range(i, len(row))) for row in ranks]
    )
    odds = np.exp(-theta * inversions)
    return odds / odds.sum()


# Exact conditionals


@pytest.mark.parametrize(("num_items", "recorded"), RECORDED.items())
def test_correlation_and_scale_are_the_recorded_ones(
    num_items: int, recorded: tuple[float, float]
) -> None:
    summary = exact_sweep(num_items, 0).summary
    assert summary["correlation"]["value"] == pytest.approx(recorded[0], abs=5.1e-5)
    assert summary["phi_star"] == pytest.approx(recorded[1], abs=5.1e-4)
    assert summary["monotone"]


@pytest.mark.parametrize("theta", THETA)
def test_the_entropies_add_up_to_that_of_the_whole_distribution(theta: float) -> None:
    p = kendall_probabilities(theta, all_ranks(4))
    whole = float(-(p * np.log(p)).sum())
    assert step_entropies(np.asarray([theta]), 4).sum() == pytest.approx(whole, rel=1e-12)
    # A mean over three steps, as the last item is certain, and a share of ln 4.
    expected = -math.log(whole / (3 * math.log(4)))
    assert exact_estimate(np.asarray([theta]), 4)[0] == pytest.approx(expected, rel=1e-12)


def test_without_consensus_every_choice_is_uniform() -> None:
    (steps,) = step_entropies(np.asarray([0.0]), 6)
    assert steps == pytest.approx([math.log(k) for k in (6, 5, 4, 3, 2)], rel=1e-12)
    near = exact_estimate(np.asarray([1e-9]), 6)[0]
    assert near == pytest.approx(-math.log(math.log(720) / (5 * math.log(6))), abs=1e-9)
    assert near > 0.1, "not 0: the estimate is biased where there is no consensus"


def test_with_full_consensus_the_entropy_vanishes_and_is_clamped() -> None:
    assert step_entropies(np.asarray([60.0]), 6).max() < 1e-20
    assert exact_estimate(np.asarray([60.0]), 6)[0] == pytest.approx(-math.log(LOWEST))


@given(st.integers(3, 40), st.floats(0.05, 3.9), st.floats(0.01, 1.0))
def test_the_estimate_rises_with_the_truth(num_items: int, theta: float, step: float) -> None:
    low, high = exact_estimate(np.asarray([theta, theta + step]), num_items)
    assert low < high


def test_where_it_is_flat_depends_on_the_number_of_items() -> None:
    summaries = [exact_sweep(num_items, 0).summary for num_items in (5, 20, 100)]
    few, some, many = (summary["slope_below_low_theta"] for summary in summaries)
    assert few < 0.25 < some < 1 < many
    ends = [summary["flat_below"] for summary in summaries]
    assert ends == sorted(ends, reverse=True)
    assert flat_below(5, 1e-3) is None


def test_the_rows_are_the_sweeps() -> None:
    sweep = exact_sweep(5, 0)
    rows = sweep.rows()
    assert len(rows) == len(SWEEP) + EVEN_VALUES
    assert [row["theta"] for row in rows if row["sweep"] == "listed"] == list(SWEEP)
    for row in rows:
        assert row["scaled"] == pytest.approx(sweep.summary["phi_star"] * row["estimate"])


def test_the_correlation_is_pearsons_with_an_interval_around_it() -> None:
    generator = np.random.default_rng(1)
    x = generator.normal(size=30)
    y = x + generator.normal(size=30)
    found = pearson(x, y, 0)
    assert found.value == pytest.approx(pearsonr(x, y)[0])
    assert found.low < found.value < found.high < 1
    assert pearson(x, y, 0) == found
    constant = pearson(x, np.ones(30), 0)
    assert math.isnan(constant.value)
    assert math.isnan(constant.low)


def test_the_claim_of_the_exact_part_can_fail() -> None:
    good, other = exact_sweep(20, 0), exact_sweep(5, 0)
    assert [claim.verdict for claim in exact_claims([good], 0)] == ["held", "held"]
    bent = {name: (theta, estimate**4) for name, (theta, estimate) in good.curves.items()}
    bad = ExactSweep(30, bent, {})
    found = exact_claims([good, bad, other], 0)
    assert [claim.verdict for claim in found] == ["opposite", "opposite"]
    assert "20, 30 items" in found[0].text
    assert exact_claims([other], 0) == []


# Rankings as tokens


def test_the_best_item_is_the_first_token_and_the_last_item_is_none() -> None:
    prompts = RankingPrompts.draw(np.asarray([30.0, 40.0]), 5, seed=0)
    tokens = prompts.tokens(prompts.sample(3, np.random.default_rng(0)))
    # At such a consensus every ranking is the central one.
    assert tokens[:, :, 0].tolist() == [[5] * 3, [6] * 3]
    assert (tokens[:, :, 1:] == prompts.central[:, None, :-1]).all()
    ranks = np.asarray([[[2, 0, 1, 4, 3]], [[0, 1, 2, 3, 4]]])
    first = prompts.central[0]
    assert prompts.tokens(ranks)[0, 0, 1:].tolist() == [first[1], first[2], first[0], first[4]]


def test_the_true_log_probs_are_those_of_the_definition() -> None:
    ranks = all_ranks(4)
    prompts = RankingPrompts.draw(THETA, 4, seed=0)
    found = prompts.logps(np.broadcast_to(ranks, (len(THETA), *ranks.shape)))
    for row, theta in zip(found, THETA, strict=True):
        assert np.exp(row) == pytest.approx(kendall_probabilities(theta, ranks), rel=1e-10)


def test_sampled_rankings_have_the_entropy_of_the_conditionals() -> None:
    prompts = RankingPrompts.draw(THETA, 5, seed=0)
    ranks = prompts.sample(20_000, np.random.default_rng(3))
    expected = step_entropies(THETA, 5).sum(axis=1)
    assert -prompts.logps(ranks).mean(axis=1) == pytest.approx(expected, abs=0.03)


def test_seeds_differ_and_repeat() -> None:
    one, again, other = (RankingPrompts.draw(THETA, 6, seed) for seed in (1, 1, 2))
    assert (one.central == again.central).all()
    assert (one.central != other.central).any()
    states = [train_model(one, 2, seed).state_dict() for seed in (1, 1, 2)]
    name = "lm_head.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


# The transformer


def test_the_estimate_is_that_of_the_models_own_distributions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = RankingPrompts.draw(THETA, 5, seed=4)
    model = train_model(prompts, 10, seed=4)
    ranks = prompts.sample(2 * PAIRS_PER_PROMPT, np.random.default_rng([4, ranking_model.SCORING]))
    ids = torch.from_numpy(prompts.tokens(ranks))
    with torch.no_grad():
        logps = model(input_ids=ids.flatten(0, 1)[:, :-1]).logits.double().log_softmax(-1)
    nats = -(logps.exp() * logps).sum(-1).mean(-1).reshape(len(THETA), -1, 2).mean(-1)
    expected = -(nats / math.log(prompts.vocab_size)).log().mean(-1)
    shares = (nats / math.log(5)).clamp(max=HIGHEST)
    target = logps.gather(-1, ids.flatten(0, 1)[:, 1:, None]).sum((-1, -2))
    excess = prompts.logps(ranks) - target.reshape(len(THETA), -1).numpy()

    # Small packs, so that there are several.
    monkeypatch.setattr(ranking_model, "PACK_TOKENS", 200)
    found = measure(model, prompts, seed=4)
    assert found.estimate_vocab == pytest.approx(expected.numpy(), abs=1e-5)
    # A model that has learnt little is less certain than ln(items): clamped, and counted.
    assert found.estimate == pytest.approx(-shares.log().mean(-1).numpy(), abs=1e-5)
    assert found.clamped == int((shares == HIGHEST).sum()) > 0
    assert found.excess == pytest.approx(excess.mean(axis=1) / 4, abs=1e-5)


def test_a_trained_models_entropies_approach_the_exact_ones() -> None:
    theta = np.asarray([0.05, 0.7, 1.4, 2.5])
    prompts = RankingPrompts.draw(theta, 4, seed=0)
    exact = exact_estimate(theta, 4)
    before, after = (measure(train_model(prompts, n, seed=0), prompts, seed=0) for n in (1, 150))
    assert np.abs(before.estimate - exact).max() > 1
    assert np.abs(after.estimate - exact).max() < 0.15
    assert before.excess.mean() > 0.3
    assert abs(after.excess.mean()) < 0.03
    assert after.clamped == 0
    shift = math.log(math.log(prompts.vocab_size) / math.log(4))
    assert after.estimate_vocab - after.estimate == pytest.approx(shift, abs=1e-9)
    assert compare(theta, exact, after, 0)["correlation_with_exact"]["value"] > 0.999


def perfect(theta: np.ndarray, num_items: int) -> Measured:
    exact = exact_estimate(theta, num_items)
    return Measured(exact, exact + 0.1, np.zeros_like(exact), np.zeros_like(exact))


def test_a_perfect_model_has_no_error_of_its_own() -> None:
    theta = np.linspace(0.05, 4, 8)
    exact = exact_estimate(theta, 8)
    found = compare(theta, exact, perfect(theta, 8), 0)
    assert found["model_error"] == found["largest_model_error"] == 0
    assert found["correlation_with_exact"]["value"] == pytest.approx(1)
    assert found["spearman"]["value"] == pytest.approx(1)
    assert found["correlation"]["value"] == pytest.approx(pearsonr(theta, exact)[0])
    assert found["correlation_vocab"]["value"] == pytest.approx(found["correlation"]["value"])


def test_the_claim_of_the_transformer_can_fail() -> None:
    settings = Settings((5,), 8, 8, 10, 3, 0)
    theta = np.linspace(0.05, 4, 8)
    exact = exact_estimate(theta, 8)
    good = [compare(theta, exact, perfect(theta, 8), seed) for seed in range(3)]
    assert transformer_claim(settings, good).verdict == "held"
    reversed_ = Measured(exact[::-1].copy(), exact, np.zeros(8), np.zeros(8))
    bad = [compare(theta, exact, reversed_, seed) for seed in range(3)]
    assert transformer_claim(settings, bad).verdict == "opposite"
    assert transformer_claim(settings, good[:1]).verdict == "not seen"
    assert over_seeds(bad)["correlation"]["value"] < -0.9
