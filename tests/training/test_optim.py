"""The learning rate by hand, and what decays."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mallowspo_cli.recipe.choices import Scheduler
from mallowspo_cli.recipe.schema import TrainConfig
from mallowspo_cli.training.optim import build_optimizer, learning_rate


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


def test_only_matrices_decay_and_only_what_is_trained_is_held() -> None:
    model = Small()
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.1, learning_rate=0.5))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {
        id(model.linear.weight): 0.1,
        id(model.linear.bias): 0.0,
        id(model.norm.weight): 0.0,
        id(model.norm.bias): 0.0,
    }
    assert {g["lr"] for g in optimizer.param_groups} == {0.5}


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
