"""The training loop: batch, score, look up, objective, backward, step, log, evaluate, save."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn

from mallowspo_cli.data.tokenize import TokenizedPair
from mallowspo_cli.distributed import log, progress
from mallowspo_cli.errors import RecipeError, TrainingError
from mallowspo_cli.evaluation.preference import evaluate_preferences
from mallowspo_cli.files import write_json
from mallowspo_cli.objectives.base import Objective
from mallowspo_cli.packing.layout import Layout, PairBatch, collate
from mallowspo_cli.packing.packer import lengths_of, pack
from mallowspo_cli.recipe.choices import Dtype, Precision
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.reference.fingerprint import compute_name
from mallowspo_cli.reference.terms import Reference
from mallowspo_cli.scoring import PairScorer
from mallowspo_cli.training.checkpoint import (
    TrainState,
    best_checkpoint,
    broadcast,
    save_checkpoint,
)
from mallowspo_cli.training.engine import Engine
from mallowspo_cli.training.metrics import MetricsFile
from mallowspo_cli.training.optim import learning_rate
from mallowspo_cli.training.order import PairOrder
from mallowspo_cli.training.startup import check_start, sample
from mallowspo_cli.training.telemetry import StepClock, gathered, record
from mallowspo_cli.training.watch import STOPPED_FILE, Stop, StoppedError, Watch


@dataclass
class Run:
    """What a training run works with."""

    recipe: Recipe
    directory: Path
    engine: Engine
    train_pairs: Sequence[TokenizedPair]
    eval_pairs: Sequence[TokenizedPair]
    order: PairOrder
    metrics: MetricsFile
    total_steps: int
    """Optimizer steps of the whole run."""
    pack_tokens: int
    """Tokens that a pack may hold."""
    peak_flops: float | None = None
    """FLOP/s of a device on paper, for the MFU; None where it is not known."""
    stop: Stop = field(default_factory=Stop)
    """What may ask the run to stop."""
    watch: Watch = field(default_factory=lambda: Watch(0, 0))
    """What ends it where it hangs."""

    @property
    def accelerator(self) -> Accelerator:
        """The processes of the run."""
        return self.engine.accelerator

    @property
    def scorer(self) -> nn.Module:
        """The policy, as the engine wraps it."""
        return self.engine.scorer

    @property
    def bare_scorer(self) -> PairScorer:
        """The scorer without what an engine wraps it in."""
        return self.engine.bare_scorer

    @property
    def layout(self) -> Layout:
        """How its packs lie."""
        return self.bare_scorer.layout

    def packs(self, step: int) -> "StepPacks":
        """This process's packs of an optimizer step."""
        pairs = self.order.step(step)
        lengths = self._lengths[pairs]
        costs = self.bare_scorer.flops.of_pairs(lengths)
        mine = pack(
            *(lengths, self.pack_tokens, self.accelerator.num_processes, self.layout, costs)
        )[self.accelerator.process_index]
        # Of the other processes' pairs no more than their lengths.
        members = [[self.train_pairs[pairs[i]] for i in chosen] for chosen in mine]
        return StepPacks(members, self.layout, int(lengths.sum()), float(costs.sum()))

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        return lengths_of(self.train_pairs)

    def evaluate(
        self, objective: Objective, reference: Reference | None, state: TrainState
    ) -> dict[str, Any]:
        """Evaluate on the held-out pairs and log the result; nothing where there are none."""
        if not self.eval_pairs:
            return {}
        accelerator = self.accelerator
        self.scorer.eval()
        report = evaluate_preferences(
            self._scored,
            self.eval_pairs,
            objective,
            reference,
            # The packs of the reference pass, so that margins are exactly 0 before training.
            self.recipe.reference.pack_tokens,
            accelerator.device,
            self.layout,
            (accelerator.process_index, accelerator.num_processes),
            gather_object,
        )
        self.scorer.train()
        values = report.metrics()
        self.write({"step": state.step, "epoch": self.epoch(state.step), **values})
        return values

    def _scored(self, batch: PairBatch) -> Any:
        scores = self.scorer(batch)
        self.watch.alive()
        return scores

    def check_start(self, objective: Objective, reference: Reference) -> None:
        """Compare the policy with the reference before the first step.

        Raises:
            CacheError: they are not one model.
        """
        pairs = sample(self.train_pairs, self.recipe.reference.startup_check)
        if not pairs:
            return
        self.scorer.eval()
        model, precision = self.recipe.model, self.recipe.train.precision
        # The base of adapters is loaded as the reference is; other weights are float32, or what
        # DeepSpeed makes of them beside its masters.
        dtype = model.dtype if model.lora.rank else Dtype.float32
        if self.engine.casts and precision is Precision.bf16:
            dtype = Dtype.bfloat16
        compute = compute_name(dtype, precision, model.quantization)
        stored = reference.store.fingerprint.compute
        if compute != stored:
            log.info(
                "the reference computed in %s, the policy computes in %s: margins begin near 0, "
                "not at it. model.dtype=%s makes them alike",
                *(stored, compute, dtype.value),
            )
        device = self.accelerator.device
        worst = check_start(self.scorer, pairs, objective, reference, compute, device, self.layout)
        self.scorer.train()
        log.info(
            "start-up check: log-probs of %d pairs within %.1e nats of the store",
            *(len(pairs), worst),
        )

    def save(self, state: TrainState, best: dict[str, Any] | None = None) -> None:
        """Write a checkpoint; `best` is what best.json then says."""
        keep = self.recipe.checkpoint.keep
        self.watch.alive()
        save_checkpoint(self.directory, self.engine, state, keep, best, self.watch.alive)
        self.watch.alive()

    def write(self, values: dict[str, Any]) -> None:
        """Log one line of metrics, here and to the trackers."""
        if self.accelerator.is_main_process:
            self.metrics.append(values)
        numbers = {k: v for k, v in values.items() if v is not None and k != "step"}
        self.accelerator.log(numbers, step=values["step"])

    def say_stopped(self, state: TrainState) -> NoReturn:
        """End the run where it was asked to; stopped.json tells a job script that it can go on."""
        reason = self.stop.reason or "another process was asked to"
        if self.accelerator.is_main_process:
            write_json(self.directory / STOPPED_FILE, {"step": state.step, "reason": reason})
        raise StoppedError(
            f"stopped after step {state.step} of {self.total_steps} ({reason}), and saved. Go on "
            "with the same command and --resume."
        )

    def epoch(self, step: int) -> float:
        """Passes over the training pairs after `step` optimizer steps."""
        return round(step * self.recipe.train.global_batch_size / len(self.train_pairs), 6)


@dataclass(frozen=True)
class StepPacks:
    """A process's share of an optimizer step, and what the whole step comes to."""

    members: list[list[TokenizedPair]]
    layout: Layout
    tokens: int
    """Of all processes, each prompt once."""
    forward_flops: float
    """Of all processes."""

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[PairBatch]:
        return (collate(pairs, self.layout) for pairs in self.members)


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
            values, stop = optimizer_step(run, objective, reference, state.step)
            state.step += 1
            last = state.step == total
            if state.step % recipe.log.every == 0 or last:
                run.write({"step": state.step, "epoch": run.epoch(state.step), **values})
            best = None
            if recipe.eval.at_end if last else _due(state.step, recipe.eval.every):
                values = run.evaluate(objective, reference, state)
                # The main process's view: saving needs all of them.
                main = run.accelerator.is_main_process
                best = broadcast(run.engine, _best(run, values, state) if main else None)
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
            scores = run.scorer(batch)
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
    if metric is None or values.get(metric) is None:
        return None
    before = best_checkpoint(run.directory)
    sign = -1 if metric.endswith("loss") else 1
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
