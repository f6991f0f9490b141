"""What a run leaves behind after its last step: the model, its KL, results and report."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mallowspo_cli.commands.prepare import Prepared
from mallowspo_cli.commands.run_source import results_after
from mallowspo_cli.distributed import log
from mallowspo_cli.evaluation.generate import SequenceKL, sample_pairs, sequence_kl
from mallowspo_cli.files import whole_directory, write_json, write_text
from mallowspo_cli.models.load import TORCH_DTYPES, load_model
from mallowspo_cli.models.trained import merge_adapters, trained_model
from mallowspo_cli.recipe.choices import Quantization
from mallowspo_cli.recipe.load import LoadedRecipe
from mallowspo_cli.reference.build import out_of_memory
from mallowspo_cli.report.model_card import model_card
from mallowspo_cli.report.run_report import write_report
from mallowspo_cli.scoring import PairScorer
from mallowspo_cli.training.metrics import read_metrics
from mallowspo_cli.training.run import Run
from mallowspo_cli.training.run_directory import environment
from mallowspo_cli.training.telemetry import memory_gib


def finish(run: Run, loaded: LoadedRecipe, prepared: Prepared, running: dict[str, float]) -> None:
    """Write model, results and report. Every process calls this; the main one writes.

    Args:
        running: the objective's running statistics after the last step.
    """
    config = run.recipe.model
    weights = None
    if config.lora.rank or run.engine.sharded or run.engine.casts:
        # The one place where a process holds all that was trained. Adapters are merged in float32.
        dtype = torch.float32 if config.lora.rank else TORCH_DTYPES[config.dtype]
        weights = run.engine.whole_weights(dtype)
    if not run.accelerator.is_main_process:
        return
    if weights is not None:
        run.engine.release()
        model = _merged(run, prepared, weights)
    else:
        model = _whole(run)
    _save_model(run, prepared, model)
    # Only now: what may fail here costs no training any more.
    results = _results(run, _kl(run, prepared, model), running)
    file = run.directory / "dispersion.json"
    dispersion = json.loads(file.read_text()) if file.is_file() else None
    card = model_card(loaded.to_yaml(), results, dispersion, environment())
    write_text(run.directory / "model" / "README.md", card)
    write_report(run.directory, results)
    # Last: this file says that the run is finished.
    write_json(run.directory / "results.json", results)


def _whole(run: Run) -> Any:
    """The trained model, which this process holds whole."""
    bare: Any = run.accelerator.unwrap_model(run.scorer, keep_fp32_wrapper=False)
    return bare.model


def _merged(run: Run, prepared: Prepared, weights: dict[str, Tensor]) -> Any:
    """The trained model, put together anew in this process alone; adapters are saved and merged."""
    # transformers would shard it, and wait for the other processes.
    unset_hf_deepspeed_config()
    config = run.recipe.model
    dtype = TORCH_DTYPES[config.dtype]
    model = trained_model(
        config, prepared.directory, weights, torch.float32 if config.lora.rank else dtype
    )
    if config.lora.rank:
        save_whole(run.directory / "adapter", model.save_pretrained)
        model = merge_adapters(model, dtype)
    return model


def _kl(run: Run, prepared: Prepared, model: Any) -> SequenceKL | None:
    """The policy's sequence KL to the reference, which is loaded for this alone."""
    config = run.recipe.eval
    if config.kl_prompts == 0 or not prepared.held_out:
        return None
    if run.recipe.model.quantization is not Quantization.none:
        log.info("eval.kl_prompts is left out: the reference is quantised, the merged model is not")
        return None
    try:
        return _measured_kl(run, prepared, model)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        log.info("eval.kl_prompts is left out: policy and reference do not fit in memory together")
        return None


def _measured_kl(run: Run, prepared: Prepared, model: Any) -> SequenceKL:
    config, held_out = run.recipe.eval, prepared.held_out or ()
    unique = {pair.prompt.tobytes(): pair.prompt for pair in held_out}
    prompts = list(unique.values())[: config.kl_prompts]
    device = run.accelerator.device
    # Both in float32: what is measured is the change of the weights, not of the arithmetic.
    frozen = load_model(prepared.directory, torch.float32, run.recipe.model.attention)
    reference = PairScorer(frozen).to(device).eval()
    model.set_attn_implementation(reference.config._attn_implementation)
    policy = PairScorer(model.to(device=device, dtype=torch.float32)).eval()
    samples = sample_pairs(
        policy.causal_model, prepared.tokenizer, prompts, config.kl_tokens, run.recipe.seed
    )
    return sequence_kl(policy, reference, samples, device, config.kl_tokens, policy.layout)


def _results(run: Run, kl: SequenceKL | None, running: dict[str, float]) -> dict[str, Any]:
    lines = read_metrics(run.metrics.path)
    known = results_after(run.recipe, lines, run.total_steps)
    return {
        **known,
        "processes": run.accelerator.num_processes,
        "training_seconds": known["pairs_seen"] / known["pairs_per_second"],
        "peak_memory_gib": max(memory_gib(), *(line.get("memory_gib", 0.0) for line in lines)),
        "kl": asdict(kl) if kl is not None else None,
        "running": running,
        "model": str(run.directory / "model"),
        "report": str(run.directory / "report.html"),
    }


def _save_model(run: Run, prepared: Prepared, model: Any) -> None:
    """A directory that transformers loads: weights with adapters merged, and tokenizer."""
    # As it came in: a model that is stored in bfloat16 goes out in it.
    model.to(TORCH_DTYPES[run.recipe.model.dtype])

    def save(target: Path) -> None:
        model.save_pretrained(target)
        prepared.tokenizer.save_pretrained(target)

    save_whole(run.directory / "model", save)


def save_whole(place: Path, save: Callable[[Path], object]) -> None:
    """Fill a directory by `save`, whole or not at all, in the place of an older one."""
    shutil.rmtree(place, ignore_errors=True)
    with whole_directory(place) as target:
        save(target)
