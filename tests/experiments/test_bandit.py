"""The bandits' outcomes: at equal KL, at equal beta, at a chosen one."""

from dataclasses import replace

import numpy as np
import pytest

from mallowspo_cli.experiments.bandit.many_prompts import (
    GROUPS,
    PENALTIES,
    TUNING_BETAS,
    ManyPrompts,
    choose_betas,
    run_many_prompts,
    tie_of,
)
from mallowspo_cli.experiments.bandit.methods import TRUE, Variant, objective, own_beta
from mallowspo_cli.experiments.bandit.one_prompt import Grid, OnePrompt, draw_counts, run_one_prompt
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
from mallowspo_cli.experiments.bandit.solver import solve
from mallowspo_cli.experiments.bandit.world import PromptsGrid
from tests.experiments.bandit_problems import problem

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
    known = ~np.isnan(kl)
    assert kl[known] == pytest.approx(0.5, abs=1e-6)
    tied = {many.variants[index].method for index in np.argwhere(~known)[:, 0]}
    assert tied <= {"mallows_phi_exact"}
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


def test_many_prompts_tied_by_the_exact_link_stay_tied_at_any_scale():
    # Told that raters agree where they do not, it ties the arms of every prompt, but for a hair.
    grid = replace(SMALL, betas=(1e-4, 1.0), objectives=("dpo", "mallows_phi_exact"))
    found = run_many_prompts(grid, replace(PROMPTS, prompt_pairs=(64,), conflicts=(1.0,)))
    for group in ("all", "new"):
        most = found.values["max_arm"][:, 0, found.at.index("beta=0.0001"), GROUPS.index(group)]
        dpo, shuffled = (
            most[found.variants.index(Variant(*of))].ravel()
            for of in (("dpo",), ("mallows_phi_exact", "shuffled"))
        )
        assert dpo == pytest.approx(1.0, abs=2e-3)
        assert shuffled[1:] == pytest.approx(0.2, abs=1e-9)


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
    places = [place for place, name in enumerate(many.at) if not name.startswith("kl=")]
    assert not np.isnan(many.values["reward"][:, 0][:, places]).any()
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
