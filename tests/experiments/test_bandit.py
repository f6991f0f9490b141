"""The bandits: the solver against plain training, identities of the methods, claims both ways."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mallowspo_cli.evaluation.claims import Claim
from mallowspo_cli.experiments.bandit.claims import many_prompts_claims, one_prompt_claims
from mallowspo_cli.experiments.bandit.many_prompts import GROUPS, ManyPrompts, run_many_prompts
from mallowspo_cli.experiments.bandit.methods import METHODS, TRUE, Variant, objective
from mallowspo_cli.experiments.bandit.one_prompt import (
    Grid,
    OnePrompt,
    arm_pairs,
    draw_counts,
    run_one_prompt,
    without_optimum,
)
from mallowspo_cli.experiments.bandit.outcomes import divergence, outcomes, scale_to_kl, with_ties
from mallowspo_cli.experiments.bandit.solver import (
    BUDGET,
    Problem,
    derivatives,
    first_step,
    pair_losses,
    solve,
)
from mallowspo_cli.experiments.bandit.world import PromptsGrid
from mallowspo_cli.experiments.mallows_model import pair_marginals
from mallowspo_cli.objectives import PairScores, ReferenceScores
from mallowspo_cli.objectives.mallows import Link, MallowsPhi

SMALL = Grid(
    distances=("kendall",), dispersions=(0.05, 0.9), pairs=(40,), betas=(0.5, 1.0), seeds=3
)
PROMPTS = PromptsGrid(prompts=4, features=3, prompt_pairs=(16,), conflicts=(0.0, 1.0))


@pytest.fixture(scope="module")
def one() -> OnePrompt:
    return run_one_prompt(SMALL)


@pytest.fixture(scope="module")
def many() -> ManyPrompts:
    return run_many_prompts(SMALL, PROMPTS)


def problem(counts: np.ndarray, theta: float, budget: float = BUDGET) -> Problem:
    """Tabular problems of (B, arms, arms) counts or probabilities."""
    winner, loser = arm_pairs(counts.shape[-1])
    identity = torch.eye(counts.shape[-1], dtype=torch.float64)
    share = torch.from_numpy(counts[:, winner, loser])
    share = share / share.sum(-1, keepdim=True)
    many = torch.full((len(counts),), budget, dtype=torch.float64)
    return Problem(identity[winner] - identity[loser], share, torch.full_like(share, theta), many)


def some_counts(phi: float, pairs: int = 300, seeds: int = 3) -> np.ndarray:
    grid = Grid(distances=("kendall",), dispersions=(phi,), pairs=(pairs,), seeds=seeds)
    return draw_counts(grid)[0, 0, 0]


def trained(method: str, given: Problem, steps: int) -> torch.Tensor:
    """Plain gradient descent on the mean loss from the reference, beta 1, the rate falling to 0."""
    parameters = torch.zeros(len(given.share), given.design.shape[-1], dtype=torch.float64)
    loss = objective(method, 1.0)
    _, curve = derivatives(loss, given.gaps(parameters), given.neg_log_phi, second=True)
    steepest = torch.linalg.eigvalsh(given.curvature(given.share * curve))[:, -1:]
    for step in range(steps):
        slope, _ = derivatives(loss, given.gaps(parameters), given.neg_log_phi)
        rate = (1 - step / steps) ** 1.5 / steepest
        parameters = parameters - rate * given.pull(given.share * slope)
    return parameters


@pytest.mark.parametrize("method", METHODS)
def test_a_gap_has_the_loss_of_the_arms_log_probs(method: str):
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(6, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    reference = torch.full_like(logps, 1 / 5).log()
    ones, theta = torch.ones(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.1
    expected = objective(method, 0.7)(
        PairScores(logps[:, 1], logps[:, 3], ones, ones),
        ReferenceScores(reference[:, 1], reference[:, 3], ones, ones, theta),
    ).losses
    gaps = logps[:, 1] - logps[:, 3]
    assert pair_losses(objective(method, 0.7), gaps, theta) == pytest.approx(expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_solver_ends_where_long_plain_training_ends(method: str):
    agreed, disputed = (problem(some_counts(phi, seeds=2), -np.log(phi)) for phi in (0.3, 0.9))
    both = [torch.cat([getattr(one, key) for one in (agreed, disputed)]) for key in PARTS]
    given = Problem(agreed.design, *both)
    found = solve(objective(method, 1.0), given)
    assert trained(method, given, 500) == pytest.approx(found, abs=5e-3)
    assert (found.abs().amax(-1) > 0.05).all()


PARTS = ("share", "neg_log_phi", "budget")


def test_training_with_the_exact_kendall_link_rests_in_a_tie():
    # Between 1 - g(0+) and g(0+) = 0.542 the slope points to 0 from both sides.
    share = np.asarray([[[0.0, 0.53], [0.47, 0.0]], [[0.0, 0.56], [0.44, 0.0]]])
    given = problem(share, 0.5)
    exact, smooth = (solve(MallowsPhi(beta=1.0, link=link), given) for link in Link)
    gaps = exact[:, 0] - exact[:, 1]
    assert abs(float(gaps[0])) < 1e-3
    assert float(gaps[1]) > 0.1
    assert float(smooth[0, 0] - smooth[0, 1]) > 0.1


def test_one_way_pairs_end_near_plain_training_of_the_budget():
    # The loss falls for ever, and the gap grows with the logarithm of the steps.
    counts, steps = np.asarray([[[0.0, 9.0], [0.0, 0.0]]]), 1000
    given, parameters = problem(counts, 0.5), torch.zeros(1, 2, dtype=torch.float64)
    for _ in range(steps):
        slope, _ = derivatives(objective("dpo", 0.5), given.gaps(parameters), given.neg_log_phi)
        parameters = parameters - given.pull(given.share * slope)
    at, beyond = (
        solve(objective("dpo", 0.5), problem(counts, 0.5, budget=budget))[0, 0]
        for budget in (steps, 20 * steps)
    )
    assert at < parameters[0, 0] < beyond
    assert without_optimum(counts).tolist() == [True]


def test_theta_at_weight_w_is_dpo_at_w_beta():
    counts = some_counts(0.05)
    for theta in (3.0, 0.1):
        own = solve(objective("mallows_theta", 0.2), problem(counts, theta))
        dpo = solve(objective("dpo", 0.2 * 2 * theta), problem(counts, 0.5))
        assert own == pytest.approx(dpo, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_the_path_over_beta_is_one_ray(method: str):
    given = problem(some_counts(0.6), -np.log(0.6))
    at_one, at_half = (solve(objective(method, beta), given) for beta in (1.0, 0.5))
    assert at_half == pytest.approx(2 * at_one, rel=1e-3, abs=1e-3)


def test_ipo_rests_at_the_preference_less_a_half_over_beta_and_w():
    rate = pair_marginals("kendall", -np.log(0.3), 2)[None]
    expected = float(rate[0, 0, 1] - 0.5) / 0.2
    for method, weight in (("ipo", 1.0), ("mallows_ipo", 2.4)):
        found = solve(objective(method, 0.2), problem(rate, weight / 2))
        assert float(found[0, 0] - found[0, 1]) == pytest.approx(expected / weight, rel=1e-5)


def test_phi_recovers_the_rank_gaps_whatever_the_dispersion():
    for phi in (0.3, 0.9):
        rates = pair_marginals("kendall", -np.log(phi), 5)[None]
        found = solve(objective("mallows_phi_exact", 0.5), problem(rates, -np.log(phi)))[0]
        assert (found[:-1] - found[1:]) == pytest.approx(torch.full((4,), 2.0), abs=1e-2)


def test_theta_collapses_less_than_dpo_at_low_dispersion_and_more_at_high():
    for phi, sign in ((0.05, 1), (0.9, -1)):
        counts = some_counts(phi, pairs=1000, seeds=5)
        assert sign > 0 or not without_optimum(counts).any()
        most = [
            outcomes(solve(objective(name, 0.5), problem(counts, -np.log(phi))).numpy(), 1.0)
            for name in ("dpo", "mallows_theta")
        ]
        assert (sign * (most[0]["max_arm"] - most[1]["max_arm"]) > 0.01).all()


def test_a_loss_has_no_optimum_where_an_arm_never_loses_to_those_it_beat():
    cycle = [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    chain = [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    apart = [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert without_optimum(np.asarray([cycle, chain, apart])).tolist() == [False, True, False]


def test_arms_of_which_no_pair_speaks_stay_at_the_reference():
    counts = np.asarray([[[0.0, 3.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    for method in METHODS:
        found = solve(objective(method, 0.5), problem(counts, 0.5))[0]
        assert float(found[2]) == pytest.approx(0.0)
        assert float(found[0]) == pytest.approx(-float(found[1]), abs=1e-6)


def test_outcomes_of_policies_known_by_hand():
    logits = np.log(np.asarray([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3], [0.1, 0.2, 0.7]]))
    found = outcomes(logits, 1.0)
    assert found["max_arm"] == pytest.approx([0.7, 1 / 3, 0.7])
    assert found["regret"] == pytest.approx([0.2, 0.5, 0.8])
    assert found["accuracy"] == pytest.approx([1.0, 0.5, 0.0])
    assert found["wrong_collapse"].tolist() == [0, 0, 0]
    collapsed = outcomes(np.asarray([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]]), 1.0)
    assert collapsed["wrong_collapse"].tolist() == [0, 1]
    assert found["best_on_top"] == pytest.approx([1.0, 1 / 3, 0.0])
    entropy = -(0.7 * np.log(0.7) + 0.2 * np.log(0.2) + 0.1 * np.log(0.1))
    assert found["entropy"] == pytest.approx([entropy, np.log(3), entropy])
    assert found["kl"] == pytest.approx([np.log(3) - entropy, 0.0, np.log(3) - entropy])


def test_ties_are_fused_at_their_mean_and_nothing_else_moves():
    logits = np.asarray([[1.0, 0.0, 1.0005, 3.0, 1.0009], [0.2, 0.2, 0.2, 0.2, 0.2]])
    fused = with_ties(logits, np.full((2, 1), 1e-3))
    mean = (1.0 + 1.0005 + 1.0009) / 3
    assert fused == pytest.approx(np.asarray([[mean, 0.0, mean, 3.0, mean], [0.2] * 5]))
    assert len(set(fused[0, [0, 2, 4]])) == 1


def test_scaled_policies_have_the_kl_that_was_asked_for():
    logits = np.random.default_rng(0).standard_normal((4, 6, 5))
    alone = scale_to_kl(logits, 0.5)[..., None] * logits
    assert divergence(alone) == pytest.approx(np.full((4, 6), 0.5))
    together = scale_to_kl(logits, 0.5, prompts=1)[:, None, None] * logits
    assert divergence(together).mean(axis=-1) == pytest.approx(np.full(4, 0.5))


def test_the_first_step_weighs_pairs_by_w():
    given = problem(some_counts(0.6), 0.5)
    varied = replace(given, neg_log_phi=torch.linspace(0.1, 2, 20).double().expand(3, 20))
    dpo = first_step(objective("dpo", 0.5), given)
    assert dpo == pytest.approx(given.pull(given.share) * 0.25)
    theta = first_step(objective("mallows_theta", 0.5), varied)
    assert theta == pytest.approx(given.pull(given.share * 2 * varied.neg_log_phi) * 0.25)


def test_one_prompt_compares_the_same_samples_at_equal_kl(one: OnePrompt):
    at = one.at.index("kl=0.5")
    # Told a wrong phi, the exact Kendall link may tie all arms: then there is no KL to be had.
    free = [i for i, variant in enumerate(one.variants) if variant.told in ("", TRUE)]
    kl = one.outcomes["kl"][free, at]
    assert kl == pytest.approx(np.full_like(kl, 0.5))
    dpo, theta = (one.variants.index(Variant(*v)) for v in (("dpo",), ("mallows_theta", TRUE)))
    for name in ("regret", "accuracy", "max_arm"):
        values = one.outcomes[name][:, at]
        assert values[theta] == pytest.approx(values[dpo], abs=1e-6)
    wrong = one.outcomes["kl"][one.variants.index(Variant("mallows_theta", "0.9"))]
    assert np.isnan(wrong[:, :, 1]).all()
    assert not np.isnan(wrong[:, :, 0]).any()


def test_one_weight_for_all_prompts_is_dpo_and_its_shuffle_is_not(many: ManyPrompts):
    regimes_at_kl = (slice(None), many.at.index("kl=0.5"))
    rewards = many.values["reward"]
    base = rewards[many.variants.index(Variant("dpo"))][regimes_at_kl]
    for told, same in (("constant", True), ("unit_mean", False), ("shuffled", False)):
        own = rewards[many.variants.index(Variant("mallows_theta", told))][regimes_at_kl]
        assert bool(np.abs(own - base).max() < 1e-6) is same
    unit, true = (
        rewards[many.variants.index(Variant("mallows_theta", told))][regimes_at_kl]
        for told in ("unit_mean", TRUE)
    )
    assert unit == pytest.approx(true, abs=1e-6)


def test_groups_of_prompts_are_halves_at_the_mean_kl_asked_for(many: ManyPrompts):
    groups = np.moveaxis(many.values["kl"][:, :, many.at.index("kl=0.5")], 2, 0)
    named = dict(zip(GROUPS, groups, strict=True))
    assert named["all"] == pytest.approx(np.full_like(named["all"], 0.5))
    assert (named["low"] + named["high"]) / 2 == pytest.approx(named["all"])


def test_the_chosen_beta_is_that_of_the_other_seeds(many: ManyPrompts):
    # A scale of w is a scale of beta: the choice, times the mean weight, is the same.
    told = [
        many.chosen_betas[many.variants.index(Variant("mallows_theta", t))]
        for t in (TRUE, "unit_mean")
    ]
    assert (told[0] == told[1]).all()
    assert not np.isnan(many.values["reward"][:, 0]).any()
    assert np.isnan(many.values["reward"][:, 1, many.at.index("tuned")]).all()


@pytest.mark.parametrize(("shift", "verdict"), [(0.1, "opposite"), (-0.1, "held")])
def test_a_one_prompt_claim_follows_the_numbers_either_way(
    one: OnePrompt, shift: float, verdict: str
):
    values = {name: np.zeros_like(array) for name, array in one.outcomes.items()}
    noise = 1e-3 * np.random.default_rng(0).standard_normal(values["regret"].shape)
    for index, variant in enumerate(one.variants):
        if variant.told:
            for name in ("max_arm", "wrong_collapse", "regret"):
                values[name][index] += shift
            values["accuracy"][index] -= shift
    shifted = replace(one, outcomes={name: array + noise for name, array in values.items()})
    assert_all(one_prompt_claims(shifted), verdict)


@pytest.mark.parametrize(("shift", "verdict"), [(-0.1, "opposite"), (0.1, "held")])
def test_a_many_prompts_claim_follows_the_numbers_either_way(
    many: ManyPrompts, shift: float, verdict: str
):
    values = {name: np.zeros_like(array) for name, array in many.values.items()}
    noise = 1e-3 * np.random.default_rng(0).standard_normal(values["reward"].shape)
    for index, variant in enumerate(many.variants):
        if variant.told:
            values["reward"][index] += shift
            values["accuracy"][index] += shift
            values["max_arm"][index] -= shift
    shifted = replace(many, values={name: array + noise for name, array in values.items()})
    assert_all(many_prompts_claims(shifted), verdict)


def test_differences_of_the_solvers_size_are_no_finding(one: OnePrompt):
    theta = [
        claim
        for claim in one_prompt_claims(one)["One prompt: equal KL"]
        if claim.text.startswith("Mallows-theta")
    ]
    assert len(theta) > 3
    assert {claim.verdict for claim in theta} == {"not seen"}


def assert_all(sections: dict[str, list[Claim]], verdict: str) -> None:
    assert len(sections) > 1
    for claims in sections.values():
        assert len(claims) >= 12
        assert {claim.verdict for claim in claims} == {verdict}
