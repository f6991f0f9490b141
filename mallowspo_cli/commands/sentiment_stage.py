"""Samples of a policy on beginnings of texts, and what policy and reference say of them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from mallowspo_cli.commands.prepare import default_device
from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.controlled.sentiment import (
    Floats,
    Measured,
    Sample,
    draw_samples,
    sequence_logps,
)
from mallowspo_cli.evaluation.sampling.stage import render_prompts
from mallowspo_cli.evaluation.sampling.tasks import GenerateOptions, Task
from mallowspo_cli.evaluation.sampling.transformers_engine import TransformersEngine
from mallowspo_cli.models.load import TORCH_DTYPES, load_model, load_tokenizer, model_directory
from mallowspo_cli.recipe.choices import Dtype
from mallowspo_cli.recipe.schema import ModelConfig
from mallowspo_cli.scoring import PairScorer

PACK_TOKENS = 4096


def measure(
    model: ModelConfig,
    reference: ModelConfig | None,
    tasks: Sequence[Task],
    options: GenerateOptions,
    *,
    kl: bool,
    reference_samples: bool,
) -> Measured:
    """Sample from the policy and score with policy and reference, one model in memory at a time.

    Args:
        kl: whether both are to score the policy's samples.
        reference_samples: whether the reference is sampled from as well.

    Raises:
        EvalError: prompts that cannot be rendered, or two vocabularies.
    """
    place, device = model_directory(model), default_device()
    tokenizer = plain_tokenizer(place, model.chat_template)
    context = getattr(AutoConfig.from_pretrained(place), "max_position_embeddings", None)
    prompts = render_prompts(tasks, tokenizer, context, options)
    other = model_directory(reference) if reference is not None else None
    if other is not None:
        _check_vocabulary(tokenizer, load_tokenizer(other))
    scorer, engine = _loaded(place, model, options, tokenizer, device)
    samples, ends = draw_samples(engine, prompts, tokenizer), engine.ends
    ours = _logps(scorer, samples, ends, device) if kl else None
    del scorer, engine
    if reference is None or other is None or not (kl or reference_samples):
        return Measured(samples, None, None)
    scorer, engine = _loaded(other, reference, options, tokenizer, device)
    ratios = ours - _logps(scorer, samples, ends, device) if ours is not None else None
    drawn = draw_samples(engine, prompts, tokenizer) if reference_samples else None
    return Measured(samples, ratios, drawn)


def plain_tokenizer(place: Path, template: str | None) -> PreTrainedTokenizerBase:
    """The model's tokenizer; where it has no chat template, one that leaves texts as they are."""
    tokenizer = load_tokenizer(place, template)
    return tokenizer if tokenizer.chat_template else load_tokenizer(place, "plain")


def _check_vocabulary(own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    if own.get_vocab() != other.get_vocab():
        raise EvalError(
            "model and reference have different vocabularies, so their sequences cannot be "
            "compared. Give the reference= that the model was trained from."
        )


def _loaded(
    place: Path,
    config: ModelConfig,
    options: GenerateOptions,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> tuple[PairScorer, TransformersEngine]:
    model = load_model(place, TORCH_DTYPES[Dtype(options.dtype)], config.attention)
    scorer = PairScorer(model).to(device).eval()
    return scorer, TransformersEngine(scorer.causal_model, tokenizer, options)


def _logps(
    scorer: PairScorer, samples: Sequence[Sample], ends: Sequence[int], device: torch.device
) -> Floats:
    return sequence_logps(scorer, samples, ends, PACK_TOKENS, device)
