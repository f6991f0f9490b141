"""`mallowspo train`: the main job."""

import importlib.util
import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from mallowspo_cli.commands.known import (
    counted,
    data_file,
    dispersion_file,
    known_pairs,
    pair_order,
)
from mallowspo_cli.commands.pack_size import pack_tokens_of
from mallowspo_cli.commands.prepare import (
    Prepared,
    one_process,
    prepare,
)
from mallowspo_cli.commands.show import print_pair, print_results
from mallowspo_cli.distributed import log, set_up_logging
from mallowspo_cli.errors import MallowsPOError, TrainingError
from mallowspo_cli.evaluation.generate import SequenceKL, sample_pairs, sequence_kl
from mallowspo_cli.files import whole_directory, write_json, write_text
from mallowspo_cli.models.fusion import check_liger
from mallowspo_cli.models.load import load_model, load_policy
from mallowspo_cli.objectives.base import objective_name
from mallowspo_cli.recipe.choices import Precision
from mallowspo_cli.recipe.load import LoadedRecipe, load_recipe
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.reference.build import out_of_memory
from mallowspo_cli.report.model_card import model_card
from mallowspo_cli.report.run_report import write_report
from mallowspo_cli.scoring import PairScorer
from mallowspo_cli.training.checkpoint import TrainState, load_checkpoint, whole_checkpoints
from mallowspo_cli.training.loop import Run, fit, total_steps
from mallowspo_cli.training.metrics import MetricsFile, read_metrics
from mallowspo_cli.training.optim import build_optimizer
from mallowspo_cli.training.run_directory import check_directory, claim, environment, locked

DRY_RUN_ROWS = 200
"""Rows of each split that a dry run reads."""


def run(name: str, overrides: list[str], resume: bool, dry_run: bool) -> None:
    """Train recipe `name`; see `mallowspo train --help`."""
    set_up_logging()
    loaded = load_recipe(name, overrides)
    recipe = loaded.recipe
    directory = Path(recipe.output_dir)
    if dry_run:
        _dry_run(loaded)
        return
    with locked(directory):
        if check_directory(directory, loaded, resume):
            log.info("%s is finished; these are its results", directory)
        else:
            train(loaded, directory, resume)
    print_results(json.loads((directory / "results.json").read_text()))


def train(loaded: LoadedRecipe, directory: Path, resume: bool) -> None:
    """Prepare, train, evaluate and write everything that a run directory holds."""
    one_process("train")
    recipe = loaded.recipe
    trackers = _trackers(recipe)
    if recipe.train.liger:
        check_liger()
    prepared = prepare(recipe, loaded.words)
    known = known_pairs(recipe, prepared)
    pairs = known.train_pairs
    steps = total_steps(recipe, len(pairs))
    policy = load_policy(recipe.model, prepared.directory, recipe.train, recipe.seed)
    reference = known.reference
    scorer: Any = PairScorer(policy)
    pack_tokens = pack_tokens_of(recipe, directory, scorer, pairs)
    about = {"reference_pass": counted(directory, known.counts), "pack_tokens": pack_tokens}
    claim(directory, loaded, data_file(recipe, prepared, known), about)
    if reference is not None:
        write_json(directory / "dispersion.json", dispersion_file(pairs, reference))
    set_seed(recipe.seed)
    accelerator = _accelerator(recipe, directory, trackers)
    optimizer = build_optimizer(scorer, recipe.train)
    scorer, optimizer = accelerator.prepare(scorer, optimizer)
    run = Run(
        recipe=recipe,
        directory=directory,
        accelerator=accelerator,
        scorer=scorer,
        optimizer=optimizer,
        train_pairs=pairs,
        eval_pairs=prepared.held_out or (),
        order=pair_order(recipe, known),
        metrics=MetricsFile(directory / "metrics.jsonl"),
        total_steps=steps,
        pack_tokens=pack_tokens,
    )
    state = _starting_state(run, resume)
    if state.step < steps:
        log.info(
            "training: steps %d to %d of %d pairs each, in %s",
            *(state.step + 1, steps, recipe.train.global_batch_size, directory),
        )
    try:
        fit(run, recipe.objective, reference, state)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory after step {state.step}. Lower train.pack_tokens (now {pack_tokens}), "
            "or set train.activation_checkpointing=full; where it was an evaluation, lower "
            f"reference.pack_tokens (now {recipe.reference.pack_tokens}). None of them changes the "
            "result. Then go on with --resume."
        ) from error
    _finish(run, loaded, prepared, _kl(run, prepared))
    accelerator.end_training()


def _trackers(recipe: Recipe) -> list[str]:
    """Names of the trackers that the recipe asks for, all of them installed."""
    asked = {"wandb": recipe.log.wandb, "tensorboard": recipe.log.tensorboard}
    found = [name for name, on in asked.items() if on]
    for package in found:
        if importlib.util.find_spec(package) is None:
            raise MallowsPOError(
                f"log.{package}=true needs {package}: pip install 'mallowspo[{package}]'"
            )
    return found


def _accelerator(recipe: Recipe, directory: Path, trackers: list[str]) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision="bf16" if recipe.train.precision is Precision.bf16 else "no",
        log_with=list(trackers) or None,  # type: ignore[arg-type]
        project_dir=str(directory),
    )
    if trackers:
        options = {"wandb": {"name": recipe.name, "dir": str(directory)}}
        accelerator.init_trackers("mallowspo", init_kwargs=options)
    return accelerator


def _starting_state(run: Run, resume: bool) -> TrainState:
    checkpoints = whole_checkpoints(run.directory)
    if not resume or not checkpoints:
        if resume and run.metrics.path.is_file():
            log.info("%s has no whole checkpoint; starting afresh", run.directory)
        run.metrics.cut_back(-1)
        return TrainState()
    model = run.accelerator.unwrap_model(run.scorer)
    state = load_checkpoint(checkpoints[-1], model, run.optimizer)
    run.metrics.cut_back(state.step)
    log.info("going on from %s", checkpoints[-1])
    return state


def _kl(run: Run, prepared: Prepared) -> SequenceKL | None:
    """The policy's sequence KL to the reference, which is loaded for this alone."""
    config = run.recipe.eval
    if config.kl_prompts == 0 or not prepared.held_out:
        return None
    unique = {pair.prompt.tobytes(): pair.prompt for pair in prepared.held_out}
    prompts = list(unique.values())[: config.kl_prompts]
    # Both in float32: what is measured is the change of the weights, not of the arithmetic.
    policy = run.accelerator.unwrap_model(run.scorer, keep_fp32_wrapper=False)
    model = policy.causal_model
    samples = sample_pairs(model, prepared.tokenizer, prompts, config.kl_tokens, run.recipe.seed)
    frozen = load_model(prepared.directory, torch.float32, run.recipe.model.attention)
    device = run.accelerator.device
    reference = PairScorer(frozen).to(device).eval()
    return sequence_kl(policy.eval(), reference, samples, device, config.kl_tokens, policy.layout)


def _finish(run: Run, loaded: LoadedRecipe, prepared: Prepared, kl: SequenceKL | None) -> None:
    directory, recipe = run.directory, run.recipe
    lines = read_metrics(run.metrics.path)
    evaluations = [line for line in lines if "eval/loss" in line]
    rates = [line["pairs_per_second"] for line in lines if "pairs_per_second" in line]
    pairs_seen = run.total_steps * recipe.train.global_batch_size
    pairs_per_second = len(rates) / sum(1 / rate for rate in rates)
    results = {
        "name": recipe.name,
        "objective": objective_name(recipe.objective),
        "model_source": recipe.model.source,
        "dataset_path": recipe.dataset.title,
        "steps": run.total_steps,
        "pairs_seen": pairs_seen,
        "training_seconds": pairs_seen / pairs_per_second,
        "pairs_per_second": pairs_per_second,
        "peak_memory_gib": _peak_memory_gib(),
        "before": next((line for line in evaluations if line["step"] == 0), None),
        "after": next((line for line in evaluations if line["step"] == run.total_steps), None),
        "kl": asdict(kl) if kl is not None else None,
        "model": str(directory / "model"),
        "report": str(directory / "report.html"),
    }
    _save_model(run, loaded, prepared, results)
    write_report(directory, results)
    # Last: this file says that the run is finished.
    write_json(directory / "results.json", results)


def _save_model(
    run: Run, loaded: LoadedRecipe, prepared: Prepared, results: dict[str, Any]
) -> None:
    """A directory that transformers loads: weights with adapters merged, tokenizer, model card."""
    model = run.accelerator.unwrap_model(run.scorer).model
    if run.recipe.model.lora.rank:
        _save_whole(run.directory / "adapter", model.save_pretrained)
        model = model.merge_and_unload()
    file = run.directory / "dispersion.json"
    dispersion = json.loads(file.read_text()) if file.is_file() else None
    card = model_card(loaded.to_yaml(), results, dispersion, environment())

    def save(target: Path) -> None:
        model.save_pretrained(target)
        prepared.tokenizer.save_pretrained(target)
        write_text(target / "README.md", card)

    _save_whole(run.directory / "model", save)


def _save_whole(place: Path, save: Callable[[Path], object]) -> None:
    """Fill a directory by `save`, whole or not at all, in the place of an older one."""
    shutil.rmtree(place, ignore_errors=True)
    with whole_directory(place) as target:
        save(target)


def _peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _dry_run(loaded: LoadedRecipe) -> None:
    """Everything short of the model: compose, tokenise a sample, show a pair and what would run."""
    recipe = loaded.recipe
    one_process("train")
    prepared = prepare(recipe, loaded.words, DRY_RUN_ROWS)
    print_pair(prepared.train[0], prepared.tokenizer)
    split = prepared.splits["train"]
    usable = round(len(split.pairs) / split.read * split.rows)
    log.info(
        "would train %d steps of %d pairs (of about %d) with %s and write %s",
        *(total_steps(recipe, usable), recipe.train.global_batch_size, usable),
        *(objective_name(recipe.objective), recipe.output_dir),
    )
