"""The contracts that all objectives share, and the registry."""

import ast
import copy
import inspect
import pickle
import textwrap
from dataclasses import dataclass, fields, is_dataclass, replace

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.objectives import (
    Objective,
    ObjectiveOutput,
    PairScores,
    ReferenceScores,
    register,
    registered,
)
from mallowspo_cli.objectives.base import log_ratios, response_logps
from mallowspo_cli.objectives.bco import BCO
from mallowspo_cli.objectives.details import DetailedScores
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.ipo import IPO, Scaling
from mallowspo_cli.objectives.mallows import Link, MallowsIPO, MallowsPhi, MallowsTheta
from mallowspo_cli.objectives.rainbow import RainbowPO
from mallowspo_cli.objectives.sft import SFT
from mallowspo_cli.objectives.simpo import SimPO

SHIPPED = [
    *("dpo", "ipo", "mallows_ipo", "mallows_phi", "mallows_theta", "rainbowpo", "sft", "simpo"),
    *("apo_down", "apo_zero", "chi_po", "cpo", "exo", "f_dpo", "hinge", "nca", "orpo", "r_dpo"),
    *("robust_dpo", "sppo_hard", "bco", "beta_dpo", "ld_dpo", "wpo"),
]
NAMES = list(registered())
NUM_PAIRS = 5


def scores(seed: int, requires_grad: bool = False) -> PairScores:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = -60 * torch.rand(2, NUM_PAIRS, generator=generator, dtype=torch.float64)
    return PairScores(
        chosen.requires_grad_(requires_grad),
        rejected.requires_grad_(requires_grad),
        torch.tensor([3, 7, 1, 12, 20]),
        torch.tensor([4, 5, 9, 2, 30]),
    )


def scores_for(objective: Objective, requires_grad: bool = False) -> PairScores:
    """What a scorer would give it."""
    plain = scores(2, requires_grad)
    if not objective.needs_details:
        return plain
    # Half of each sum in the common part; distributions of about 20 likely tokens.
    return DetailedScores(
        **vars(plain),
        chosen_common_logps=plain.chosen_logps / 2,
        rejected_common_logps=plain.rejected_logps / 2,
        chosen_log_collisions=-3.0 * plain.chosen_tokens.double(),
        rejected_log_collisions=-3.0 * plain.rejected_tokens.double(),
    )


def reference_scores(weights: Tensor | None = None) -> ReferenceScores:
    base = scores(seed=1)
    weights = torch.linspace(0.3, 1.7, NUM_PAIRS) if weights is None else weights
    return ReferenceScores(
        base.chosen_logps,
        base.rejected_logps,
        base.chosen_tokens,
        base.rejected_tokens,
        weights / 2,
    )


def test_the_shipped_names_are_registered_and_sorted() -> None:
    names = list(registered())
    assert names == sorted(names)
    assert set(SHIPPED) <= set(names)


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_rewards_are_one_per_pair_and_only_losses_carry_a_gradient(name: str) -> None:
    objective = registered()[name]()
    policy = scores_for(objective, requires_grad=True)
    output = objective(policy, reference_scores())
    for values in (output.losses, output.chosen_rewards, output.rejected_rewards):
        assert values.shape == (NUM_PAIRS,)
        assert torch.isfinite(values).all()
    detached = (output.chosen_rewards, output.rejected_rewards, *output.metrics.values())
    assert not any(values.requires_grad for values in detached)
    (gradient,) = torch.autograd.grad(output.losses.sum(), policy.chosen_logps)
    assert (gradient < 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_pairs_loss_does_not_depend_on_the_rest_of_the_batch(name: str) -> None:
    objective, reference = registered()[name](), reference_scores()
    policy = scores_for(objective)
    whole = objective(policy, reference).losses
    for index in range(NUM_PAIRS):
        one = slice(index, index + 1)
        alone = objective(
            type(policy)(*(getattr(policy, field.name)[one] for field in fields(policy))),
            ReferenceScores(
                *(getattr(reference, field.name)[one] for field in fields(ReferenceScores))
            ),
        )
        torch.testing.assert_close(alone.losses, whole[one])


@pytest.mark.parametrize("name", NAMES)
def test_only_what_the_objective_asks_for_is_read(name: str) -> None:
    objective, reference = registered()[name](), reference_scores()
    policy = scores_for(objective)
    nothing = torch.full((NUM_PAIRS,), torch.nan, dtype=torch.float64)
    partial = ReferenceScores(
        reference.chosen_logps if objective.needs_reference else nothing,
        reference.rejected_logps if objective.needs_reference else nothing,
        reference.chosen_tokens,
        reference.rejected_tokens,
        reference.neg_log_phi if objective.needs_dispersion else nothing,
    )
    expected = objective(policy, reference)
    found = objective(policy, partial)
    torch.testing.assert_close(found.losses, expected.losses)
    torch.testing.assert_close(found.chosen_rewards, expected.chosen_rewards)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_reference_is_refused_where_it_is_needed(name: str) -> None:
    objective = registered()[name]()
    if objective.needs_reference or objective.needs_dispersion:
        with pytest.raises(ValueError, match="needs ReferenceScores"):
            objective(scores_for(objective), None)
    else:
        assert torch.isfinite(objective(scores_for(objective), None).losses).all()


def test_a_loss_bound_to_a_step_can_be_copied_and_pickled_and_replace_starts_anew() -> None:
    bound = BCO(beta=0.2).at_step({"shift": 0.7, "steps": 3.0})
    for same in (copy.copy(bound), copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))):
        assert same == bound
        assert same.running == {"shift": 0.7, "steps": 3.0}
        found, expected = (loss(scores(2), reference_scores()) for loss in (same, bound))
        assert torch.equal(found.losses, expected.losses)
    assert replace(bound).running == {} == BCO().running


def test_a_loss_follows_the_steps_where_it_makes_statistics_of_them() -> None:
    found = {name for name in SHIPPED if registered()[name]().follows_steps}
    assert found == {"bco", "beta_dpo"}


def test_a_reference_of_one_pair_does_not_broadcast_over_the_batch() -> None:
    reference = reference_scores()
    one = ReferenceScores(*(getattr(reference, field.name)[:1] for field in fields(reference)))
    with pytest.raises(ValueError, match="expected reference scores of 5 pairs, found 1"):
        DPO()(scores(seed=2), one)


def test_scores_of_another_shape_are_refused() -> None:
    column, row = torch.zeros(4, 1), torch.zeros(4)
    with pytest.raises(ValueError, match=r"one shape \(B,\)"):
        PairScores(row, column, row, row)
    with pytest.raises(ValueError, match=r"one shape \(B,\)"):
        PairScores(column, column, column, column)
    with pytest.raises(ValueError, match="neg_log_phi"):
        ReferenceScores(row, row, row, row, torch.zeros(3))


def test_sixteen_bit_log_probs_are_refused() -> None:
    half = torch.zeros(2, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="bfloat16"):
        SFT()(PairScores(half, half, torch.ones(2), torch.ones(2)), None)


def test_mean_log_probs_divide_by_the_responses_own_tokens_and_an_empty_one_has_zero() -> None:
    policy = PairScores(
        torch.tensor([-6.0, 0.0]),
        torch.tensor([-6.0, -5.0]),
        torch.tensor([3, 0]),
        torch.tensor([2, 5]),
    )
    chosen, rejected = response_logps(policy, length_normalised=True)
    assert chosen.tolist() == [-2.0, 0.0]
    assert rejected.tolist() == [-3.0, -1.0]


def test_log_ratios_are_policy_less_reference() -> None:
    policy, reference = scores(seed=2), reference_scores()
    chosen, rejected = log_ratios(policy, reference, length_normalised=False)
    torch.testing.assert_close(chosen, policy.chosen_logps - reference.chosen_logps)
    torch.testing.assert_close(rejected, policy.rejected_logps - reference.rejected_logps)


@pytest.mark.parametrize(
    ("objective", "knobs"),
    [
        (DPO, {"beta": 0.1, "label_smoothing": 0.0, "length_normalised": False}),
        (MallowsTheta, {"beta": 0.1, "label_smoothing": 0.0, "length_normalised": False}),
        (
            MallowsPhi,
            {"beta": 0.1, "label_smoothing": 0.0, "length_normalised": False, "link": Link.exact},
        ),
        (IPO, {"beta": 0.1, "length_normalised": False, "scaling": Scaling.margin}),
        (MallowsIPO, {"beta": 0.1, "length_normalised": False, "scaling": Scaling.margin}),
        (SimPO, {"beta": 10.0, "home_advantage": 0.3, "length_normalised": True}),
        (
            RainbowPO,
            {
                "beta": 10.0,
                "length_normalised": True,
                "home_advantage": 0.1,
                "mixing": 0.25,
                "sft_coefficient": 0.0,
            },
        ),
        (SFT, {}),
    ],
)
def test_the_knobs_and_their_defaults_survive_the_recipe(
    objective: type[Objective], knobs: dict[str, object]
) -> None:
    built = OmegaConf.to_object(OmegaConf.structured(objective))
    assert type(built) is objective
    assert {field.name: getattr(built, field.name) for field in fields(built)} == knobs


@pytest.mark.parametrize(
    ("objective", "override"),
    [
        (MallowsPhi, {"link": "smooth"}),
        (IPO, {"scaling": "target"}),
        (MallowsIPO, {"scaling": "target"}),
    ],
)
def test_a_choice_in_a_recipe_becomes_the_enum_and_python_may_name_it_too(
    objective: type[Objective], override: dict[str, str]
) -> None:
    ((knob, value),) = override.items()
    built = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(objective), override))
    assert type(built) is objective
    assert getattr(built, knob) in (Link.smooth, Scaling.target)
    assert getattr(built, knob) is getattr(objective(**override), knob)
    with pytest.raises(RecipeError, match=rf"objective\.{knob}=rough: expected one of .*{value}"):
        objective(**{knob: "rough"})


@pytest.mark.parametrize(
    ("objective", "knob", "bad"),
    [
        *((cls, "beta", 0) for cls in (DPO, MallowsTheta, MallowsPhi, IPO, MallowsIPO)),
        *((cls, "beta", -1.0) for cls in (SimPO, RainbowPO)),
        (DPO, "beta", float("nan")),
        (DPO, "beta", float("inf")),
        *((cls, "label_smoothing", 0.5) for cls in (DPO, MallowsTheta, MallowsPhi)),
        (DPO, "label_smoothing", -0.1),
        (RainbowPO, "mixing", 1.1),
        (RainbowPO, "mixing", -0.1),
        (RainbowPO, "sft_coefficient", -1.0),
        (RainbowPO, "home_advantage", float("inf")),
        (SimPO, "home_advantage", float("nan")),
    ],
)
def test_a_knob_out_of_range_is_refused_from_python_and_from_a_recipe(
    objective: type[Objective], knob: str, bad: float
) -> None:
    message = rf"objective\.{knob}={bad} does not suit {objective.__name__}: expected a"
    with pytest.raises(RecipeError, match=message):
        objective(**{knob: bad})
    node = OmegaConf.merge(OmegaConf.structured(objective), {knob: bad})
    with pytest.raises(RecipeError, match=rf"objective\.{knob}="):
        OmegaConf.to_object(node)


def test_a_taken_name_is_refused_and_the_first_owner_stays() -> None:
    before = registered()
    with pytest.raises(RecipeError, match=r"'dpo' is taken by mallowspo_cli\.objectives\.dpo\.DPO"):
        register("dpo")(IPO)
    assert registered() == before


def test_a_class_without_its_own_dataclass_decorator_is_refused() -> None:
    class Forgetful(DPO):
        gamma: float = 1.0

    with pytest.raises(TypeError, match="Forgetful: put @dataclass"):
        register("forgetful")(Forgetful)
    assert "forgetful" not in registered()


def test_a_new_objective_needs_only_a_class_under_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mallowspo_cli.objectives.base._objectives", dict(registered()))

    @register("one_of_ours")
    @dataclass(kw_only=True)
    class Hinge(Objective):
        margin: float = 1.0
        needs_reference = False
        needs_dispersion = False

        def __call__(
            self, policy: PairScores, reference: ReferenceScores | None
        ) -> ObjectiveOutput:
            gap = policy.chosen_logps - policy.rejected_logps
            return ObjectiveOutput((self.margin - gap).relu(), gap, -gap, {})

    assert registered()["one_of_ours"] is Hinge
    assert is_dataclass(OmegaConf.to_object(OmegaConf.structured(Hinge)))


def test_every_knob_has_a_line_that_says_what_it_is() -> None:
    for objective in (registered()[name] for name in NAMES):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(objective))).body
        assert isinstance(node, ast.ClassDef)
        for knob, line in zip(node.body, node.body[1:], strict=False):
            if isinstance(knob, ast.AnnAssign):
                assert isinstance(line, ast.Expr), ast.unparse(knob)
                assert isinstance(line.value, ast.Constant), ast.unparse(knob)
