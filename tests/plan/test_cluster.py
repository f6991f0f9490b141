"""A plan for several nodes: by hand, for Llama-3-8B, whose parameters are counted first."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.models.load import add_lora
from mallowspo_cli.plan.compute import step_flops, traffic
from mallowspo_cli.plan.hardware import GIB, TABLE, Hardware, read_hardware
from mallowspo_cli.plan.memory import peak_memory, state_memory
from mallowspo_cli.plan.setting import PackSize, Setting
from mallowspo_cli.plan.shapes import ModelShape
from mallowspo_cli.plan.steps import plan_steps
from mallowspo_cli.recipe.choices import ActivationCheckpointing, Optimizer, Precision
from mallowspo_cli.recipe.schema import LoraConfig
from tests.test_plan import LLAMA3_8B, build, llama3_8b

NONE = ActivationCheckpointing.none
BF16, FP32 = Precision.bf16, Precision.fp32

ATTENTION = 4096 * 4096 * 2 + 4096 * 1024 * 2  # q and o; k and v of 8 heads of 128
MLP = 3 * 4096 * 14336
BLOCK = ATTENTION + MLP + 2 * 4096  # and two norms
TABLE_8B = 128256 * 4096  # embedding; the output layer is another
PARAMETERS = 32 * BLOCK + 2 * TABLE_8B + 4096


def shape_8b() -> ModelShape:
    shape = llama3_8b()
    assert shape.parameters == PARAMETERS == 8_030_261_248
    return shape


@pytest.mark.parametrize(
    ("precision", "processes", "weights", "gradients", "optimizer"),
    [
        # bf16 weights, gradients added up in float32, float32 masters and two moments: 2 + 4 + 12.
        (BF16, 8, 2, 4, 12),
        (BF16, 64, 2, 4, 12),
        (BF16, 512, 2, 4, 12),
        # float32 throughout: 4 + 4 + 8, no masters beside the weights.
        (FP32, 8, 4, 4, 8),
        # One process: float32 weights are the masters, and autocast computes in bf16.
        (BF16, 1, 4, 4, 8),
    ],
)
def test_states_are_dealt_out_over_the_processes(
    precision: Precision, processes: int, weights: int, gradients: int, optimizer: int
) -> None:
    found = state_memory(shape_8b(), Setting(precision, processes))
    assert found.weights == pytest.approx(weights * PARAMETERS / processes)
    assert found.gradients == pytest.approx(gradients * PARAMETERS / processes)
    assert found.optimizer == pytest.approx(optimizer * PARAMETERS / processes)
    each = weights + gradients + optimizer
    assert found.peak == pytest.approx(each * PARAMETERS / processes)


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [(Optimizer.adamw, 8), (Optimizer.adamw_8bit, 2), (Optimizer.rmsprop, 4)],
)
def test_an_optimizer_keeps_its_moments_beside_the_masters(
    optimizer: Optimizer, moments: int
) -> None:
    alone = state_memory(shape_8b(), Setting(BF16, optimizer=optimizer))
    assert alone.optimizer == moments * PARAMETERS
    sharded = state_memory(shape_8b(), Setting(BF16, 8, optimizer=optimizer))
    assert sharded.optimizer == pytest.approx((4 + moments) * PARAMETERS / 8)


def test_the_live_gather_is_two_blocks_and_the_output_layer() -> None:
    setting, pack = Setting(BF16, 64), PackSize.of([(400, 300, 300)])
    found = peak_memory(shape_8b(), setting, pack, NONE)
    assert found.when == "output layer, backward"
    # 2 x 218.1e6 + 525.3e6 parameters of 2 bytes: 0.87 GB and 1.05 GB.
    assert found.copies == 2 * (2 * BLOCK + TABLE_8B)
    # The output layer's gradient, summed in float32 and written in bf16: 4 + 2 bytes.
    assert found.head >= 6 * TABLE_8B


@pytest.mark.parametrize(
    ("text", "processes", "bandwidth", "seconds"),
    [
        # 6 bytes x 8.03e9 x 7/8 = 42.16e9; at 360 GB/s 0.117 s.
        ("8xh100", 8, 360e9, 0.1171),
        # Two nodes: x 15/16 = 45.17e9; at 50 GB/s 0.903 s.
        ("2x8xh100", 16, 50e9, 0.9034),
        # Eight nodes: x 63/64 = 47.43e9; 0.949 s.
        ("8x8xh100", 64, 50e9, 0.9486),
        ("64xh100", 64, 50e9, 0.9486),
        # Sixty-four nodes: x 511/512 = 48.09e9; 0.962 s.
        ("512xh100", 512, 50e9, 0.9617),
        ("8x8xa100", 64, 25e9, 1.8972),
    ],
)
def test_a_pack_sends_six_bytes_a_parameter_over_the_slowest_link(
    text: str, processes: int, bandwidth: float, seconds: float
) -> None:
    hardware = read_hardware(text, None, BF16)
    assert hardware.world_size == processes
    assert hardware.bandwidth == bandwidth
    sent = traffic(shape_8b(), Setting(BF16, processes))
    assert sent == pytest.approx(3 * 2 * PARAMETERS * (processes - 1) / processes)
    assert sent / hardware.bandwidth == pytest.approx(seconds, rel=1e-3)


def test_float32_weights_are_twice_as_much_to_send() -> None:
    half, single = (traffic(shape_8b(), Setting(p, 8)) for p in (BF16, FP32))
    assert single == 2 * half


@pytest.mark.parametrize(
    ("text", "name", "nodes", "devices"),
    [
        ("64xh100", "8x8xh100", 8, 8),
        ("8x8xh100", "8x8xh100", 8, 8),
        ("512xh100", "64x8xh100", 64, 8),
        # Nodes of another size are said in full.
        ("16x4xh100", "16x4xh100", 16, 4),
        ("4xh100", "4xh100", 1, 4),
    ],
)
def test_nodes_have_eight_devices_unless_said_otherwise(
    text: str, name: str, nodes: int, devices: int
) -> None:
    found = read_hardware(text, None, BF16)
    assert (found.nodes, found.devices, found.name) == (nodes, devices, name)


def test_twelve_devices_are_no_whole_nodes() -> None:
    with pytest.raises(RecipeError, match="whole nodes: 2x8xh100"):
        read_hardware("12xh100", None, BF16)


def test_a_measured_bandwidth_takes_the_place_of_the_tables() -> None:
    for text in ("8xh100", "8x8xh100"):
        assert read_hardware(text, None, BF16, 300e9).bandwidth == 300e9
    assert read_hardware("8x8xh100", None, BF16).link == "between nodes"
    assert read_hardware("8xh100", None, BF16).link == "within a node"


def steps_of(hardware: Hardware, pairs: int, shape: ModelShape) -> Any:
    """A step of equal pairs of 1,000 tokens, 400 of them prompt, in packs of 8,192."""
    rows = np.array([(400, 300, 300)] * pairs)
    return plan_steps(shape, Setting(BF16, hardware.world_size), hardware, [rows], 8192, NONE)


def test_a_step_takes_the_longer_of_computing_and_sending_and_at_most_their_sum() -> None:
    shape, nodes = shape_8b(), Hardware(TABLE[0], 8, 8)
    found = steps_of(nodes, 256, shape)
    # Four pairs on each of 64 processes, in one pack.
    assert found.packs == 1
    assert found.tokens == 256_000
    each = step_flops(shape, [(400, 300, 300)] * 4, NONE, Setting(BF16, 64))
    # 3 x (2 x 6.98e9 x 4,000 + attention) + output layer of 2,400 tokens: 0.18e15 at 494.5e12.
    computing, sending = each / 494.5e12, 47.43e9 / 50e9
    assert computing == pytest.approx(0.37, rel=0.05)
    assert found.compute_seconds == pytest.approx(computing)
    assert found.traffic_seconds == pytest.approx(sending, rel=1e-3)
    assert found.seconds == pytest.approx(max(computing, sending), rel=1e-3)
    assert found.seconds_apart == pytest.approx(computing + sending, rel=1e-3)
    # So many tokens would be computed in the time of the sending.
    assert found.hiding_tokens == pytest.approx(4000 * sending / computing, rel=1e-3)
    # On a network as fast as the node's own links, computing is what takes long.
    fast = replace(nodes, device=replace(nodes.device, across=360e9))
    quick = steps_of(fast, 256, shape)
    assert quick.seconds == quick.compute_seconds == found.compute_seconds


def test_one_process_has_nothing_to_hide() -> None:
    found = steps_of(Hardware(TABLE[0]), 8, shape_8b())
    assert found.hiding_tokens == found.traffic_seconds == 0
    assert found.seconds_apart == found.seconds


def test_adapters_are_dealt_out_and_reduced_but_frozen_weights_are_gathered_too() -> None:
    whole = shape_8b()
    with torch.device("meta"):
        shape = ModelShape.of(
            add_lora(build("Llama", device="meta", **LLAMA3_8B), LoraConfig(rank=16), seed=0)
        )
    # Rank 16 on all linear layers: 16 (in + out) of each.
    q_and_o, k_and_v, mlp = 2 * 2 * 4096, 2 * (4096 + 1024), 3 * (4096 + 14336)
    adapters = 32 * 16 * (q_and_o + k_and_v + mlp)
    assert shape.trained == adapters == 41_943_040
    sharded = Setting(BF16, 8)
    states = state_memory(shape, sharded)
    assert states.weights == pytest.approx(2 * (PARAMETERS + adapters) / 8)
    assert states.gradients == pytest.approx(4 * adapters / 8)
    assert states.optimizer == pytest.approx(12 * adapters / 8)
    # All weights twice, gradients of adapters alone: two thirds of full fine-tuning's.
    assert traffic(shape, sharded) == pytest.approx(
        2 * 7 / 8 * (2 * (PARAMETERS + adapters) + adapters)
    )
    assert traffic(shape, sharded) / traffic(whole, sharded) == pytest.approx(2 / 3, rel=0.01)


def test_the_plan_for_a_node_leaves_its_device_as_it_is() -> None:
    assert TABLE[0].within == 360e9
    assert TABLE[0].across == 50e9
    assert TABLE[0].memory == pytest.approx(79.1 * GIB)
