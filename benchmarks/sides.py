"""The sides of against_trl.py: each does the same training step, forward and backward, its own way.

All start from the same random weights, with the reference equal to the policy (margin 0), so that
the loss is log 2 and its gradient is not zero. A step is the mean over one global batch of pairs;
laying the pairs out as tensors is part of it, an optimizer is not.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import measure
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mallowspo_cli.data.table import TokenizedPair
from mallowspo_cli.models.attention import NAME
from mallowspo_cli.models.checkpointing import checkpoint_blocks
from mallowspo_cli.objectives.base import ReferenceScores
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.packing.layout import PairBatch, collate
from mallowspo_cli.packing.packer import lengths_of, pack
from mallowspo_cli.recipe.choices import ActivationCheckpointing
from mallowspo_cli.scoring import PairScorer

BETA = 0.1
SHAPES = {
    "cpu_small": (2560, 256, 896, 6, 4, 1),
    "llama_1b": (128_256, 2048, 8192, 16, 32, 8),
    "llama_3b": (128_256, 3072, 8192, 28, 24, 8),
}
"""Vocabulary, hidden size, FFN, layers, heads, heads of keys."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured; the same for every side."""

    lengths: str
    max_length: int
    too_long: str
    pairs: int
    """Pairs of a global batch, which is a step."""
    batches: int
    device_batch: int
    """Pairs of a padded forward pass (TRL's per_device_train_batch_size)."""
    tuned_batch: int
    """The same for trl_tuned, whose micro-batches hold this many pairs on average."""
    pack_tokens: int
    model: str
    vocab: int
    checkpointing: str
    device: str
    precision: str

    def fitting(self) -> measure.Lengths:
        """All pairs of the file that are short enough, or cut."""
        known = measure.known_lengths(self.lengths)
        return measure.fit_lengths(known, self.max_length, self.too_long)

    def drawn(self) -> measure.Lengths:
        """The pairs of all batches, in order."""
        return measure.draw_lengths(self.fitting(), self.pairs * self.batches)


def build_model(setting: Setting, attention: str) -> LlamaForCausalLM:
    """A random Llama in float32, in training mode; the same for every side."""
    _, hidden, ffn, layers, heads, keys = SHAPES[setting.model]
    config = LlamaConfig(
        vocab_size=setting.vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        max_position_embeddings=4096,
        tie_word_embeddings=setting.model != "cpu_small",
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    with torch.device(setting.device):
        return LlamaForCausalLM(config).train()


class Side(ABC):
    """One way to do the steps of a setting."""

    attention = "sdpa"

    def __init__(self, setting: Setting):
        self.setting = setting
        self.device = torch.device(setting.device)
        self.pairs = measure.random_pairs(setting.drawn(), setting.vocab)
        self.model = build_model(setting, self.attention)
        self.prepare()
        checkpoint_blocks(self.model, ActivationCheckpointing(setting.checkpointing))

    @abstractmethod
    def prepare(self) -> None:
        """All that comes before the first step."""

    @abstractmethod
    def steps(self) -> Iterator[Tensor]:
        """Forward and backward of one global batch after another; yields its loss."""

    @abstractmethod
    def logps(self) -> Tensor:
        """(N, 2) summed log-probs of chosen and rejected under the policy."""

    def batches(self) -> list[list[TokenizedPair]]:
        """The global batches."""
        size = self.setting.pairs
        return [self.pairs[i : i + size] for i in range(0, len(self.pairs), size)]

    def autocast(self) -> torch.autocast:
        """bfloat16 where the setting asks for it, over float32 weights."""
        on = self.setting.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)


class MallowsPO(Side):
    """`PairScorer` over packs, with a cached reference."""

    attention = NAME

    def prepare(self) -> None:
        self.scorer = PairScorer(self.model)
        self.objective = DPO(beta=BETA)
        self.place = {pair.pair_id: index for index, pair in enumerate(self.pairs)}
        self.reference = self.logps()

    def steps(self) -> Iterator[Tensor]:
        for members in self.batches():
            loss = torch.zeros((), device=self.device)
            for batch in self.packs(members):
                with self.autocast():
                    scores = self.scorer(batch)
                losses = self.objective(scores, self.terms(batch, scores)).losses
                share = losses.sum() / len(members)
                share.backward()
                loss += share.detach()
            yield loss

    @torch.no_grad()
    def logps(self) -> Tensor:
        rows = torch.empty(len(self.pairs), 2, device=self.device)
        for members in self.batches():
            for batch in self.packs(members):
                with self.autocast():
                    scores = self.scorer(batch)
                both = torch.stack([scores.chosen_logps, scores.rejected_logps], dim=1)
                rows[self.places(batch)] = both
        return rows

    def packs(self, members: list[TokenizedPair]) -> list[PairBatch]:
        """A global batch as the training loop lays it out."""
        lengths, layout = lengths_of(members), self.scorer.layout
        costs = self.scorer.flops.of_pairs(lengths)
        dealt = pack(lengths, self.setting.pack_tokens, layout=layout, costs=costs)[0]
        return [collate([members[i] for i in own], layout).to(self.device) for own in dealt]

    def places(self, batch: PairBatch) -> list[int]:
        """Which pairs a pack holds."""
        return [self.place[name] for name in batch.pair_ids]

    def terms(self, batch: PairBatch, scores: Any) -> ReferenceScores:
        """What the store would give."""
        rows = self.reference[self.places(batch)]
        tokens = (scores.chosen_tokens, scores.rejected_tokens)
        return ReferenceScores(rows[:, 0], rows[:, 1], *tokens, torch.full_like(rows[:, 0], 0.5))


class FullLogitsCached(Side):
    """The plain way, without TRL: padded rows, all logits, log-softmax and gather."""

    def prepare(self) -> None:
        self.reference = self.logps()

    def steps(self) -> Iterator[Tensor]:
        size = self.setting.device_batch
        for start in range(0, len(self.pairs), self.setting.pairs):
            loss = torch.zeros((), device=self.device)
            for first in range(start, start + self.setting.pairs, size):
                last = min(first + size, start + self.setting.pairs)
                ratios = self.score(self.pairs[first:last]) - self.reference[first:last]
                losses = -F.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1]))
                share = losses.sum() / self.setting.pairs
                share.backward()
                loss += share.detach()
            yield loss

    @torch.no_grad()
    def logps(self) -> Tensor:
        size = self.setting.device_batch
        parts = [self.pairs[i : i + size] for i in range(0, len(self.pairs), size)]
        return torch.cat([self.score(part) for part in parts])

    def score(self, pairs: list[TokenizedPair]) -> Tensor:
        """(B, 2) summed log-probs."""
        rows = [(p.prompt, response) for p in pairs for response in (p.chosen, p.rejected)]
        width = max(len(prompt) + len(response) for prompt, response in rows)
        ids, seen, trained = (np.zeros((len(rows), width), dtype=np.int64) for _ in range(3))
        for index, (prompt, response) in enumerate(rows):
            end = len(prompt) + len(response)
            ids[index, :end] = np.concatenate([prompt, response])
            seen[index, :end] = trained[index, len(prompt) : end] = 1
        ids, seen, trained = (torch.as_tensor(x).to(self.device) for x in (ids, seen, trained))
        with self.autocast():
            logits = self.model(input_ids=ids, attention_mask=seen, use_cache=False).logits
        logps = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return (logps * trained[:, 1:]).sum(dim=1).view(-1, 2)


def side_class(name: str) -> type[Side]:
    """A side by its name."""
    if name.startswith("trl_"):
        import trl_side

        return trl_side.SIDES[name]
    return {"mallowspo": MallowsPO, "full_logits_cached": FullLogitsCached}[name]


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """All parameters, sorted by name."""
    return [value for _, value in sorted(model.named_parameters())]
