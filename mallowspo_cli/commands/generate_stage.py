"""The generate stage of an evaluation: from a model and tasks to generations.jsonl."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch
import transformers.utils.logging
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from mallowspo_cli.commands.prepare import default_device
from mallowspo_cli.commands.subject import Evaluated
from mallowspo_cli.distributed import console, log
from mallowspo_cli.errors import ModelError
from mallowspo_cli.evaluation.generate import end_tokens
from mallowspo_cli.evaluation.journal import Journal
from mallowspo_cli.evaluation.outputs import (
    DISPERSION,
    GENERATION,
    GENERATIONS,
    OUTPUTS,
    read_object,
)
from mallowspo_cli.evaluation.sampling.prompt_dispersion import prompt_entropy
from mallowspo_cli.evaluation.sampling.stage import (
    Engine,
    Generated,
    generate,
    generation_settings,
    render_prompts,
)
from mallowspo_cli.evaluation.sampling.tasks import GenerateOptions, Task
from mallowspo_cli.evaluation.sampling.transformers_engine import TransformersEngine
from mallowspo_cli.evaluation.sampling.vllm_engine import VllmEngine, check_vllm, vllm_installed
from mallowspo_cli.files import write_json
from mallowspo_cli.models.load import TORCH_DTYPES, load_model, load_tokenizer, model_directory
from mallowspo_cli.recipe.choices import Dtype, Precision
from mallowspo_cli.recipe.load import native_precision
from mallowspo_cli.recipe.schema import ModelConfig
from mallowspo_cli.reference.fingerprint import weights_digest
from mallowspo_cli.scoring import PairScorer

PACK_TOKENS, LONGEST = 8192, 8192
"""Tokens of a pass, and of an answer with its prompt where the model names no context."""


def generate_outputs(
    subject: Evaluated, tasks: Sequence[Task], options: GenerateOptions, directory: Path
) -> Generated:
    """`generate_stage`, and model_outputs.json with the first answer to each task."""
    found = generate_stage(subject, tasks, options, directory)
    write_json(directory / OUTPUTS, [asdict(row) for row in found.outputs])
    return found


def generate_stage(
    subject: Evaluated, tasks: Sequence[Task], options: GenerateOptions, directory: Path
) -> Generated:
    """Answers of a model to every task; only those that are not there are sampled.

    Raises:
        EvalError: see `render_prompts`; or other settings made what is there.
    """
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    options = _resolved(options)
    place = model_directory(subject.model)
    tokenizer = load_tokenizer(place, subject.model.chat_template)
    config = AutoConfig.from_pretrained(place)
    prompts = render_prompts(
        tasks, tokenizer, getattr(config, "max_position_embeddings", None), options
    )
    settings = generation_settings(
        prompts,
        tokenizer,
        weights_digest(place),
        f"{options.engine} {version(options.engine)}",
        options,
    )
    with Journal(directory / GENERATIONS, settings) as journal:
        found = generate(
            prompts, lambda: _engine(options, place, tokenizer), tokenizer, subject.name, journal
        )
    about = {"source": subject.model.source, "answers": len(prompts), "cut": found.cut}
    write_json(directory / GENERATION, {**settings, **about, "tokens": found.tokens})
    rate = found.tokens_per_second
    how = "all were there" if rate is None else f"{rate:,.0f} tokens/s"
    log.info("answers: %d (%s), %s", len(prompts), how, directory / GENERATIONS)
    return found


def measure_dispersion(
    reference: ModelConfig, answers: Sequence[tuple[Task, str]], directory: Path
) -> None:
    """Write the prompts' dispersion under the reference, along one answer each, unless it is there.

    Terciles of `eval compare` and `eval generations` come from it.
    """
    file = directory / DISPERSION
    try:
        place = model_directory(reference)
    except ModelError as error:
        log.info("prompt dispersion is left out: %s", error)
        return
    name = f"{reference.source} {weights_digest(place)[:8]}"
    tokenizer = load_tokenizer(place, reference.chat_template)
    wanted = {task.instruction for task, _ in answers}
    along = [name, reference.dtype.value, tokenizer.chat_template]
    text = json.dumps([*along, *sorted((task.instruction, answer) for task, answer in answers)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    if file.is_file() and read_object(file).get("digest") == digest:
        return
    device = default_device()
    model = load_model(place, TORCH_DTYPES[reference.dtype], reference.attention)
    scorer = PairScorer(model).to(device).eval()
    longest = getattr(scorer.config, "max_position_embeddings", None) or LONGEST
    found = prompt_entropy(scorer, tokenizer, answers, PACK_TOKENS, longest, device)
    left_out = sorted(wanted - set(found))
    if left_out:
        log.info("prompt dispersion: %d of %d left out", len(left_out), len(wanted))
    write_json(file, {"reference": name, "digest": digest, "entropy": found, "left_out": left_out})


def _resolved(options: GenerateOptions) -> GenerateOptions:
    """Options whose engine and type are named."""
    engine, dtype = options.engine, options.dtype
    if engine == "auto":
        engine = "vllm" if vllm_installed() and torch.cuda.is_available() else "transformers"
    if engine == "vllm":
        check_vllm()
    if dtype == "auto":
        dtype = "bfloat16" if native_precision() is Precision.bf16 else "float32"
    return replace(options, engine=engine, dtype=dtype)


def _engine(options: GenerateOptions, place: Path, tokenizer: PreTrainedTokenizerBase) -> Engine:
    if options.engine == "vllm":
        file = place / "generation_config.json"
        config = GenerationConfig.from_pretrained(place) if file.is_file() else None
        return VllmEngine(place, options.dtype, end_tokens(config, tokenizer), options)
    model = load_model(place, TORCH_DTYPES[Dtype(options.dtype)], "sdpa")
    return TransformersEngine(model.to(default_device()), tokenizer, options)
