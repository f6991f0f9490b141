"""The model of `model=tiny_random`: always the same bytes, a tokenizer that writes any text."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mallowspo_cli.models.load import load_model, load_tokenizer
from mallowspo_cli.models.tiny import SPECIAL_TOKENS, build_byte_tokenizer, build_tiny_llama

TOKENIZER = build_byte_tokenizer()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_two_builds_are_equal_byte_by_byte_whatever_the_global_seed(tmp_path: Path) -> None:
    built = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        build_tiny_llama(tmp_path / str(seed))
        assert torch.equal(torch.get_rng_state(), before)
        built.append(contents(tmp_path / str(seed)))
    assert built[0] == built[1]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(built[0])


def test_the_weights_have_their_golden_sum(tiny_directory: Path) -> None:
    # Golden trajectories hang on them. A change needs a new directory name in models/sources.py.
    model = load_model(tiny_directory, torch.float64)
    total = sum(parameter.abs().sum().item() for parameter in model.parameters())
    assert total == pytest.approx(11115.94770, rel=1e-6)


def test_the_model_is_small_tied_and_not_uniform(tiny_directory: Path) -> None:
    model = load_model(tiny_directory, torch.float32).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    assert model.config.vocab_size == len(TOKENIZER)
    with torch.no_grad():
        logps = model(torch.arange(60)[None]).logits.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1).mean().item()
    assert 0.1 < entropy < math.log(len(TOKENIZER)) - 0.5


@given(st.text(max_size=30))
def test_the_tokenizer_writes_any_text_a_byte_a_token(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(ids) == len(text.encode()) or any(token in text for token in SPECIAL_TOKENS)


def test_special_tokens_are_one_token_each_and_named(tiny_directory: Path) -> None:
    tokenizer = load_tokenizer(tiny_directory)
    ids = tokenizer("".join(SPECIAL_TOKENS), add_special_tokens=False)["input_ids"]
    assert ids == [256, 257, 258, 259, 260, 261]
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert named == SPECIAL_TOKENS[:3]
    assert set(tokenizer.all_special_ids) == set(ids)


def test_the_chat_template_writes_begin_once_and_ends_each_turn(tiny_directory: Path) -> None:
    tokenizer = load_tokenizer(tiny_directory)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|begin|><|user|>Hi<|end|>\n<|assistant|>yes<|end|>\n"
    )
    assert tokenizer.apply_chat_template(
        turns[:1], tokenize=False, add_generation_prompt=True
    ).endswith("<|end|>\n<|assistant|>")
