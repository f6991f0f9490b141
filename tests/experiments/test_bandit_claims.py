"""The bandits' claims: both ways, at equal KL of those compared, and what is no claim."""

from dataclasses import replace

import numpy as np
import pytest

from mallowspo_cli.evaluation.claims import Claim
from mallowspo_cli.evaluation.strata import Estimate
from mallowspo_cli.experiments.bandit.headline import headline
from mallowspo_cli.experiments.bandit.many_prompts import GROUPS, ManyPrompts, run_many_prompts
from mallowspo_cli.experiments.bandit.many_prompts_claims import many_prompts_claims
from mallowspo_cli.experiments.bandit.methods import LABELS, SHUFFLED, TRUE, Variant
from mallowspo_cli.experiments.bandit.one_prompt import Grid, OnePrompt, run_one_prompt
from mallowspo_cli.experiments.bandit.one_prompt_claims import one_prompt_claims, one_prompt_gain
from mallowspo_cli.experiments.bandit.results import results
from mallowspo_cli.experiments.bandit.world import PromptsGrid
from mallowspo_cli.report.bandit_claims import claims_tables
from mallowspo_cli.report.bandit_means import many_prompts_tables

SMALL = Grid(
    dispersions=(0.05, 0.9),
    pairs=(60,),
    betas=(1.0,),
    objectives=("dpo", "ipo", "mallows_theta", "mallows_phi_exact", "mallows_ipo"),
    seeds=3,
)
PROMPTS = PromptsGrid(prompts=4, features=3, prompt_pairs=(16,), conflicts=(0.0, 1.0))
EQUAL_KL = "One prompt, equal KL, where the loss has a minimum"


@pytest.fixture(scope="module")
def one() -> OnePrompt:
    return run_one_prompt(SMALL)


@pytest.fixture(scope="module")
def many() -> ManyPrompts:
    return run_many_prompts(SMALL, PROMPTS)


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
    shifted = {name: array + noise for name, array in values.items()}
    # With a minimum on every sample, no claim is left without numbers.
    everywhere = np.zeros_like(one.without_optimum)
    found = one_prompt_claims(replace(one, outcomes=shifted, without_optimum=everywhere))
    assert_all(found, verdict, least=5)


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
    assert_all(many_prompts_claims(shifted), verdict, least=12)


def test_the_distances_are_claims_apart(many: ManyPrompts):
    values = {name: np.zeros_like(array) for name, array in many.values.items()}
    noise = 1e-3 * np.random.default_rng(0).standard_normal(values["reward"].shape)
    theta = many.variants.index(Variant("mallows_theta", TRUE))
    values["reward"][theta, :, :, :, :, 0] += 0.1
    values["reward"][theta, :, :, :, :, 1] -= 0.1
    apart = replace(many, values={name: array + noise for name, array in values.items()})
    found = verdicts(many_prompts_claims(apart)["Many prompts, converged"])
    assert found["Mallows-theta, kendall: more reward"] == "held"
    assert found["Mallows-theta, spearman: more reward"] == "opposite"


def test_what_is_so_by_definition_is_no_claim(one: OnePrompt, many: ManyPrompts):
    equal_kl = one_prompt_claims(one)[EQUAL_KL]
    assert {claim.text.split(":")[0] for claim in equal_kl} == {"Mallows-phi, exact"}
    first = many_prompts_claims(many)["Many prompts, first gradient step"]
    names = {claim.text.rsplit(",", 1)[0].split(": ")[0] for claim in first}
    assert not any(name.startswith("Mallows-IPO") for name in names)
    # The steps of the two are one direction, which is why.
    at = many.at.index("kl=0.5")
    theta, ipo = (
        many.values["reward"][many.variants.index(Variant(name, TRUE)), 1, at]
        for name in ("mallows_theta", "mallows_ipo")
    )
    assert theta == pytest.approx(ipo, abs=1e-9)


def test_one_dispersion_has_claims_of_the_average_alone(one: OnePrompt):
    alone = replace(one.grid, dispersions=(0.9,), seeds=2, objectives=("dpo", "mallows_theta"))
    found = one_prompt_claims(run_one_prompt(alone))
    texts = [claim.text for claim in found["One prompt, equal beta, budget 1e4"]]
    assert texts
    assert not any("raters" in text for text in texts)
    assert len(texts) == len(set(texts))


def test_each_budget_has_claims_of_its_own_and_its_name_in_the_measure(one: OnePrompt):
    sections = one_prompt_claims(one)
    for name in ("1e4", "1e8"):
        found = sections[f"One prompt, equal beta, budget {name}"]
        assert all(f"budget {name}" in claim.measure for claim in found)
    short, long = (
        {claim.text: claim.estimate.value for claim in group} for group in [*sections.values()][:2]
    )
    agreed = "Mallows-theta: less collapse: raters agree (phi 0.05)"
    assert short[agreed] > long[agreed] + 0.01


def test_claims_at_equal_kl_leave_out_samples_without_a_minimum(one: OnePrompt):
    free = one.without_optimum == 1
    assert free.any()
    assert not free.all()
    regrets = one.outcomes["regret"].copy()
    phi = one.variants.index(Variant("mallows_phi_exact", TRUE))
    regrets[phi][:, free] += 0.5
    spoilt = replace(one, outcomes={**one.outcomes, "regret": regrets})
    variant, every = Variant("mallows_phi_exact", TRUE), range(2)
    for asked, same in ((True, True), (False, False)):
        before, after = (
            one_prompt_gain(found, "regret", variant, every, ["kl=0.5"], asked)
            for found in (one, spoilt)
        )
        assert bool(np.array_equal(before, after, equal_nan=True)) is same
    before, after = (
        [claim.row() for claim in one_prompt_claims(found)[EQUAL_KL]] for found in (one, spoilt)
    )
    assert before == after


def test_the_line_of_one_prompt_at_equal_kl_leaves_out_samples_without_a_minimum(one: OnePrompt):
    regrets = one.outcomes["regret"].copy()
    theta = one.variants.index(Variant("mallows_theta", TRUE))
    regrets[theta][:, one.without_optimum == 1] += 0.5
    spoilt = replace(one, outcomes={**one.outcomes, "regret": regrets})
    first, *_ = headline(spoilt, None).values()
    assert first == next(iter(headline(one, None).values()))
    assert first[0].estimate.prompts == SMALL.seeds


def test_differences_of_the_solvers_size_are_no_finding(one: OnePrompt, many: ManyPrompts):
    _, *others = headline(one, many).values()
    (same,) = next(iter(headline(one, many).values()))
    assert same.verdict == "not seen"
    assert (same.estimate.low, same.estimate.high) == (0.0, 0.0)
    assert any(claim.estimate.value for group in others for claim in group)


def test_what_rounds_to_0_has_no_minus(one: OnePrompt, many: ManyPrompts):
    reward = 1e-9 * np.random.default_rng(0).standard_normal(many.values["reward"].shape)
    found = results(one, replace(many, values={**many.values, "reward": reward}), {}, {})
    assert all(-1e-8 < e["gain"]["value"] < 1e-8 for e in found["prompts_by_setting"])
    assert any(e["gain"]["value"] < 0 for e in found["prompts_by_setting"])
    gains = "\n".join(many_prompts_tables(found)).partition("Gain in reward")[2]
    assert "+0.0 [+0.0, +0.0]e-3" in gains
    assert "-0.0" not in gains
    nothing = Claim("DPO: more", "reward", Estimate(-1e-9, -1e-9, 1e-9, 3))
    (line,) = (x for x in claims_tables({"all": [nothing]}, LABELS) if x.startswith("| more"))
    assert "+0.0000 [0.0000, 0.0000]" in line


def test_the_main_lines_are_five_with_both_distances_and_both_budgets(
    one: OnePrompt, many: ManyPrompts
):
    lines = headline(one, many)
    assert len(lines) == 5
    _, peaks, *prompts = lines.values()
    assert [claim.text.split("budget ")[1] for claim in peaks] == ["1e4", "1e8"] * 2
    assert [[claim.text for claim in group] for group in prompts] == [["kendall", "spearman"]] * 3
    claims = many_prompts_claims(many)
    for group, section, text in (
        (prompts[0], "Many prompts, converged", "more reward"),
        (prompts[1], "Many prompts, converged", "more reward even if phi is shuffled"),
        (prompts[2], "Many prompts, first gradient step", "more reward"),
    ):
        known = {claim.text: claim.estimate for claim in claims[section]}
        for claim in group:
            assert claim.estimate == known[f"Mallows-theta, {claim.text}: {text}"]
    without = replace(one, variants=[replace(v, method="ipo") for v in one.variants])
    assert headline(without, None) == {}


def test_a_mean_is_shown_only_where_nearly_all_samples_have_the_kl(one: OnePrompt):
    found = results(one, None, {}, {})
    told = [e for e in found["by_dispersion"] if e["told"] == "0.05" and e["at"] == "kl=0.5"]
    by_phi = {(e["method"], e["phi"]): e["regret"]["prompts"] for e in told}
    # 0.05 is the truth there; the exact link told so ties arms where raters disagree.
    assert by_phi["mallows_theta", 0.05] == 0
    assert by_phi["mallows_theta", 0.9] == 3
    assert by_phi["mallows_phi_exact", 0.9] == 0
    (missed,) = (e for e in found["missed_kl"] if e["told"] == "0.05")
    assert missed["method"] == "mallows_phi_exact"
    assert missed["share"][1] > 0.01


def test_spearmans_raters_of_one_phi_agree_more_than_kendalls(one: OnePrompt):
    agreement = results(one, None, {}, {})["agreement"]
    assert agreement["kendall"] == pytest.approx([0.526, 0.582], abs=0.005)
    assert agreement["spearman"] == pytest.approx([0.59, 0.84], abs=0.01)


def test_shuffled_phi_is_compared_as_shuffled(many: ManyPrompts):
    values = {name: np.zeros_like(array) for name, array in many.values.items()}
    values["reward"][many.variants.index(Variant("mallows_theta", SHUFFLED))] -= 0.1
    found = verdicts(many_prompts_claims(replace(many, values=values))["Many prompts, converged"])
    for distance in SMALL.distances:
        name = f"Mallows-theta, {distance}: more reward"
        assert found[f"{name} even if phi is shuffled"] == "opposite"
        assert [found[name], *(found[f"{name} on {g} prompts"] for g in WORDS)] == ["not seen"] * 4
    assert len(GROUPS) == len(WORDS) + 1


WORDS = ("agreed", "disputed", "new")


def verdicts(claims: list[Claim]) -> dict[str, str]:
    return {claim.text: claim.verdict for claim in claims}


def assert_all(sections: dict[str, list[Claim]], verdict: str, least: int) -> None:
    assert len(sections) > 1
    for claims in sections.values():
        assert len(claims) >= least
        assert {claim.verdict for claim in claims} == {verdict}
