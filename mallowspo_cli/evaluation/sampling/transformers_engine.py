"""Sampling with transformers: left-padded batches with a key-value cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.generate import generation_config, stop_ids
from mallowspo_cli.evaluation.sampling.stage import Done, Prompt
from mallowspo_cli.evaluation.sampling.tasks import GenerateOptions


class TransformersEngine:
    """`model.generate` with one random stream for each answer."""

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: GenerateOptions
    ):
        self.name = f"transformers {version('transformers')}"
        self.batch_size = options.batch_size
        self.model, self.options = model.eval(), options
        self.ends = stop_ids(model, tokenizer)
        self.padding = self.ends[0]
        self.device = next(model.parameters()).device
        self.context = getattr(model.config, "max_position_embeddings", None)

    @torch.inference_mode()
    def answer(self, batch: Sequence[Prompt], missing: Sequence[bool], done: Done) -> None:
        """Sample answers to a batch, whole, until the missing ones have ended.

        Answers that are there already are sampled again beside the missing ones: arithmetic in a
        batch of another size may round otherwise.

        Raises:
            EvalError: out of memory.
        """
        width = max(len(prompt.ids) for prompt in batch)
        ids = torch.full((len(batch), width), self.padding)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt.ids) :] = torch.from_numpy(prompt.ids.astype(np.int64))
        lengths = torch.tensor([len(prompt.ids) for prompt in batch])
        mask = (torch.arange(width) >= width - lengths[:, None]).long()
        most = max(prompt.most_tokens for prompt in batch)
        watch = _Watch(batch, missing, done, self.ends, width)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=self.ends,
            pad_token_id=self.padding,
        )
        with generation_config(self.model, config), self._within_context():
            try:
                self.model.generate(  # type: ignore[operator]
                    ids.to(self.device),
                    attention_mask=mask.to(self.device),
                    logits_processor=self._processors(batch, most),
                    stopping_criteria=StoppingCriteriaList([watch]),
                )
            except torch.OutOfMemoryError as error:
                raise EvalError(
                    f"out of memory with {len(batch)} answers of up to {most:,} tokens. Lower "
                    f"generate.batch_size (now {self.batch_size}); what is done is kept."
                ) from error

    @contextmanager
    def _within_context(self) -> Iterator[None]:
        """Keep the positions of answers that have ended, and are padded on, within the model's
        context: behind it there is no embedding.
        """

        def clamp(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            positions = kwargs.get("position_ids")
            if positions is not None and self.context is not None:
                kwargs["position_ids"] = positions.clamp(max=self.context - 1)
            return args, kwargs

        handle = self.model.register_forward_pre_hook(clamp, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _processors(self, batch: Sequence[Prompt], most: int) -> LogitsProcessorList:
        options, found = self.options, LogitsProcessorList()
        if options.temperature == 0:
            return found
        if options.temperature != 1:
            found.append(TemperatureLogitsWarper(options.temperature))
        if options.top_k:
            found.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            found.append(TopPLogitsWarper(options.top_p))
        found.append(_Draw([prompt.stream(options.seed) for prompt in batch], most, self.device))
        return found


class _Draw(LogitsProcessor):
    """Leaves one token of each row, drawn by inverting its distribution at the row's own number."""

    def __init__(self, seeds: Sequence[int], steps: int, device: torch.device):
        rows = [
            torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
        self.numbers = torch.stack(rows, 1).to(device)
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) scores with the drawn token at 0 and all others at minus infinity."""
        # In float64 the sum of 100,000 small numbers keeps its order, and equal sums (tokens of
        # probability 0) are passed over.
        sums = scores.float().softmax(-1).double().cumsum(-1)
        wanted = self.numbers[self.step][:, None] * sums[:, -1:]
        tokens = torch.searchsorted(sums, wanted, right=True).clamp(max=scores.shape[-1] - 1)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


class _Watch(StoppingCriteria):
    """Hands on each missing answer as soon as it is whole; stops when none is missing."""

    def __init__(
        self,
        batch: Sequence[Prompt],
        missing: Sequence[bool],
        done: Done,
        ends: Sequence[int],
        width: int,
    ):
        self.batch, self.done, self.width = batch, done, width
        self.ends = torch.tensor(ends)
        self.open = {row for row, lacks in enumerate(missing) if lacks}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B,) True where a row is to stop."""
        length = input_ids.shape[1] - self.width
        last = torch.isin(input_ids[:, -1].cpu(), self.ends)
        for row in sorted(self.open):
            prompt = self.batch[row]
            if bool(last[row]) or length >= prompt.most_tokens:
                ids = input_ids[row, self.width :].cpu().numpy().astype(np.int32)
                self.open.remove(row)
                if last[row]:
                    self.done(prompt, ids[:-1], "stop")
                else:
                    self.done(prompt, ids, "length")
        return torch.full((len(self.batch),), not self.open, device=input_ids.device)
