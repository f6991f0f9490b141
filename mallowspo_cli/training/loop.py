"""The training loop: batch, score, look up, objective, backward, step, log, evaluate, save."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mallowspo_cli.data.tokenize import TokenizedPair
from mallowspo_cli.distributed import log, progress
from mallowspo_cli.errors import RecipeError, TrainingError
from mallowspo_cli.evaluation.preference import evaluate_preferences, win_indicator
from mallowspo_cli.objectives.base import Objective, ObjectiveOutput, PairScores, ReferenceScores
from mallowspo_cli.packing.layout import Layout, PairBatch, collate
from mallowspo_cli.packing.packer import lengths_of, pack
from mallowspo_cli.recipe.choices import Dtype
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.reference.fingerprint import compute_name
from mallowspo_cli.reference.terms import Reference
from mallowspo_cli.scoring import PairScorer
from mallowspo_cli.training.checkpoint import TrainState, save_checkpoint
from mallowspo_cli.training.metrics import MetricsFile
from mallowspo_cli.training.optim import learning_rate
from mallowspo_cli.training.order import PairOrder
from mallowspo_cli.training.startup import check_start, sample


@dataclass
class Run:
    """What a training run works with. `scorer` and `optimizer` are prepared by the accelerator."""

    recipe: Recipe
    directory: Path
    accelerator: Accelerator
    scorer: nn.Module
    optimizer: Any
    train_pairs: Sequence[TokenizedPair]
    eval_pairs: Sequence[TokenizedPair]
    order: PairOrder
    metrics: MetricsFile
    total_steps: int
    """Optimizer steps of the whole run."""
    pack_tokens: int
    """Tokens that a pack may hold."""

    def packs(self, step: int) -> list[PairBatch]:
        """This process's packs of an optimizer step."""
        pairs = [self.train_pairs[i] for i in self.order.step(step)]
        lengths = lengths_of(pairs)
        mine = pack(
            lengths,
            self.pack_tokens,
            self.accelerator.num_processes,
            self.layout,
            self.bare_scorer.flops.of_pairs(lengths),
        )[self.accelerator.process_index]
        return [collate([pairs[i] for i in members], self.layout) for members in mine]

    @property
    def bare_scorer(self) -> PairScorer:
        """The scorer without what an engine wraps it in."""
        return self.accelerator.unwrap_model(self.scorer)

    @property
    def layout(self) -> Layout:
        """How its packs lie."""
        return self.bare_scorer.layout

    def evaluate(
        self, objective: Objective, reference: Reference | None, state: TrainState
    ) -> None:
        """Evaluate on the held-out pairs and log the result."""
        if not self.eval_pairs:
            return
        self.scorer.eval()
        report = evaluate_preferences(
            self.scorer,
            self.eval_pairs,
            objective,
            reference,
            # The packs of the reference pass, so that margins are exactly 0 before training.
            self.recipe.reference.pack_tokens,
            self.accelerator.device,
            self.layout,
        )
        self.scorer.train()
        self.write({"step": state.step, "epoch": self.epoch(state.step), **report.metrics()})

    def check_start(self, objective: Objective, reference: Reference) -> None:
        """Compare the policy with the reference before the first step.

        Raises:
            CacheError: they are not one model.
        """
        pairs = sample(self.train_pairs, self.recipe.reference.startup_check)
        if not pairs:
            return
        self.scorer.eval()
        compute = compute_name(Dtype.float32, self.recipe.train.precision)
        device = self.accelerator.device
        worst = check_start(self.scorer, pairs, objective, reference, compute, device, self.layout)
        self.scorer.train()
        log.info(
            "start-up check: log-probs of %d pairs within %.1e nats of the store",
            *(len(pairs), worst),
        )

    def save(self, state: TrainState) -> None:
        """Write a checkpoint."""
        keep = self.recipe.checkpoint.keep
        save_checkpoint(self.directory, self.bare_scorer, self.optimizer, state, keep)

    def write(self, values: dict[str, Any]) -> None:
        """Log one line of metrics, here and to the trackers."""
        if self.accelerator.is_main_process:
            self.metrics.append(values)
        numbers = {k: v for k, v in values.items() if v is not None and k != "step"}
        self.accelerator.log(numbers, step=values["step"])

    def epoch(self, step: int) -> float:
        """Passes over the training pairs after `step` optimizer steps."""
        return round(step * self.recipe.train.global_batch_size / len(self.train_pairs), 6)


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
            values = optimizer_step(run, objective, reference, state.step)
            state.step += 1
            if state.step % recipe.log.every == 0 or state.step == total:
                run.write({"step": state.step, "epoch": run.epoch(state.step), **values})
            if _due(state.step, recipe.eval.every) and state.step < total:
                run.evaluate(objective, reference, state)
            if _due(state.step, recipe.checkpoint.every) and state.step < total:
                run.save(state)
            advance(1)
    if recipe.eval.at_end:
        run.evaluate(objective, reference, state)
    if recipe.checkpoint.every:
        run.save(state)


def optimizer_step(
    run: Run, objective: Objective, reference: Reference | None, step: int
) -> dict[str, Any]:
    """One step over `train.global_batch_size` pairs; returns its metrics.

    Raises:
        TrainingError: a loss or gradient is not finite; nothing is changed then.
    """
    start = time.monotonic()
    train, accelerator = run.recipe.train, run.accelerator
    rate = learning_rate(step, run.total_steps, train)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    packs, records = run.packs(step), []
    for index, batch in enumerate(packs):
        batch = batch.to(accelerator.device)
        last = index == len(packs) - 1
        with nullcontext() if last else accelerator.no_sync(run.scorer):
            scores = run.scorer(batch)
            terms = reference(batch.pair_ids, accelerator.device) if reference else None
            output = objective(scores, terms)
            _check_finite(output.losses, step, batch.pair_ids)
            # Engines average gradients over processes; the loss is a mean over the step's pairs.
            share = accelerator.num_processes / train.global_batch_size
            accelerator.backward(output.losses.sum() * share)
        records.append(_record(scores, terms, output))
    norm = _clip(run, train.max_grad_norm, step)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    means = _means(accelerator, records)
    return {
        **means,
        "grad_norm": norm,
        "learning_rate": rate,
        "pairs_per_second": train.global_batch_size / (time.monotonic() - start),
    }


def _check_finite(losses: Tensor, step: int, pair_ids: list[str]) -> None:
    broken = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if broken:
        names = ", ".join(pair_ids[i] for i in broken[:4])
        raise TrainingError(
            f"the loss of step {step + 1} is not finite for {len(broken)} pairs ({names}). "
            "Nothing was updated. Lower train.learning_rate, or use train.precision=fp32."
        )


def _clip(run: Run, max_norm: float, step: int) -> float:
    parameters = [p for p in run.scorer.parameters() if p.requires_grad]
    limit = max_norm if max_norm > 0 else math.inf
    total = run.accelerator.clip_grad_norm_(parameters, limit)
    assert total is not None
    norm = float(total)
    if not math.isfinite(norm):
        raise TrainingError(
            f"the gradient of step {step + 1} is not finite (norm {norm}). Nothing was updated. "
            "Lower train.learning_rate, or use train.precision=fp32."
        )
    return norm


def _record(
    scores: PairScores, terms: ReferenceScores | None, output: ObjectiveOutput
) -> dict[str, Tensor]:
    """What a step reports of its pairs, (B,) each."""
    margins = output.chosen_rewards - output.rejected_rewards
    record = {
        "loss": output.losses,
        "rewards/chosen": output.chosen_rewards,
        "rewards/rejected": output.rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": win_indicator(margins),
        "logps/chosen": scores.chosen_logps,
        "logps/rejected": scores.rejected_logps,
        **{f"objective/{key}": value for key, value in output.metrics.items()},
    }
    if terms is not None:
        record["dispersion/weight_mean"] = 2 * terms.neg_log_phi
    return {key: value.detach() for key, value in record.items()}


def _means(accelerator: Accelerator, records: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Means over all pairs of the step, over all processes, in one reduction."""
    keys = list(records[0])
    sums = torch.stack([torch.cat([r[k] for r in records]).double().sum() for k in keys])
    count = sums.new_tensor([sum(len(r["loss"]) for r in records)])
    total = accelerator.reduce(torch.cat([sums, count]), reduction="sum")
    assert isinstance(total, Tensor)
    means = dict(zip(keys, (total[:-1] / total[-1]).tolist(), strict=True))
    return {**means, "dispersion/weight_mean": means.get("dispersion/weight_mean")}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
