"""Predicted FLOPs and memory are those of a real training step; packs and times follow."""

import json
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mallowspo_cli.data.report import predicted_gain
from mallowspo_cli.data.table import TokenizedPair
from mallowspo_cli.errors import RecipeError
from mallowspo_cli.models import head as head_module
from mallowspo_cli.models.checkpointing import checkpoint_blocks
from mallowspo_cli.models.load import add_lora
from mallowspo_cli.packing.layout import Layout, collate
from mallowspo_cli.plan.compute import step_flops, traffic
from mallowspo_cli.plan.gain import gain_over_padding
from mallowspo_cli.plan.hardware import GIB, TABLE, Hardware, own_memory, read_hardware
from mallowspo_cli.plan.memory import block_bytes, peak_memory, state_memory
from mallowspo_cli.plan.propose import MEMORY_SHARE, MOST_TOKENS, propose, proposed_pack_tokens
from mallowspo_cli.plan.setting import PackSize, Setting
from mallowspo_cli.plan.shapes import ModelShape
from mallowspo_cli.plan.steps import plan_steps, sample_steps
from mallowspo_cli.recipe.choices import ActivationCheckpointing, Order, Precision
from mallowspo_cli.recipe.schema import LoraConfig
from mallowspo_cli.scoring import PairScorer

NONE, SELECTIVE, FULL = (ActivationCheckpointing(p) for p in ("none", "selective", "full"))
CPU32 = Setting(Precision.fp32, cpu=True)
VOCABULARY = 2000
LENGTHS = Path(__file__).parent.parent / "benchmarks" / "lengths" / "lengths_dpo_en_demo.json"

GROUPED: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Gemma2": {**GROUPED, "head_dim": 32},
    "Qwen3": {**GROUPED, "head_dim": 32},
    "Phi3": {**GROUPED, "pad_token_id": 0, "eos_token_id": 1},
    "GPT2": {
        "n_embd": 256,
        "n_layer": 4,
        "n_head": 8,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
}


NARROW = {"hidden_size": 64, "intermediate_size": 172, "vocab_size": 800}
"""For bfloat16, which many CPUs compute slowly."""


def build(family: str, device: str = "cpu", **options: Any) -> nn.Module:
    """A random model of a family."""
    config = getattr(transformers, f"{family}Config")(
        **{"vocab_size": VOCABULARY, **FAMILIES[family], **options}
    )
    config._attn_implementation = "mallowspo"
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def scorer_of(model: nn.Module, checkpointing: ActivationCheckpointing, rank: int) -> PairScorer:
    """As training makes it."""
    if rank:
        model = add_lora(model, LoraConfig(rank=rank), seed=0)
    base = model.get_base_model() if rank else model  # type: ignore[operator]
    checkpoint_blocks(base, checkpointing)
    return PairScorer(model)


def pairs_of(lengths: list[tuple[int, int, int]], vocab: int = 200) -> list[TokenizedPair]:
    """Pairs of random tokens."""
    generator = np.random.default_rng(0)
    return [
        TokenizedPair(str(i), *(generator.integers(3, vocab, n).astype(np.int32) for n in row))
        for i, row in enumerate(lengths)
    ]


def seen(query: list[int], key: list[int]) -> float:
    """Keys that all queries of a causal segment see, times heads and width."""
    heads, queries, width = query[1:]
    return heads * width * (queries * key[2] - queries**2 / 2)


aten = torch.ops.aten
COUNTED = {
    # Not counted by torch: sums in place, and attention on a CPU.
    aten.addmm_: lambda _, a, b, **kw: 2 * a[0] * a[1] * b[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **kw: 4 * seen(q, k),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *a, **kw: 8 * seen(q, k)
    ),
}


@pytest.mark.parametrize("kept", [2**26, 0], ids=["logits kept", "logits again"])
@pytest.mark.parametrize("checkpointing", [NONE, SELECTIVE, FULL], ids=str)
@pytest.mark.parametrize(
    ("family", "rank", "tolerance"),
    # Gemma 2's capped attention is computed with all scores on a CPU, of which the plan counts
    # those that are seen. The first block of a frozen model needs no gradient of its inputs.
    [("Llama", 0, 1e-9), ("GPT2", 0, 1e-9), ("Gemma2", 0, 0.02), ("Llama", 8, 0.02)],
)
def test_flops_are_those_that_torch_counts(
    family: str,
    rank: int,
    tolerance: float,
    checkpointing: ActivationCheckpointing,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_module, "KEPT_BYTES", {"cpu": kept})
    lengths = [(30, 20, 25), (10, 40, 12)]
    scorer = scorer_of(build(family), checkpointing, rank)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        scores = scorer(collate(pairs_of(lengths)))
        (scores.chosen_logps - scores.rejected_logps).sum().backward()
    planned = step_flops(ModelShape.of(scorer.model), lengths, checkpointing, CPU32)
    assert planned == pytest.approx(counter.get_total_flops(), rel=tolerance)


def test_flops_of_padded_batches_count_padding_but_not_in_the_output_layer() -> None:
    shape = ModelShape.of(build("Llama", device="meta"))
    lengths = [(30, 20, 25), (10, 40, 12)]
    flops, tokens, targets = shape.flops, 2 * 2 * 55, 20 + 25 + 40 + 12
    planned = step_flops(shape, lengths, NONE, CPU32, Layout.padded)
    body = flops.per_token * tokens + flops.per_visible * tokens * 55 / 2
    assert planned == pytest.approx(3 * (body + flops.per_target * targets))


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that are there, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.live = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


def measured_peak(scorer: PairScorer, pairs: list[TokenizedPair], precision: Precision) -> int:
    """Bytes at the peak of the second of two packs, as in the training loop; no optimizer."""
    batch = collate(pairs)
    with LiveBytes() as tracker:
        for parameter in scorer.parameters():
            tracker.add(parameter)
        for _ in range(2):
            tracker.peak = 0
            with torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.bf16):
                scores = scorer(batch)
            (scores.chosen_logps - scores.rejected_logps).sum().backward()
            del scores
    return tracker.peak


@pytest.mark.parametrize(
    ("family", "checkpointing", "precision", "rank", "options"),
    [
        ("Llama", NONE, Precision.fp32, 0, {}),
        ("Llama", SELECTIVE, Precision.fp32, 0, {}),
        ("Llama", FULL, Precision.fp32, 0, {}),
        # More logits than are kept, in several chunks.
        ("Llama", NONE, Precision.fp32, 0, {"vocab_size": 24000, "num_hidden_layers": 2}),
        ("Llama", NONE, Precision.bf16, 0, NARROW),
        ("Llama", FULL, Precision.bf16, 0, NARROW),
        ("Llama", NONE, Precision.fp32, 8, {}),
        ("Llama", SELECTIVE, Precision.fp32, 8, {"num_hidden_layers": 2}),
        ("GPT2", NONE, Precision.fp32, 0, {"n_layer": 2}),
        ("Qwen3", FULL, Precision.fp32, 0, {"num_hidden_layers": 2}),
        ("Phi3", NONE, Precision.fp32, 0, {"num_hidden_layers": 2}),
    ],
)
def test_peak_memory_is_that_of_live_tensors(
    family: str,
    checkpointing: ActivationCheckpointing,
    precision: Precision,
    rank: int,
    options: dict[str, Any],
) -> None:
    lengths = [(60, 70, 70)] * 8
    scorer = scorer_of(build(family, **options), checkpointing, rank)
    measured = measured_peak(scorer, pairs_of(lengths), precision)
    setting = Setting(precision, cpu=True)
    planned = peak_memory(ModelShape.of(scorer.model), setting, PackSize.of(lengths), checkpointing)
    states = planned.weights + planned.gradients
    # What comes on top of the states, which are exact.
    assert planned.peak - planned.optimizer - states == pytest.approx(measured - states, rel=0.07)


LLAMA3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""The published dimensions."""


@cache
def llama3_8b() -> ModelShape:
    return ModelShape.of(build("Llama", device="meta", **LLAMA3_8B))


@pytest.fixture(scope="module")
def large() -> ModelShape:
    """Llama-3-8B, without weights."""
    return llama3_8b()


@pytest.fixture(scope="module")
def lengths() -> np.ndarray[Any, np.dtype[np.int64]]:
    """Those of a published data set, at most 2,048 tokens a response."""
    rows = np.array(json.loads(LENGTHS.read_text())["lengths"])
    return rows[rows[:, 0] + rows[:, 1:].max(axis=1) <= 2048]


def test_llama3_8b_on_eight_gpus_has_the_states_and_the_traffic_of_zero3(large: ModelShape) -> None:
    sharded = Setting(Precision.bf16, world_size=8)
    # 8.03e9 x (2 + 4 + 12) / 8, and 3 x 2 x 8.03e9 x 7 / 8.
    assert state_memory(large, sharded).peak == pytest.approx(18.07e9, rel=1e-3)
    assert traffic(large, sharded) == pytest.approx(42.16e9, rel=1e-3)
    assert large.flops.per_token == pytest.approx(2 * 6.979e9, rel=1e-3)
    alone = state_memory(large, Setting(Precision.bf16))
    assert alone.peak == pytest.approx(16 * 8.03e9, rel=1e-3)


def test_llama3_8b_keeps_the_bytes_for_each_token_that_its_widths_give(large: ModelShape) -> None:
    pack = PackSize(tokens=1, targets=0, seen_again=0)
    sharded = Setting(Precision.bf16, world_size=8)

    def kept(policy: ActivationCheckpointing) -> float:
        return sum(block_bytes(block, sharded, pack, policy) for block in large.blocks)

    width, keys, mlp, heads = 4096, 2048, 14336, 32
    assert kept(FULL) == 32 * 2 * width
    # Two norms of 8 bytes a number; q and the result; keys and values; gate, silu, up, product.
    expected = 2 * 8 * width + 2 * 2 * width + 2 * keys + 4 * 2 * mlp + 4 * heads
    assert kept(NONE) == 32 * expected
    products = 2 * (3 * width + keys + 2 * mlp)
    assert kept(SELECTIVE) == 32 * (2 * width + products + 2 * width + 4 * heads)


def test_adapters_need_no_states_for_frozen_weights() -> None:
    whole = build("Llama", device="meta")
    with torch.device("meta"):
        shape = ModelShape.of(add_lora(build("Llama", device="meta"), LoraConfig(rank=8), seed=0))
    assert shape.adapters
    assert shape.parameters - shape.trained == sum(p.numel() for p in whole.parameters())
    states = state_memory(shape, CPU32)
    assert states.weights == 4 * shape.parameters
    assert states.gradients + states.optimizer == 12 * shape.trained


def test_widths_are_read_off_the_shapes_of_parameters() -> None:
    llama, gpt2, phi3 = (
        ModelShape.of(build(name, device="meta")).blocks[0] for name in ("Llama", "GPT2", "Phi3")
    )
    assert (llama.queries, llama.keys, llama.activations) == (256, 256, 3 * 688)
    assert (llama.inputs, llama.shared_inputs, llama.last_inputs) == (5 * 256, 2 * 256, 256 + 688)
    # One matrix for queries, keys and values; rotated queries and keys are others.
    assert (phi3.queries, phi3.keys, phi3.activations) == (256, 256, 3 * 688)
    assert (llama.unrotated, phi3.unrotated) == (0, 256 + 128)
    # No gate; GPT-2's GELU is written out in Python and keeps four tensors.
    assert (gpt2.queries, gpt2.keys, gpt2.activations) == (256, 512, 4 * 1024)
    assert (llama.norms, gpt2.norms, gpt2.fused_norms) == (512, 0, 512)


GPUS = Hardware(TABLE[0], 1, 8)


def test_the_proposal_is_the_largest_that_fits(large: ModelShape, lengths) -> None:
    setting, memory = Setting(Precision.bf16, world_size=8), GPUS.device.memory
    proposal = propose(large, setting, memory, lengths, 256)
    assert proposal is not None
    assert (proposal.pack_tokens, proposal.checkpointing) == (6144, NONE)

    def peak(tokens: int) -> float:
        return peak_memory(large, setting, PackSize.of(lengths).scaled(tokens), NONE).peak

    assert peak(6144) <= MEMORY_SHARE * memory < peak(8192)


@pytest.mark.parametrize(
    ("gib", "checkpointing"), [(80, NONE), (60, NONE), (40, SELECTIVE), (27, FULL), (20, None)]
)
def test_less_memory_takes_more_checkpointing(
    gib: int, checkpointing: ActivationCheckpointing | None, large: ModelShape, lengths
) -> None:
    found = propose(large, Setting(Precision.bf16, world_size=8), gib * GIB, lengths, 256)
    assert (found and found.checkpointing) == checkpointing


@settings(max_examples=40)
@given(
    memory=st.floats(10, 200),
    batch=st.integers(1, 64).map(lambda n: 8 * n),
    policy=st.sampled_from([NONE, SELECTIVE, FULL]),
)
def test_proposed_packs_hold_the_longest_pair_and_no_more_than_a_step(
    memory: float, batch: int, policy: ActivationCheckpointing
) -> None:
    shape, rows = llama3_8b(), np.random.default_rng(1).integers(20, 400, (200, 3))
    setting = Setting(Precision.bf16, world_size=8)
    found = proposed_pack_tokens(shape, setting, memory * GIB, rows, batch, policy)
    more = proposed_pack_tokens(shape, setting, 2 * memory * GIB, rows, batch, policy)
    if found is None:
        return
    assert more is not None
    assert rows.sum(axis=1).max() <= found <= more <= MOST_TOKENS["cuda"]
    # At most twice what a process has to do in a step, or a pair takes.
    assert found <= 2 * max(rows.sum(axis=1).max(), batch / 8 * rows.sum(axis=1).max())
    assert found & (found - 1) == 0 or found % 3 == 0


def test_a_steps_packs_are_those_of_training_and_take_the_time_of_the_slowest(
    large: ModelShape, lengths
) -> None:
    setting = Setting(Precision.bf16, world_size=8)
    steps = sample_steps(lengths, 64, 4, seed=0, order=Order.shuffle)
    assert [len(rows) for rows in steps] == [64] * 4
    found = plan_steps(large, setting, GPUS, steps, 4096, NONE)
    assert found.tokens == pytest.approx(np.mean([rows.sum() for rows in steps]))
    assert found.longest_pack <= 4096
    assert 0.9 < found.fill <= 1
    assert 1 <= found.imbalance < 1.05
    ideal = found.flops / (8 * GPUS.rate(Precision.bf16))
    assert ideal <= found.compute_seconds < 1.1 * ideal
    assert found.traffic_seconds == pytest.approx(found.packs * 42.16e9 / 360e9, rel=1e-3)
    assert found.seconds == pytest.approx(found.compute_seconds)
    assert found.mfu < 0.5
    # Between nodes sending takes longer than computing so little.
    nodes = Hardware(TABLE[0], 2, 4)
    apart = plan_steps(large, setting, nodes, steps, 4096, NONE)
    assert apart.seconds == pytest.approx(apart.traffic_seconds)
    assert apart.traffic_seconds == pytest.approx(apart.packs * 42.16e9 / 50e9, rel=1e-3)


def test_one_process_sends_nothing_and_full_checkpointing_takes_longer(
    large: ModelShape, lengths
) -> None:
    alone = Setting(Precision.bf16)
    steps = sample_steps(lengths, 8, 3, seed=0, order=Order.sequential)
    assert np.array_equal(steps[0], lengths[:8])
    device = Hardware(TABLE[0])
    none, full = (plan_steps(large, alone, device, steps, 8192, p) for p in (NONE, FULL))
    assert none.traffic_seconds == 0
    assert none.imbalance == 1
    assert none.mfu == pytest.approx(0.5, rel=0.02)
    # All but the last matrix of each block once more: 0.73 of a forward pass.
    assert full.seconds / none.seconds == pytest.approx(3.73 / 3, rel=0.02)


def test_an_order_by_dispersion_is_planned_as_a_shuffled_one(lengths) -> None:
    shuffled, first = (
        sample_steps(lengths, 8, 3, 0, order) for order in (Order.shuffle, Order.easy_first)
    )
    assert all(np.array_equal(a, b) for a, b in zip(shuffled, first, strict=True))


def test_the_gain_is_that_of_data_check_and_of_flops(large: ModelShape, lengths) -> None:
    gain = gain_over_padding(large, lengths, NONE, epochs=1)
    assert gain.tokens == predicted_gain(lengths)["batches"]["2"]["both"]
    # The output layer has no padding, and attention little weight.
    assert 0.9 * gain.tokens < gain.flops < gain.tokens
    # In one epoch a cached reference saves no FLOPs; in three it does.
    assert gain.flops_live_reference == pytest.approx(gain.flops_with_reference)
    three = gain_over_padding(large, lengths, NONE, epochs=3)
    assert three.flops_live_reference > 1.1 * three.flops_with_reference


@pytest.mark.parametrize(
    ("text", "nodes", "devices", "bandwidth"),
    [
        ("h100", 1, 1, 360e9),
        ("8xh100", 1, 8, 360e9),
        ("8xH100", 1, 8, 360e9),
        ("2x8xh100", 2, 8, 50e9),
        ("16xh100", 2, 8, 50e9),
        ("4xrtx4090", 1, 4, 25e9),
    ],
)
def test_hardware_is_read_as_it_is_written(
    text: str, nodes: int, devices: int, bandwidth: float
) -> None:
    found = read_hardware(text, None, Precision.bf16)
    assert (found.nodes, found.devices, found.bandwidth) == (nodes, devices, bandwidth)
    assert read_hardware(found.name, None, Precision.bf16) == found


@pytest.mark.parametrize("text", ["h1000", "0xh100", "9xh100", "xh100", "2x2x2xh100", "4xcpu", ""])
def test_unknown_hardware_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="Expected"):
        read_hardware(text, None, Precision.bf16)


def test_a_given_rate_takes_the_place_of_an_assumed_or_measured_one() -> None:
    gpu = read_hardware("h100", 2e14, Precision.bf16)
    assert gpu.rate(Precision.bf16) == pytest.approx(2e14)
    assert gpu.peak(Precision.bf16) == 989e12
    cpu = read_hardware("cpu", 1e11, Precision.fp32)
    assert cpu.rate(Precision.fp32) == cpu.peak(Precision.fp32) == 1e11
    assert cpu.device.memory > GIB


def test_without_a_gpu_this_machine_is_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = read_hardware(None, None, Precision.fp32)
    assert found.device.is_cpu
    assert 1e8 < found.peak(Precision.fp32) < 1e14
    assert found.rate(Precision.fp32) == found.peak(Precision.fp32) / 2
    assert found.device.memory == own_memory()


def test_a_gpu_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 85 * 10**9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    found = read_hardware(None, None, Precision.bf16)
    expected = replace(TABLE[0], memory=85 * 10**9)
    assert found == Hardware(expected, 1, 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce GT 710")
    with pytest.raises(RecipeError, match="not in the table"):
        read_hardware(None, None, Precision.bf16)
