"""The training loop: batch, score, look up, objective, backward, step, log, evaluate, save."""

import math
import time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from mallowspo_cli.distributed import log, progress
from mallowspo_cli.errors import RecipeError, TrainingError
from mallowspo_cli.objectives.base import Objective
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.reference.terms import Reference
from mallowspo_cli.scoring import scorer_for
from mallowspo_cli.training.checkpoint import TrainState, best_checkpoint
from mallowspo_cli.training.optim import learning_rate
from mallowspo_cli.training.run import Run
from mallowspo_cli.training.telemetry import StepClock, gathered, record

LESS_IS_BETTER = ("eval/loss", "eval/displacement")
"""Metrics of an evaluation that are to fall; the others are to rise."""


def total_steps(recipe: Recipe, num_pairs: int) -> int:
    """Whole optimizer steps in the recipe's epochs, at most `train.max_steps`.

    Raises:
        RecipeError: the data does not fill one step.
    """
    train = recipe.train
    steps, left_over = divmod(train.epochs * num_pairs, train.global_batch_size)
    if steps == 0:
        raise RecipeError(
            f"train.global_batch_size={train.global_batch_size} is more than the {num_pairs} "
            f"training pairs x {train.epochs} epochs. Lower it, or train for more epochs."
        )
    if left_over and (train.max_steps or steps) >= steps:
        log.info("the last %d pairs do not fill a step and are left over", left_over)
    return min(steps, train.max_steps or steps)


def fit(run: Run, objective: Objective, reference: Reference | None, state: TrainState) -> None:
    """Train from `state` to the recipe's last step.

    Raises:
        TrainingError: a loss or gradient is not finite.
        CacheError: the reference lacks a pair, or is of another model than the policy.
        StoppedError: a signal or the end of the job's time asked for it; a checkpoint is written.
    """
    recipe, total = run.recipe, run.total_steps
    if state.step == total:
        return
    if reference is not None and state.step == 0:
        run.check_start(objective, reference)
    if recipe.eval.at_start and state.step == 0:
        run.evaluate(objective, reference, state)
    run.scorer.train()
    with progress("training", total - state.step, "steps") as advance:
        while state.step < total:
            loss = objective.at_step(state.running)
            values, stop = optimizer_step(run, loss, reference, state.step)
            state.step, state.running = state.step + 1, loss.updated(values)
            last = state.step == total
            if state.step % recipe.log.every == 0 or last:
                run.write({"step": state.step, "epoch": run.epoch(state.step), **values})
            best = None
            if recipe.eval.at_end if last else _due(state.step, recipe.eval.every):
                values = run.evaluate(objective, reference, state)
                # The main process's view: saving needs all of them.
                main = run.accelerator.is_main_process
                best = run.engine.broadcast(_best(run, values, state) if main else None)
            every = recipe.checkpoint.every
            if best or stop or _due(state.step, every) or (last and every):
                run.save(state, best)
            run.watch.alive()
            advance(1)
            if stop and not last:
                run.say_stopped(state)


def optimizer_step(
    run: Run, objective: Objective, reference: Reference | None, step: int
) -> tuple[dict[str, Any], bool]:
    """One step over `train.global_batch_size` pairs; returns its metrics, and whether any process
    was asked to stop.

    Raises:
        TrainingError: a loss or gradient is not finite; nothing is changed then.
    """
    clock = StepClock()
    train, accelerator, engine = run.recipe.train, run.accelerator, run.engine
    rate = learning_rate(step, run.total_steps, train)
    engine.set_learning_rate(rate)
    score = scorer_for(objective, run.scorer)
    packs = run.packs(step)
    batches, records = iter(packs), []
    # Engines average gradients over processes; the loss is a mean over the step's pairs.
    share = accelerator.num_processes / train.global_batch_size
    losses: list[tuple[list[str], Tensor]] = []
    for index in range(len(packs)):
        begin = time.monotonic()
        batch = next(batches).to(accelerator.device)
        clock.data += time.monotonic() - begin
        last = index == len(packs) - 1
        with engine.forward_context(last):
            scores = score(batch)
            terms = reference(batch.pair_ids, accelerator.device) if reference else None
            output = objective(scores, terms)
            losses.append((batch.pair_ids, output.losses.detach()))
            if last:
                _check_finite(accelerator, losses, step, clock)
            engine.backward(output.losses.sum() * share, last)
        records.append(record(scores, terms, output))
    norm = engine.step(train.max_grad_norm)
    if not math.isfinite(norm):
        raise TrainingError(
            f"the gradient of step {step + 1} is not finite (norm {norm}). Nothing was updated. "
            "Lower train.learning_rate, or use train.precision=fp32."
        )
    values, stop = gathered(accelerator, records, clock, run.stop.reason is not None)
    seconds = clock.elapsed()
    # Of a frozen weight no gradient is made: two passes' worth in the place of three.
    useful = packs.forward_flops * (2 if run.recipe.model.lora.rank else 3)
    peak = run.peak_flops and run.peak_flops * accelerator.num_processes
    return {
        **values,
        "grad_norm": norm,
        "learning_rate": rate,
        "pairs_per_second": train.global_batch_size / seconds,
        "tokens_per_second": packs.tokens / seconds,
        "mfu": useful / seconds / peak if peak else None,
    }, stop


def _check_finite(
    accelerator: Accelerator,
    losses: list[tuple[list[str], Tensor]],
    step: int,
    clock: StepClock,
) -> None:
    """Stop all processes where a loss of any of them is not finite: before the last backward pass,
    in which some engines update the weights.
    """
    broken = torch.cat([~torch.isfinite(values) for _, values in losses])
    found = int(broken.sum())
    clock.own = clock.elapsed()
    count = torch.tensor(float(found), device=broken.device)
    if float(accelerator.reduce(count, reduction="sum")) == 0:  # type: ignore[arg-type]
        return
    ids = [pair for pairs, _ in losses for pair in pairs]
    names = gather_object([ids[i] for i in broken.nonzero().flatten().tolist()])
    raise TrainingError(
        f"the loss of step {step + 1} is not finite for {len(names)} pairs "
        f"({', '.join(names[:4])}). Nothing was updated. Lower train.learning_rate, or use "
        "train.precision=fp32."
    )


def _best(run: Run, values: dict[str, Any], state: TrainState) -> dict[str, Any] | None:
    """What best.json is to say where this evaluation is the best so far; None where it is not."""
    metric = run.recipe.checkpoint.best_by
    if metric is None or values.get(metric) is None or not math.isfinite(values[metric]):
        return None
    before = best_checkpoint(run.directory)
    sign = -1 if metric in LESS_IS_BETTER else 1
    if (
        before is not None
        and before["metric"] == metric
        and before["step"] < state.step
        and sign * values[metric] <= sign * before["value"]
    ):
        return None
    return {"step": state.step, "metric": metric, "value": values[metric]}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
