"""`mallowspo train`: the main job."""

import hashlib
import importlib.util
import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from mallowspo_cli.commands.prepare import (
    Prepared,
    default_device,
    filled_store,
    one_process,
    prepare,
)
from mallowspo_cli.commands.show import print_pair, print_results
from mallowspo_cli.data.table import TokenizedPairs
from mallowspo_cli.distributed import log, set_up_logging
from mallowspo_cli.errors import MallowsPOError, TrainingError
from mallowspo_cli.evaluation.generate import SequenceKL, sample_pairs, sequence_kl
from mallowspo_cli.files import whole_directory, write_json, write_text
from mallowspo_cli.models.load import load_model, load_policy
from mallowspo_cli.objectives.base import objective_name
from mallowspo_cli.recipe.choices import DispersionSource, Precision
from mallowspo_cli.recipe.load import LoadedRecipe, load_recipe
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.reference.terms import (
    Reference,
    fit_reference,
    kept_pairs,
    numbers_of,
    raw_weights,
)
from mallowspo_cli.report.model_card import model_card
from mallowspo_cli.report.run_report import write_report
from mallowspo_cli.scoring import PairScorer
from mallowspo_cli.training.checkpoint import TrainState, load_checkpoint, whole_checkpoints
from mallowspo_cli.training.loop import Run, fit, total_steps
from mallowspo_cli.training.metrics import MetricsFile, read_metrics
from mallowspo_cli.training.optim import build_optimizer
from mallowspo_cli.training.order import PairOrder
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
    prepared = prepare(recipe, loaded.words)
    known = _known(recipe, prepared)
    pairs = known.train_pairs
    steps = total_steps(recipe, len(pairs))
    policy = load_policy(
        recipe.model, prepared.directory, recipe.train.activation_checkpointing, recipe.seed
    )
    reference = known.reference
    about = {"reference_pass": _counted(directory, known.counts)}
    claim(directory, loaded, _data_file(recipe, prepared, known), about)
    if reference is not None:
        write_json(directory / "dispersion.json", _dispersion_file(pairs, reference))
    set_seed(recipe.seed)
    accelerator = _accelerator(recipe, directory, trackers)
    scorer = PairScorer(policy)
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
        order=_order(recipe, known),
        metrics=MetricsFile(directory / "metrics.jsonl"),
        total_steps=steps,
    )
    state = _starting_state(run, resume)
    if state.step < steps:
        log.info(
            "training: steps %d to %d of %d pairs each, in %s",
            *(state.step + 1, steps, recipe.train.global_batch_size, directory),
        )
    try:
        fit(run, recipe.objective, reference, state)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory after step {state.step}. Lower train.pack_tokens (now "
            f"{recipe.train.pack_tokens}), or set train.activation_checkpointing=full; neither "
            "changes the result. Then go on with --resume."
        ) from error
    _finish(run, loaded, prepared, _kl(run, prepared))
    accelerator.end_training()


@dataclass(frozen=True)
class Known:
    """What is known of the training pairs before the first step."""

    train_pairs: TokenizedPairs
    reference: Reference | None
    counts: dict[str, int]
    """Pairs that the reference pass of this run scored, and those that were there."""
    estimates: list[float] | None = None
    """w of each training pair as estimated, whatever `dispersion.mode` says; None where nothing
    asks for it."""


def _known(recipe: Recipe, prepared: Prepared) -> Known:
    """The reference's scores and the dispersion, where the recipe needs them, and the pairs that
    its filter keeps.
    """
    pairs, objective = prepared.train, recipe.objective
    needed = objective.needs_reference or objective.needs_dispersion
    if not needed and not recipe.train.order.by_dispersion and recipe.dispersion.keep is None:
        return Known(pairs, None, {"scored": 0, "reused": 0})
    if not needed and recipe.dispersion.source is not DispersionSource.entropy:
        return _known_from_data(recipe, pairs)
    store, counts = filled_store(recipe, prepared, default_device())
    pairs, reference = fit_reference(store, recipe.dispersion, pairs, recipe.seed)
    if prepared.held_out:
        reference.add_split(prepared.held_out)
    summary = reference.summary
    log.info(
        "dispersion (%s, %s): scale %.4f, w has mean %.3f, from %.3f to %.3f; %d clamped, "
        "%d unknown",
        *(summary.source, summary.mode, summary.scale, summary.weight_mean, summary.weight_min),
        *(summary.weight_max, summary.clamped, summary.empty),
    )
    return Known(pairs, reference, counts, reference.estimates(pairs.pair_ids).tolist())


def _known_from_data(recipe: Recipe, pairs: TokenizedPairs) -> Known:
    """Order and filter by numbers of the data, for an objective that reads no reference."""
    config = recipe.dispersion
    if config.keep is not None:
        pairs = kept_pairs(None, config, pairs)
    raw = raw_weights(None, config, pairs.pair_ids, numbers_of(config, pairs))
    # Of an unknown dispersion, the middle.
    estimates = torch.where(raw.isnan(), raw.nanmean(), raw).tolist()
    return Known(pairs, None, {"scored": 0, "reused": 0}, estimates)


def _counted(directory: Path, counts: dict[str, int]) -> dict[str, int]:
    """The pass's counts, with what it scored before the run was resumed."""
    file = directory / "environment.json"
    before = json.loads(file.read_text()).get("reference_pass", {}) if file.is_file() else {}
    return {**counts, "scored": counts["scored"] + before.get("scored", 0)}


def _order(recipe: Recipe, known: Known) -> PairOrder:
    return PairOrder(
        len(known.train_pairs),
        recipe.train.global_batch_size,
        recipe.seed,
        recipe.train.order,
        known.estimates,
    )


def _data_file(recipe: Recipe, prepared: Prepared, known: Known) -> dict[str, Any]:
    """What a resumed run has to find as it was."""
    splits = {"train": known.train_pairs.pair_ids}
    if prepared.held_out is not None:
        splits["held_out"] = prepared.held_out.pair_ids
    reference = known.reference
    numbers = numbers_of(recipe.dispersion, known.train_pairs)
    return {
        **{f"{name}_pairs": len(ids) for name, ids in splits.items()},
        **{
            f"{name}_digest": hashlib.blake2b("".join(ids).encode(), digest_size=16).hexdigest()
            for name, ids in splits.items()
        },
        "reference": reference.store.fingerprint.key() if reference is not None else None,
        "dispersion_scale": reference.scale if reference is not None else None,
        "dispersion_numbers": hashlib.blake2b(numbers.tobytes(), digest_size=16).hexdigest()
        if numbers is not None
        else None,
    }


def _dispersion_file(pairs: TokenizedPairs, reference: Reference) -> dict[str, Any]:
    weights = reference.weights(pairs.pair_ids).double()
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
    found = torch.quantile(weights, torch.tensor(quantiles, dtype=weights.dtype)).tolist()
    counts, edges = torch.histogram(weights, bins=60)
    return {
        **asdict(reference.summary),
        "fingerprint": reference.store.fingerprint.key(),
        "store": str(reference.store.path),
        "quantiles": {str(q): v for q, v in zip(quantiles, found, strict=True)},
        "histogram": {"edges": edges.tolist(), "counts": counts.int().tolist()},
    }


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
    return sequence_kl(policy.eval(), reference, samples, device, config.kl_tokens)


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
