"""The learning rate by hand, the optimizers by hand, and what decays."""

import importlib.util
import math
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mallowspo_cli.errors import TrainingError
from mallowspo_cli.recipe.choices import Optimizer, Scheduler
from mallowspo_cli.recipe.schema import TrainConfig
from mallowspo_cli.training.optim import (
    build_optimizer,
    check_optimizer,
    is_matrix,
    learning_rate,
    warmup_steps,
)


def rates(total: int, scheduler: Scheduler, warmup_ratio: float) -> list[float]:
    config = TrainConfig(learning_rate=8.0, scheduler=scheduler, warmup_ratio=warmup_ratio)
    return [learning_rate(step, total, config) for step in range(total)]


def test_constant_rises_to_the_peak_and_stays() -> None:
    assert rates(8, Scheduler.constant, 0.5) == [2, 4, 6, 8, 8, 8, 8, 8]


def test_linear_rises_to_the_peak_and_falls_to_one_step_above_zero() -> None:
    assert rates(8, Scheduler.linear, 0.5) == [2, 4, 6, 8, 8, 6, 4, 2]


def test_cosine_rises_to_the_peak_and_falls_along_a_half_cosine() -> None:
    falling = [4 * (1 + math.cos(math.pi * done)) for done in (0, 0.25, 0.5, 0.75)]
    assert rates(8, Scheduler.cosine, 0.5) == pytest.approx([2, 4, 6, 8, *falling])
    assert falling[2] == pytest.approx(4)


@pytest.mark.parametrize("scheduler", list(Scheduler))
def test_without_warm_up_the_first_step_has_the_peak(scheduler: Scheduler) -> None:
    assert rates(5, scheduler, 0.0)[0] == 8


@pytest.mark.parametrize("scheduler", list(Scheduler))
def test_a_warm_up_over_all_steps_ends_at_the_peak(scheduler: Scheduler) -> None:
    assert rates(4, scheduler, 1.0) == [2, 4, 6, 8]


@pytest.mark.parametrize("scheduler", list(Scheduler))
def test_a_warm_up_is_at_least_one_step(scheduler: Scheduler) -> None:
    assert rates(3, scheduler, 0.01)[0] == 8


@pytest.mark.parametrize("scheduler", list(Scheduler))
def test_a_run_of_one_step_has_the_peak(scheduler: Scheduler) -> None:
    for warmup_ratio in (0.0, 0.1, 1.0):
        assert rates(1, scheduler, warmup_ratio) == [8]


@pytest.mark.parametrize("scheduler", list(Scheduler))
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 1.0])
def test_a_number_of_warm_up_steps_takes_the_place_of_the_ratio(
    scheduler: Scheduler, warmup_ratio: float
) -> None:
    config = TrainConfig(
        learning_rate=8.0, scheduler=scheduler, warmup_ratio=warmup_ratio, warmup_steps=4
    )
    assert [learning_rate(step, 8, config) for step in range(5)] == [2, 4, 6, 8, 8]
    assert warmup_steps(8, config) == 4


def test_without_a_number_of_warm_up_steps_the_ratio_holds_and_no_steps_are_a_number_too() -> None:
    assert warmup_steps(233, TrainConfig(warmup_ratio=0.1)) == 24
    assert warmup_steps(233, TrainConfig(warmup_ratio=0.1, warmup_steps=0)) == 0
    assert learning_rate(0, 233, TrainConfig(learning_rate=8.0, warmup_steps=0)) == 8


@pytest.mark.parametrize("scheduler", list(Scheduler))
def test_a_run_shorter_than_its_warm_up_keeps_rising(scheduler: Scheduler) -> None:
    config = TrainConfig(learning_rate=150.0, scheduler=scheduler, warmup_steps=150)
    assert [learning_rate(step, 3, config) for step in range(3)] == [1, 2, 3]


@given(
    total=st.integers(1, 300),
    scheduler=st.sampled_from(list(Scheduler)),
    warmup_ratio=st.floats(0, 1),
)
def test_no_step_is_lost_to_a_rate_of_zero_or_above_the_peak(
    total: int, scheduler: Scheduler, warmup_ratio: float
) -> None:
    found = rates(total, scheduler, warmup_ratio)
    assert all(0 < rate <= 8 for rate in found)
    peak = found.index(max(found))
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 2), nn.LayerNorm(2)
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)


class FakeAdamW8bit(torch.optim.AdamW):
    """Stands for bitsandbytes' class, which needs its package and a GPU."""


@pytest.fixture
def fake_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a CUDA device and bitsandbytes."""
    package, optim = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    package.__spec__ = importlib.util.spec_from_loader("bitsandbytes", loader=None)
    optim.AdamW8bit = FakeAdamW8bit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


@pytest.mark.parametrize("kind", list(Optimizer))
@pytest.mark.usefixtures("fake_bitsandbytes")
def test_only_matrices_decay_and_only_what_is_trained_is_held(kind: Optimizer) -> None:
    model = Small()
    config = TrainConfig(optimizer=kind, weight_decay=0.1, learning_rate=0.5)
    optimizer = build_optimizer(model, config)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {
        id(model.linear.weight): 0.1,
        id(model.linear.bias): 0.0,
        id(model.norm.weight): 0.0,
        id(model.norm.bias): 0.0,
    }
    assert {g["lr"] for g in optimizer.param_groups} == {0.5}
    assert (
        type(optimizer)
        is {
            Optimizer.adamw: torch.optim.AdamW,
            Optimizer.adamw_8bit: FakeAdamW8bit,
            Optimizer.rmsprop: torch.optim.RMSprop,
        }[kind]
    )


def test_a_matrix_of_which_zero3_left_nothing_still_decays() -> None:
    model = Small()
    for parameter in model.parameters():
        # What ZeRO-3 does to it.
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert model.linear.weight.shape == (0,)
    assert is_matrix(model.linear.weight)
    assert not is_matrix(model.linear.bias)
    matrices, others = build_optimizer(model, TrainConfig(weight_decay=0.1)).param_groups
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in matrices["params"]] == [id(model.linear.weight)]
    assert len(others["params"]) == 3


def test_a_model_without_biases_needs_no_empty_group() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2, bias=False), TrainConfig())
    assert len(optimizer.param_groups) == 1


def test_the_first_step_is_adams_with_decoupled_decay() -> None:
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(2.0)
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.1, learning_rate=0.5))
    (3 * model.weight.sum() + 3 * model.bias.sum()).backward()
    optimizer.step()
    # Adam's first step is lr * sign(gradient); the decay takes lr * 0.1 * weight beside it.
    assert model.weight.item() == pytest.approx(2 - 0.5 * 0.1 * 2 - 0.5)
    assert model.bias.item() == pytest.approx(2 - 0.5)


def test_the_first_step_of_rmsprop_is_torchs_with_the_decay_in_the_gradient() -> None:
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(2.0)
    config = TrainConfig(optimizer=Optimizer.rmsprop, weight_decay=0.1, learning_rate=0.5)
    optimizer = build_optimizer(model, config)
    (3 * model.weight.sum() + 3 * model.bias.sum()).backward()
    optimizer.step()
    # The mean square starts at 0 and moves by 1 - alpha = 0.01 of the way, so that the first step
    # is lr * g / (0.1 |g| + eps), whatever g is: ten times the rate.
    assert model.weight.item() == pytest.approx(2 - 0.5 * 3.2 / (0.1 * 3.2 + 1e-8))
    assert model.bias.item() == pytest.approx(2 - 0.5 * 10)
    assert {(g["alpha"], g["eps"], g["momentum"]) for g in optimizer.param_groups} == {
        (0.99, 1e-8, 0)
    }


def test_rmsprop_holds_one_moment_in_float32() -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, TrainConfig(optimizer=Optimizer.rmsprop))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    held = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
    assert [v.shape for v in held] == [(2, 2), (2,)]
    assert {v.dtype for v in held} == {torch.float32}


@pytest.mark.usefixtures("fake_bitsandbytes")
def test_eight_bit_moments_are_taken_with_the_same_betas_over_float32_weights() -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, TrainConfig(optimizer=Optimizer.adamw_8bit))
    assert {g["betas"] for g in optimizer.param_groups} == {(0.9, 0.999)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.usefixtures("fake_bitsandbytes")
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (
            "package",
            "train.optimizer=adamw_8bit needs bitsandbytes: pip install 'mallowspo[quantized]'",
        ),
        (
            "device",
            "train.optimizer=adamw_8bit needs a CUDA device. Take train.optimizer=adamw here.",
        ),
    ],
)
def test_eight_bit_moments_are_refused_in_one_line_where_something_is_missing(
    monkeypatch: pytest.MonkeyPatch, missing: str, message: str
) -> None:
    config = TrainConfig(optimizer=Optimizer.adamw_8bit)
    check_optimizer(config)
    if missing == "package":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    else:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for refuse in (check_optimizer, lambda c: build_optimizer(nn.Linear(2, 2), c)):
        with pytest.raises(TrainingError) as caught:
            refuse(config)
        assert str(caught.value) == message
    for other in (Optimizer.adamw, Optimizer.rmsprop):
        check_optimizer(TrainConfig(optimizer=other))
