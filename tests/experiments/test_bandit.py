"""The bandits: the solver against plain training, identities of the methods, equal KL and beta."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mallowspo_cli.experiments.bandit.many_prompts import (
    GROUPS,
    PENALTIES,
    TUNING_BETAS,
    ManyPrompts,
    choose_betas,
    run_many_prompts,
    tie_of,
)
from mallowspo_cli.experiments.bandit.methods import METHODS, TRUE, Variant, objective, own_beta
from mallowspo_cli.experiments.bandit.one_prompt import (
    Grid,
    OnePrompt,
    arm_pairs,
    draw_counts,
    run_one_prompt,
    without_optimum,
)
from mallowspo_cli.experiments.bandit.outcomes import (
    divergence,
    kl_targets,
    mean_by_seed,
    only_at_kl,
    order_accuracy,
    outcomes,
    scale_to_kl,
    with_ties,
)
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


def test_a_tie_of_the_exact_link_stops_no_line_search():
    # Of a hundred pairs. Arms 2 and 3 tie; a jump of 1e-10 left over there once held Newton up.
    counts = np.zeros((1, 5, 5))
    counts[0][arm_pairs(5)] = [7, 4, 6, 10, 3, 7, 6, 9, 2, 0, 7, 5, 3, 0, 5, 11, 8, 2, 2, 3]
    given = problem(counts, -np.log(0.6065), budget=1e4)
    found = solve(objective("mallows_phi_exact", 0.15), given)[0]
    assert float(found[2] - found[3]) == pytest.approx(0.0, abs=1e-3)
    assert float(found[1] - found[0]) > 1


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
    entropy = -(0.7 * np.log(0.7) + 0.2 * np.log(0.2) + 0.1 * np.log(0.1))
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


def test_a_hessian_that_is_singular_in_float64_is_solved_all_the_same():
    # The bend, rounded to 1e-4 / beta, drowns 1 / budget.
    share = np.asarray([[[0.0, 0.53], [0.47, 0.0]], [[0.0, 0.99], [0.01, 0.0]]])
    steep, known = (
        solve(objective("mallows_phi_exact", beta), problem(share, -np.log(0.05))) * beta
        for beta in (3e3, 1.0)
    )
    gaps, expected = (found[:, 0] - found[:, 1] for found in (steep, known))
    assert float(gaps[0]) == pytest.approx(0.0, abs=1e-3)
    assert float(gaps[1]) == pytest.approx(float(expected[1]), rel=1e-3)
    assert float(expected[1]) > 0.1


def test_a_kl_that_ties_rule_out_is_no_outcome():
    # Two arms tied on top of five: at most log(5 / 2) = 0.92 nats.
    logits = np.asarray([[1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0, 0.0]])
    for target, there in ((0.5, [True, True]), (1.0, [False, True])):
        scaled = scale_to_kl(logits, target)[:, None] * logits
        found = only_at_kl(outcomes(scaled, 1.0), target)
        for values in found.values():
            assert (~np.isnan(values)).tolist() == there


def test_targets_are_below_the_most_that_so_many_arms_can_have():
    assert kl_targets((0.1, 0.5, 1.0), 2) == (0.1, 0.5)
    assert kl_targets((0.1, 0.5, 1.0), 3) == (0.1, 0.5, 1.0)
    small = replace(SMALL, arms=2, betas=(1.0,), objectives=("dpo",))
    assert [name for name in run_one_prompt(small).at if "kl" in name] == ["kl=0.1", "kl=0.5"]


def test_means_by_seed_leave_out_what_is_missing():
    values = np.asarray([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]])
    assert mean_by_seed(values) == pytest.approx(np.asarray([2.0, 5.0, np.nan]), nan_ok=True)


def test_one_prompt_compares_the_same_samples_at_equal_kl(one: OnePrompt):
    at = one.at.index("kl=0.5")
    kl = one.outcomes["kl"][:, at]
    assert kl[~np.isnan(kl)] == pytest.approx(0.5, abs=1e-3)
    free = [i for i, variant in enumerate(one.variants) if variant.told in ("", TRUE)]
    assert not np.isnan(kl[free]).any()
    # Told 0.05 where it is 0.9, the exact Kendall link ties arms: some have no such policy.
    tied = kl[one.variants.index(Variant("mallows_phi_exact", "0.05")), :, 1]
    assert np.isnan(tied).any()
    dpo, theta = (one.variants.index(Variant(*v)) for v in (("dpo",), ("mallows_theta", TRUE)))
    for name in ("regret", "accuracy", "max_arm"):
        values = one.outcomes[name][:, at]
        assert values[theta] == pytest.approx(values[dpo], abs=1e-6)
    wrong = one.outcomes["kl"][one.variants.index(Variant("mallows_theta", "0.9"))]
    assert np.isnan(wrong[:, :, 1]).all()
    assert not np.isnan(wrong[:, :, 0]).any()


def test_the_budget_decides_only_where_the_loss_has_no_minimum(one: OnePrompt):
    values = one.outcomes["max_arm"][one.variants.index(Variant("mallows_theta", TRUE))]
    short, long = (values[one.at.index(f"beta=1 budget={name}")] for name in ("1e4", "1e8"))
    free = one.without_optimum == 1
    assert free.any()
    assert not free.all()
    assert np.abs(short - long)[~free].max() < 0.01
    assert (long - short)[free].min() > 0.03


def test_phi_at_equal_beta_is_solved_at_three_times_the_number(one: OnePrompt):
    assert [own_beta(method, 0.5) for method in ("dpo", "mallows_phi_smooth")] == [0.5, 1.5]
    counts = draw_counts(SMALL)[0, 1, 0]
    logits = solve(objective("mallows_phi_smooth", 1.5), problem(counts, -np.log(0.9)))
    found = one.outcomes["max_arm"][one.variants.index(Variant("mallows_phi_smooth", TRUE))]
    expected = outcomes(logits.numpy(), 1.0)["max_arm"]
    at = one.at.index("beta=0.5 budget=1e8")
    assert found[at, 0, 1, 0] == pytest.approx(expected, abs=1e-6)


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


def test_every_group_of_prompts_has_the_kl_asked_for_of_its_own(many: ManyPrompts):
    kl = many.values["kl"][:, :, many.at.index("kl=0.5")]
    assert kl == pytest.approx(np.full_like(kl, 0.5), abs=1e-6)
    # At equal beta they share one policy, in which the groups' KL differ.
    low, high = (
        many.values["kl"][:, 0, many.at.index("beta=1"), GROUPS.index(group)]
        for group in ("low", "high")
    )
    assert np.abs(low - high).max() > 0.01


def test_the_order_after_a_first_step_does_not_depend_on_beta(many: ManyPrompts):
    other = replace(SMALL, betas=(0.01,), objectives=("dpo", "mallows_theta"))
    again = run_many_prompts(other, PROMPTS)
    for variant in again.variants:
        found, expected = (
            run.values["accuracy"][run.variants.index(variant), 1, run.at.index("kl=0.5")]
            for run in (again, many)
        )
        assert found == pytest.approx(expected)


def test_ties_after_a_first_step_are_relative_to_its_largest_logit():
    logits = np.zeros((1, 1, 1, 1, 2, 3))
    logits[..., 0, :] = [2.0, 1.0, 1.001]
    for scale in (1.0, 1e-6):
        tie = tie_of(scale * logits, None)
        assert tie == pytest.approx(np.full_like(tie, scale * 2e-3))
        accuracy = order_accuracy(scale * logits, tie)[0, 0, 0, 0]
        assert accuracy == pytest.approx([(1 + 1 + 0.5) / 3, 0.5])


def test_the_chosen_beta_is_that_of_the_other_seeds():
    # Two seeds do best with the first beta, the odd one with the second: it gets the others'.
    worth = np.asarray([[2.0, 2.0, 0.0], [0.0, 0.0, 3.5]])
    assert choose_betas(worth).tolist() == [1, 1, 0]


def test_a_chosen_beta_is_one_policy_whatever_the_mean_weight(many: ManyPrompts):
    # A scale of w is a scale of beta: the choice, times the mean weight, is the same.
    told = [
        many.chosen_betas[many.variants.index(Variant("mallows_theta", t))]
        for t in (TRUE, "unit_mean")
    ]
    assert (told[0] == told[1]).all()
    assert not np.isnan(many.values["reward"][:, 0]).any()
    assert np.isnan(many.values["reward"][:, 1, many.at.index("tuned=0.1")]).all()


def test_dearer_kl_chooses_larger_betas_and_none_at_an_end(many: ManyPrompts):
    # Told a wrong phi, a policy may be worth no KL at all to two other seeds.
    right = [i for i, variant in enumerate(many.variants) if variant.told in ("", TRUE)]
    many = replace(many, chosen_betas=many.chosen_betas[right])
    cheap, _, dear = np.moveaxis(many.chosen_betas, 1, 0)
    assert sorted(PENALTIES) == list(PENALTIES)
    assert (cheap <= dear).all()
    assert (cheap < dear).any()
    assert many.chosen_at_an_end == 0
    at_an_end = replace(many, chosen_betas=np.full_like(cheap, TUNING_BETAS[-1]))
    assert at_an_end.chosen_at_an_end == cheap.size
