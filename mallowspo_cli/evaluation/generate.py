"""Sampling from a policy, and its sequence KL to the reference."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mallowspo_cli.data.tokenize import TokenIds, TokenizedPair
from mallowspo_cli.distributed import progress
from mallowspo_cli.errors import ModelError
from mallowspo_cli.evaluation.statistics import bootstrap_interval
from mallowspo_cli.objectives.base import PairScores
from mallowspo_cli.packing.layout import Layout, PairBatch, collate

BATCH_PROMPTS = 8


@dataclass(frozen=True)
class SequenceKL:
    """KL(policy || reference) in nats, on the policy's samples of at most `max_tokens`."""

    mean: float
    low: float
    """Lower end of the 95 % interval (bootstrap over prompts; over samples where there is one)."""
    high: float
    responses: int
    max_tokens: int


@torch.no_grad()
def sample_pairs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenIds],
    max_tokens: int,
    seed: int,
) -> list[TokenizedPair]:
    """Two responses to each prompt, sampled at temperature 1, as (prompt, response, response).

    A response ends with its end token, or without one after `max_tokens`.
    """
    ends = stop_ids(model, tokenizer)
    device = next(model.parameters()).device
    pairs = []
    model.eval()
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=2,
        max_new_tokens=max_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    with (
        generation_config(model, sampling),
        torch.random.fork_rng(),
        progress("sampling", len(prompts), "prompts") as advance,
    ):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), BATCH_PROMPTS):
            group = list(prompts[start : start + BATCH_PROMPTS])
            width = max(len(p) for p in group)
            ids = torch.full((len(group), width), ends[0])
            for row, prompt in enumerate(group):
                ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            lengths = torch.tensor([len(p) for p in group])
            mask = (torch.arange(width) >= width - lengths[:, None]).long()
            out = model.generate(  # type: ignore[operator]
                ids.to(device), attention_mask=mask.to(device)
            )
            responses = [_until(row, ends) for row in out[:, width:].cpu().numpy()]
            pairs += [
                TokenizedPair(f"sample-{start + i}", p, responses[2 * i], responses[2 * i + 1])
                for i, p in enumerate(group)
            ]
            advance(len(group))
    return pairs


@torch.no_grad()
def sequence_kl(
    policy: Callable[[PairBatch], PairScores],
    reference: Callable[[PairBatch], PairScores],
    samples: Sequence[TokenizedPair],
    device: torch.device,
    max_tokens: int,
    layout: Layout,
) -> SequenceKL:
    """Mean of log pi(y|x) - log pi_ref(y|x) over sampled responses."""
    gaps: list[float] = []
    for start in range(0, len(samples), BATCH_PROMPTS):
        batch = collate(samples[start : start + BATCH_PROMPTS], layout).to(device)
        ours, theirs = policy(batch), reference(batch)
        gap = torch.stack(
            [ours.chosen_logps - theirs.chosen_logps, ours.rejected_logps - theirs.rejected_logps]
        )
        gaps += gap.T.flatten().tolist()
    # One prompt alone would be drawn every time, and the interval have no width.
    alone = len(samples) == 1
    groups = [f"{s.pair_id}/{i}" if alone else s.pair_id for s in samples for i in range(2)]
    low, high = bootstrap_interval(gaps, groups)
    return SequenceKL(float(np.mean(gaps)), low, high, len(gaps), max_tokens)


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response, by the model's generation config, else its tokenizer."""
    return end_tokens(getattr(model, "generation_config", None), tokenizer)


def end_tokens(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The same by a generation config.

    Raises:
        ModelError: neither names one.
    """
    named = getattr(config, "eos_token_id", None)
    single: Any = tokenizer.eos_token_id if named is None else named
    ids = named if isinstance(named, list) else [single]
    if ids == [None]:
        raise ModelError("the model names no end-of-sequence token, so sampling cannot stop.")
    return ids


@contextmanager
def generation_config(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Sample by `config` alone.

    What a model's own configuration adds (a repetition penalty, say) would make the samples another
    distribution's than the policy's, and the KL estimate wrong.
    """
    own, model.generation_config = model.generation_config, config  # type: ignore[assignment]
    try:
        yield
    finally:
        model.generation_config = own


def _until(row: TokenIds, ends: list[int]) -> TokenIds:
    """The row up to its first end token, included."""
    stops = np.flatnonzero(np.isin(row, ends))
    return row[: stops[0] + 1].astype(np.int32) if len(stops) else row.astype(np.int32)
