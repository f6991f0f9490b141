"""What a training run works with, and what it does beside its steps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import nn

from mallowspo_cli.data.tokenize import TokenizedPair
from mallowspo_cli.distributed import log
from mallowspo_cli.evaluation.preference import score_pairs
from mallowspo_cli.files import write_json
from mallowspo_cli.objectives.base import Objective, PairScores
from mallowspo_cli.packing.layout import Layout, PairBatch, collate
from mallowspo_cli.packing.packer import lengths_of, pack
from mallowspo_cli.recipe.choices import Dtype, Precision
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.reference.fingerprint import compute_name
from mallowspo_cli.reference.terms import Reference
from mallowspo_cli.scoring import PairScorer, scorer_for
from mallowspo_cli.training.checkpoint import TrainState, save_checkpoint
from mallowspo_cli.training.engine import Engine
from mallowspo_cli.training.metrics import MetricsFile
from mallowspo_cli.training.order import PairOrder
from mallowspo_cli.training.startup import check_start, sample
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
        scored = score_pairs(
            partial(self._scored, scorer_for(objective, self.scorer)),
            self.eval_pairs,
            objective.at_step(state.running),
            reference,
            # The packs of the reference pass, so that margins are exactly 0 before training.
            self.recipe.reference.pack_tokens,
            accelerator.device,
            self.layout,
            (accelerator.process_index, accelerator.num_processes),
            gather_object,
        )
        self.scorer.train()
        values = scored.summary().metrics()
        self.write({"step": state.step, "epoch": self.epoch(state.step), **values})
        return values

    def _scored(self, score: Callable[[PairBatch], PairScores], batch: PairBatch) -> PairScores:
        scores = score(batch)
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
        worst = check_start(
            scorer_for(objective, self.scorer),
            *(pairs, objective, reference, compute, device, self.layout),
        )
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
