"""The reference pass has the whole model in every process."""

from typing import Any

import numpy as np
import pytest
import torch

from mallowspo_cli.models.load import add_lora
from mallowspo_cli.packing.layout import collate
from mallowspo_cli.plan.hardware import TABLE, Hardware
from mallowspo_cli.plan.reference_pass import reference_memory
from mallowspo_cli.plan.setting import PackSize, Setting
from mallowspo_cli.plan.shapes import ModelShape
from mallowspo_cli.plan.steps import reference_seconds
from mallowspo_cli.recipe.choices import Dtype, Precision
from mallowspo_cli.recipe.schema import LoraConfig
from mallowspo_cli.reference.build import score_rows
from mallowspo_cli.scoring import PairScorer
from tests.test_plan import NARROW, LiveBytes, build, llama3_8b, pairs_of

BF16, FP32 = Precision.bf16, Precision.fp32
HALF, SINGLE = Dtype.bfloat16, Dtype.float32


@pytest.mark.parametrize(
    ("family", "dtype", "precision", "options", "when"),
    [
        ("Llama", SINGLE, FP32, {}, "a block"),
        ("Llama", SINGLE, FP32, {"vocab_size": 24000}, "output layer"),
        ("Llama", HALF, BF16, NARROW, "output layer"),
        # Copies in bf16, by autocast.
        ("Llama", SINGLE, BF16, NARROW, "output layer"),
        ("Phi3", SINGLE, FP32, {"num_hidden_layers": 2, "vocab_size": 100}, "a block"),
        ("GPT2", SINGLE, FP32, {"n_layer": 2}, "a block"),
    ],
)
def test_its_peak_is_that_of_live_tensors(
    family: str, dtype: Dtype, precision: Precision, options: dict[str, Any], when: str
) -> None:
    lengths, autocast = [(60, 70, 70)] * 8, dtype is SINGLE and precision is BF16
    model = build(family, **options)
    if dtype is HALF:
        model = model.to(torch.bfloat16)
    scorer = PairScorer(model).eval().requires_grad_(False)
    batch = collate(pairs_of(lengths, options.get("vocab_size", 200)))
    with LiveBytes() as tracker:
        for parameter in scorer.parameters():
            tracker.add(parameter)
        score_rows(scorer, batch, autocast)
        weights, tracker.peak = tracker.live, tracker.live
        score_rows(scorer, batch, autocast)
    setting = Setting(precision, cpu=True)
    planned = reference_memory(ModelShape.of(model), setting, dtype, PackSize.of(lengths))
    assert planned.when == when
    assert planned.weights == sum(p.nbytes for p in model.parameters())
    assert planned.gradients == planned.optimizer == 0
    above = tracker.peak - weights
    assert planned.peak - planned.weights == pytest.approx(above, rel=0.1)


@pytest.mark.parametrize("processes", [1, 8, 64])
def test_llama3_8b_takes_two_bytes_a_parameter_in_every_process(processes: int) -> None:
    setting, pack = Setting(BF16, processes), PackSize.of([(400, 300, 300)]).scaled(4096)
    found = reference_memory(llama3_8b(), setting, HALF, pack)
    assert found.weights == 2 * 8_030_261_248
    # 4,096 tokens: 3 x 2 x 4,096 bytes of the stream and (3 + 1) x 2 x 14,336 of the MLP, each.
    block = 4096 * (3 * 2 * 4096 + 4 * 2 * 14336)
    # 2,458 response tokens: their states, and their logits in three chunks of at most 1,046 rows.
    targets = 4096 * 0.6
    head = 4096 * 2 * 2 * 4096 + targets * 2 * 4096 + targets / 3 * 128256 * 2
    assert found.peak - found.weights == pytest.approx(max(block, head))
    single = reference_memory(llama3_8b(), setting, SINGLE, pack)
    assert single.weights == 2 * found.weights


def test_its_time_is_that_of_a_forward_pass_without_adapters() -> None:
    whole = ModelShape.of(build("Llama", device="meta"))
    with torch.device("meta"):
        adapted = add_lora(build("Llama", device="meta"), LoraConfig(rank=8), seed=0)
    rows, hardware = np.array([(400, 300, 300)] * 64), Hardware(TABLE[0], 1, 8)
    found = [
        reference_seconds(shape, Setting(BF16, 8), hardware, rows, 4096)
        for shape in (whole, ModelShape.of(adapted))
    ]
    assert found[0] == pytest.approx(found[1])
    # Eight processes, each at half of its peak; nothing is sent.
    assert found[0] == pytest.approx(whole.flops.of_pairs(rows).sum() / (8 * 989e12 / 2))
