"""`mallowspo train`: the main job, in one process or in every process of a launch."""

import gc
import importlib.util
import json
import os
import time
from contextlib import nullcontext
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed

from mallowspo_cli.commands.finish import finish
from mallowspo_cli.commands.known import (
    counted,
    data_file,
    dispersion_file,
    known_pairs,
    pair_order,
)
from mallowspo_cli.commands.launch import Launch, make_accelerator, own_peak, read_launch
from mallowspo_cli.commands.pack_size import pack_tokens_of
from mallowspo_cli.commands.prepare import Prepared, prepare
from mallowspo_cli.commands.show import print_pair, print_results
from mallowspo_cli.data.table import TokenizedPairs
from mallowspo_cli.distributed import is_main, log, rank, set_up_logging
from mallowspo_cli.errors import LostProcessError, MallowsPOError, RecipeError, first_line
from mallowspo_cli.evaluation.preference import METRICS
from mallowspo_cli.files import write_json
from mallowspo_cli.models.fusion import check_liger
from mallowspo_cli.models.load import load_policy
from mallowspo_cli.objectives.base import objective_name
from mallowspo_cli.recipe.load import LoadedRecipe, load_recipe
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.reference.build import out_of_memory
from mallowspo_cli.reference.terms import Reference
from mallowspo_cli.scoring import PairScorer
from mallowspo_cli.training.checkpoint import TrainState, load_checkpoint, whole_checkpoints
from mallowspo_cli.training.engine import Engine
from mallowspo_cli.training.loop import fit, total_steps
from mallowspo_cli.training.metrics import MetricsFile
from mallowspo_cli.training.optim import build_optimizer, check_optimizer
from mallowspo_cli.training.run import Run
from mallowspo_cli.training.run_directory import check_directory, claim, locked
from mallowspo_cli.training.watch import STOPPED_FILE, Stop, Watch
from mallowspo_cli.training.zero import engine_of

DRY_RUN_ROWS = 200
"""Rows of each split that a dry run reads."""
LOST = ("connection closed", "connection reset", "broken pipe", "remote process exited")
"""What a collective says when another process of the launch is gone."""


def run(name: str, overrides: list[str], resume: bool, dry_run: bool) -> None:
    """Train recipe `name`; see `mallowspo train --help`."""
    set_up_logging()
    loaded = load_recipe(name, overrides)
    directory = Path(loaded.recipe.output_dir)
    launch = read_launch(loaded.recipe)
    if dry_run:
        _dry_run(loaded)
        return
    # The other processes of a launch follow the main one: its check ends them all.
    with locked(directory) if is_main() else nullcontext():
        finished = resume and (directory / "results.json").is_file()
        if is_main():
            finished = check_directory(directory, loaded, resume)
        if finished:
            log.info("%s is finished; these are its results", directory)
        else:
            try:
                train(loaded, directory, resume, launch)
            except RuntimeError as error:
                if launch.processes > 1 and _lost(error):
                    # The process that failed prints first.
                    time.sleep(2)
                    raise LostProcessError(
                        "another process of this launch ended, and its own message says why "
                        f"({first_line(error)})."
                    ) from error
                raise
    if is_main():
        print_results(json.loads((directory / "results.json").read_text()))


def train(loaded: LoadedRecipe, directory: Path, resume: bool, launch: Launch) -> None:
    """Prepare, train, evaluate and write everything that a run directory holds."""
    recipe = loaded.recipe
    trackers = _trackers(recipe)
    _check_best_by(recipe)
    check_optimizer(recipe.train)
    if recipe.train.liger:
        check_liger()
    prepared = prepare(recipe, loaded.words)
    # Before the accelerator: under ZeRO-3 it would shard the reference, of which every process
    # that scores has a copy of its own, and none keeps it.
    known = known_pairs(recipe, prepared)
    pairs, reference = known.train_pairs, known.reference
    steps = total_steps(recipe, len(pairs))
    accelerator = make_accelerator(launch, recipe, directory, trackers)
    engine, pack_tokens = _engine(recipe, directory, prepared, pairs, launch, accelerator)
    if is_main():
        about = {
            "reference_pass": counted(directory, known.counts),
            "pack_tokens": pack_tokens,
            "engine": engine.describe(),
        }
        claim(directory, loaded, data_file(recipe, prepared, known), about)
        if reference is not None:
            write_json(directory / "dispersion.json", dispersion_file(pairs, reference))
        _start_trackers(accelerator, recipe, directory, trackers)
    run = Run(
        recipe=recipe,
        directory=directory,
        engine=engine,
        train_pairs=pairs,
        eval_pairs=prepared.held_out or (),
        order=pair_order(recipe, known),
        metrics=MetricsFile(directory / "metrics.jsonl"),
        total_steps=steps,
        pack_tokens=pack_tokens,
        peak_flops=own_peak(recipe.train.precision),
        stop=Stop(_job_end(recipe)),
        watch=Watch(recipe.train.hang_seconds, rank()),
    )
    with run.stop.listening(), run.watch.watching():
        state = _starting_state(run, resume)
        _fit(run, reference, state)
    with run.stop.listening():
        # Nothing is left to stop: what asks for it now finds a finished run.
        finish(run, loaded, prepared, state.running)
    for tracker in accelerator.trackers:
        tracker.finish()
    del run, engine
    _part(accelerator)


def _engine(
    recipe: Recipe,
    directory: Path,
    prepared: Prepared,
    pairs: TokenizedPairs,
    launch: Launch,
    accelerator: Accelerator,
) -> tuple[Engine, int]:
    """The policy and its optimizer as the launch's engine has them, and the tokens of a pack, which
    are the main process's in all.
    """
    set_seed(recipe.seed)
    # Under ZeRO-3 transformers takes no device: it shards.
    device = None if launch.deepspeed else accelerator.device
    policy = load_policy(recipe.model, prepared.directory, recipe.train, recipe.seed, device)
    scorer = PairScorer(policy)
    pack_tokens = pack_tokens_of(recipe, directory, scorer, pairs, launch) if is_main() else None
    optimizer = build_optimizer(scorer, recipe.train)
    engine = engine_of(accelerator, *accelerator.prepare(scorer, optimizer))
    engine.check(launch.sharded)
    return engine, engine.broadcast(pack_tokens)


def _fit(run: Run, reference: Reference | None, state: TrainState) -> None:
    """Train to the end; what runs out of memory says which keys to lower."""
    recipe = run.recipe
    if state.step < run.total_steps:
        log.info(
            "training: steps %d to %d of %d pairs each, in %s",
            *(state.step + 1, run.total_steps, recipe.train.global_batch_size, run.directory),
        )
    try:
        fit(run, recipe.objective, reference, state)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise LostProcessError(
            f"out of memory after step {state.step}. Lower train.pack_tokens (now "
            f"{run.pack_tokens}), or set train.activation_checkpointing=full; where it was an "
            f"evaluation, lower reference.pack_tokens (now {recipe.reference.pack_tokens}). "
            "None of them changes the result. Then go on with --resume."
        ) from error


def _part(accelerator: Accelerator) -> None:
    """Leave the launch, in an order in which no process waits for one that is gone."""
    if accelerator.num_processes == 1:
        return
    accelerator.free_memory()
    gc.collect()
    accelerator.state.destroy_process_group()


def _lost(error: RuntimeError) -> bool:
    """Whether another process of the launch is gone, whose fault this is."""
    text = str(error).lower()
    return any(sign in text for sign in LOST)


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


def _start_trackers(
    accelerator: Accelerator, recipe: Recipe, directory: Path, trackers: list[str]
) -> None:
    if trackers:
        options = {"wandb": {"name": recipe.name, "dir": str(directory)}}
        accelerator.init_trackers("mallowspo", init_kwargs=options)


def _check_best_by(recipe: Recipe) -> None:
    metric = recipe.checkpoint.best_by
    if metric is not None and metric not in METRICS:
        raise RecipeError(
            f"checkpoint.best_by={metric} is no metric of an evaluation. There are: "
            f"{', '.join(METRICS)}."
        )
    if metric == "eval/loss" and recipe.objective.follows_steps:
        raise RecipeError(
            f"checkpoint.best_by={metric} does not suit {type(recipe.objective).__name__}, whose "
            "loss changes with the steps before: its values of two steps do not compare. Take "
            "eval/rewards/accuracies."
        )


def _job_end(recipe: Recipe) -> float | None:
    """When the run should stop so that it can save itself before its Slurm job ends."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return int(end) - recipe.checkpoint.before_end if end.isdigit() else None


def _starting_state(run: Run, resume: bool) -> TrainState:
    # The main process's view, so that all go on from the same one.
    checkpoints = run.engine.broadcast(whole_checkpoints(run.directory) if is_main() else None)
    if not resume or not checkpoints:
        if resume and run.metrics.path.is_file():
            log.info("%s has no whole checkpoint; starting afresh", run.directory)
        state = TrainState()
    else:
        state = load_checkpoint(checkpoints[-1], run.engine, run.watch.alive)
        log.info("going on from %s", checkpoints[-1])
    if is_main():
        (run.directory / STOPPED_FILE).unlink(missing_ok=True)
        run.metrics.cut_back(state.step if state.step else -1)
    return state


def _dry_run(loaded: LoadedRecipe) -> None:
    """Everything short of the model: compose, tokenise a sample, show a pair and what would run."""
    recipe = loaded.recipe
    prepared = prepare(recipe, loaded.words, DRY_RUN_ROWS)
    if not is_main():
        return
    print_pair(prepared.train[0], prepared.tokenizer)
    split = prepared.splits["train"]
    usable = round(len(split.pairs) / split.read * split.rows)
    log.info(
        "would train %d steps of %d pairs (of about %d) with %s and write %s",
        *(total_steps(recipe, usable), recipe.train.global_batch_size, usable),
        *(objective_name(recipe.objective), recipe.output_dir),
    )
