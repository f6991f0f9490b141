"""FLOPs: what a forward pass of a real model executes, counted by torch."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from mallowspo_cli.data.table import TokenizedPair
from mallowspo_cli.models.attention import NAME
from mallowspo_cli.models.flops import ForwardFlops
from mallowspo_cli.packing.layout import collate
from mallowspo_cli.scoring import PairScorer
from tests.models.families import SHARED, VOCABULARY, build

TOKENS = 10
ATTENTION = {torch.ops.aten.bmm, torch.ops.aten.baddbmm}
"""What eager attention multiplies with."""


class Executed(FlopCounterMode):
    """FLOPs of matrix products, of attention (eager) and of all other layers."""

    def __init__(self) -> None:
        super().__init__(display=False)

    def split(self) -> tuple[int, int]:
        """Of layers, and of attention."""
        counts = self.get_flop_counts()["Global"]
        attention = sum(n for operation, n in counts.items() if operation in ATTENTION)
        return self.get_total_flops() - attention, attention


@torch.no_grad()
def executed(model: nn.Module, **arguments: Any) -> tuple[int, int]:
    with Executed() as counter:
        model(**arguments)
    return counter.split()


FAMILIES = [*SHARED, "bloom", "falcon", "stablelm"]
"""Mamba's scan is no matrix product."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_a_forward_pass_execute_what_is_said(family: str) -> None:
    """Conv1D (GPT-2) and experts too, of which a token goes through a few."""
    model = build(family, "eager").eval()
    flops = ForwardFlops.of(model)
    layers, attention = executed(model, input_ids=torch.arange(3, 3 + TOKENS)[None])
    assert layers == TOKENS * (flops.per_token + flops.per_target)
    # Eager attention multiplies every query with every key, also with those it does not see.
    assert attention == TOKENS**2 * flops.per_visible


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_the_output_layer_is_counted_by_itself(family: str) -> None:
    model = build(family, "eager").eval()
    flops = ForwardFlops.of(model)
    layers, _ = executed(model.base_model, input_ids=torch.arange(3, 3 + TOKENS)[None])
    assert layers == TOKENS * flops.per_token
    width = model.get_input_embeddings().embedding_dim
    assert flops.per_target == 2 * width * VOCABULARY


def test_a_token_pays_for_the_experts_that_it_goes_through() -> None:
    model = build("qwen3_moe", None)
    two_of_four = ForwardFlops.of(model).per_token
    model.config.num_experts_per_tok = 1
    one_of_four = ForwardFlops.of(model).per_token
    # Two layers; an expert has a gate, an up and a down matrix of 32 x 16.
    assert two_of_four - one_of_four == 2 * 2 * 3 * 32 * 16


def test_tied_embeddings_are_no_matrix_of_a_block() -> None:
    tied, apart = (ForwardFlops.of(build(name, None)) for name in ("llama tied", "llama"))
    assert tied == apart


def test_llama_3_8b_is_counted_without_its_weights() -> None:
    """Its blocks have 6.979e9 parameters, its output layer 0.525e9."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        flops = ForwardFlops.of(AutoModelForCausalLM.from_config(config))
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    assert flops.per_token == 2 * 32 * (attention + 3 * 4096 * 14_336) == 2 * 6_979_321_856
    assert flops.per_visible == 4 * 32 * 128 * 32 == 524_288
    assert flops.per_target == 2 * 128_256 * 4096


def test_the_flops_of_one_pair_by_hand() -> None:
    flops = ForwardFlops(per_token=1000, per_visible=10, per_target=7)
    # 6 tokens; the first segment is 4 long, 4 * 4 / 2 = 8; the second sees 2 * 3 and 2 * 2 / 2.
    assert flops.of_pairs([[3, 1, 2]]).tolist() == [1000 * 6 + 10 * (8 + 6 + 2) + 7 * 3]


def test_pairs_are_counted_each_by_itself() -> None:
    flops = ForwardFlops(per_token=1000, per_visible=10, per_target=7)
    lengths = [[3, 1, 2], [5, 8, 1], [1, 1, 1]]
    together = flops.of_pairs(np.array(lengths))
    assert together.tolist() == [flops.of_pairs([each]).item() for each in lengths]
    assert flops.of_pairs([]).shape == (0,)


PART = st.integers(1, 300)


@given(PART, PART, PART)
def test_a_query_sees_itself_and_what_is_before_it(prompt: int, chosen: int, rejected: int) -> None:
    """Exactly n (n + 1) / 2 in a causal sequence, for which n^2 / 2 is taken."""
    visible = ForwardFlops(0, 1, 0).of_pairs([[prompt, chosen, rejected]]).item()
    exact = sum(range(1, prompt + chosen + 1)) + sum(range(prompt + 1, prompt + rejected + 1))
    tokens = prompt + chosen + rejected
    assert exact - visible == tokens / 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_scored_pack_executes_what_its_pairs_are_said_to_cost(family: str) -> None:
    generator = np.random.default_rng(0)
    lengths = [(9, 12, 5), (1, 1, 3), (14, 8, 17)]
    pairs = [
        TokenizedPair("a", *(generator.integers(3, VOCABULARY, n).astype(np.int32) for n in each))
        for each in lengths
    ]
    scorer = PairScorer(build(family, NAME))
    with torch.no_grad(), Executed() as counter:
        scorer(collate(pairs))
    layers, _ = counter.split()
    without_attention = ForwardFlops(scorer.flops.per_token, 0, scorer.flops.per_target)
    assert layers == without_attention.of_pairs(lengths).sum()
