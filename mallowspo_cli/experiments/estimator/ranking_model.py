"""A small transformer that writes rankings, and the dispersion that the project reads off it.

Each prompt is one token and stands for a Mallows model (Kendall's distance) with a theta and a
central ranking of its own; the response is the ranking, an item a token, without the last item,
which is certain. The model learns from samples alone. Then pairs of fresh rankings are scored by
the path that training takes: packs, `PairScorer`, token entropies, `dispersion`.
"""

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from mallowspo_cli.data.table import TokenizedPair, pair_id
from mallowspo_cli.dispersion import clamped_count, normalised_entropy, raw_weight
from mallowspo_cli.distributed import progress
from mallowspo_cli.experiments.mallows_model import sample_rankings
from mallowspo_cli.models.attention import NAME
from mallowspo_cli.packing.layout import collate
from mallowspo_cli.packing.packer import lengths_of, pack
from mallowspo_cli.scoring import PairScorer

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RANKINGS_PER_STEP: Final = 8
"""Of each prompt; fresh ones in every step."""
PAIRS_PER_PROMPT: Final = 64
"""Scored, of rankings drawn apart from those of training."""
LEARNING_RATE: Final = 5e-3
"""At its highest: a twentieth of the steps up to it, then down to 0 by a cosine."""
PACK_TOKENS: Final = 2048
CENTRAL, WEIGHTS, TRAINING, SCORING = range(4)
"""Streams of random numbers under one seed."""


@dataclass(frozen=True)
class RankingPrompts:
    """P prompts, each with a Mallows model of n items."""

    theta: Floats
    """(P,) the true -log phi."""
    central: Ints
    """(P, n) items in the order of the central ranking, the best first."""

    @classmethod
    def draw(cls, theta: Floats, num_items: int, seed: int) -> "RankingPrompts":
        """Prompts with these thetas and random central rankings."""
        generator = np.random.default_rng([seed, CENTRAL])
        return cls(theta, np.stack([generator.permutation(num_items) for _ in theta]))

    @property
    def num_items(self) -> int:
        """Items of a ranking."""
        return self.central.shape[1]

    @property
    def vocab_size(self) -> int:
        """Tokens: the items, then the prompts."""
        return self.num_items + len(self.theta)

    def sample(self, size: int, generator: np.random.Generator) -> Ints:
        """(P, size, n) ranks of the central ranking's first, second, ... item in sampled rankings.

        Drawn exactly, by repeated insertion.
        """
        draws = [
            sample_rankings("kendall", float(theta), self.num_items, size, generator)
            for theta in self.theta
        ]
        return np.stack(draws)

    def tokens(self, ranks: Ints) -> Ints:
        """(P, size, n) of ranks to token ids: the prompt's, then all items but the last."""
        order = ranks.argsort(axis=-1)
        items = np.take_along_axis(self.central[:, None, :], order, axis=-1)
        prompts = np.arange(self.num_items, self.vocab_size)[:, None, None]
        prompts = np.broadcast_to(prompts, (*ranks.shape[:2], 1))
        return np.concatenate([prompts, items[..., :-1]], axis=-1)

    def logps(self, ranks: Ints) -> Floats:
        """(P, size) true log-probs of rankings in nats, from their inversions."""
        first, second = np.triu_indices(self.num_items, 1)
        inversions = (ranks[..., first] > ranks[..., second]).sum(axis=-1)
        weights = np.exp(-self.theta[:, None] * np.arange(self.num_items))
        log_z = np.log(weights.cumsum(axis=1)).sum(axis=1)
        return -self.theta[:, None] * inversions - log_z[:, None]


@dataclass(frozen=True)
class Measured:
    """What the model's entropies say of P prompts, (P,) each; means over its pairs."""

    estimate: Floats
    """-ln H with H a share of ln(items), as from exact conditionals; before the scale phi*."""
    estimate_vocab: Floats
    """With H a share of ln(vocabulary), as training takes it."""
    estimate_error: Floats
    """Standard error of `estimate` over the pairs."""
    excess: Floats
    """Nats per token by which the true log-probs of the scored rankings exceed the model's: an
    estimate of the divergence from the truth."""
    clamped: int = 0
    """Pairs whose H is on a bound: a model can be less certain than ln(items)."""


def train_model(prompts: RankingPrompts, steps: int, seed: int) -> LlamaForCausalLM:
    """A 2-layer Llama trained by cross-entropy on fresh samples; weights from the seed alone."""
    model = _new_model(prompts.vocab_size, seed)
    generator = np.random.default_rng([seed, TRAINING])
    options = {"lr": LEARNING_RATE, "weight_decay": 0.01, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    with progress(f"training, seed {seed}", steps, "steps") as advance:
        for _ in range(steps):
            ranks = prompts.sample(RANKINGS_PER_STEP, generator)
            ids = torch.from_numpy(prompts.tokens(ranks).reshape(-1, prompts.num_items))
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(1)
    return model.eval()


def _new_model(vocab_size: int, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        # No token begins, ends or pads.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation=NAME,  # type: ignore[call-arg]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.default_rng([seed, WEIGHTS]).integers(2**31)))
        return LlamaForCausalLM(config).train()


def _rate(step: int, steps: int) -> float:
    """Share of LEARNING_RATE at a step."""
    warmup = max(1, steps // 20)
    return min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def measure(model: LlamaForCausalLM, prompts: RankingPrompts, seed: int) -> Measured:
    """Score pairs of rankings of every prompt and estimate its -log phi from their entropies."""
    generator = np.random.default_rng([seed, SCORING])
    ranks = prompts.sample(2 * PAIRS_PER_PROMPT, generator)
    ids = prompts.tokens(ranks).astype(np.int32)
    pairs = [_pair(row[index], row[index + 1]) for row in ids for index in range(0, len(row), 2)]
    sums = _score(PairScorer(model), pairs)
    entropies, tokens = sums[:, 2:], torch.full((len(pairs),), prompts.num_items - 1)

    chosen, rejected = entropies.unbind(dim=1)
    sides, vocab = (chosen, tokens, rejected, tokens), prompts.vocab_size
    share = normalised_entropy(*sides, vocab, normaliser=math.log(prompts.num_items))
    of_vocab = normalised_entropy(*sides, vocab)
    estimate = raw_weight(share).numpy().reshape(-1, PAIRS_PER_PROMPT)
    model_logps = sums[:, :2].numpy().reshape(len(ids), -1)
    return Measured(
        estimate=estimate.mean(axis=1),
        estimate_vocab=raw_weight(of_vocab).numpy().reshape(estimate.shape).mean(axis=1),
        estimate_error=estimate.std(axis=1, ddof=1) / math.sqrt(PAIRS_PER_PROMPT),
        excess=(prompts.logps(ranks) - model_logps).mean(axis=1) / (prompts.num_items - 1),
        clamped=clamped_count(share),
    )


def _pair(one: NDArray[np.int32], other: NDArray[np.int32]) -> TokenizedPair:
    """Two rankings of a prompt, prompt token first in both. Neither is the better one."""
    prompt, chosen, rejected = one[:1], one[1:], other[1:]
    return TokenizedPair(pair_id(prompt, chosen, rejected), prompt, chosen, rejected)


@torch.inference_mode()
def _score(scorer: PairScorer, pairs: list[TokenizedPair]) -> torch.Tensor:
    """(N, 4) float64: summed log-probs of both responses, then their summed entropies, nats."""
    found = torch.empty(len(pairs), 4, dtype=torch.float64)
    (packs,) = pack(lengths_of(pairs), PACK_TOKENS, layout=scorer.layout)
    for members in packs:
        batch = collate([pairs[index] for index in members], scorer.layout)
        scored: Any = scorer(batch, entropy=True)
        scores, entropies = scored
        columns = (
            *(scores.chosen_logps, scores.rejected_logps),
            *(entropies.chosen_entropy, entropies.rejected_entropy),
        )
        found[members] = torch.stack(columns, dim=1).double()
    return found
