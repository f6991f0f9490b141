"""What a step says of itself: means over its pairs, rates, memory, and how far processes drift."""

import resource
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mallowspo_cli.evaluation.preference import win_indicator
from mallowspo_cli.objectives.base import ObjectiveOutput, PairScores, ReferenceScores

MEASURED = (
    *("pairs_per_second", "tokens_per_second", "mfu", "memory_gib"),
    *("seconds/data", "seconds/first_rank", "seconds/last_rank"),
)
"""Metrics of a step that no two runs agree on; the others are numbers of the method."""


@dataclass
class StepClock:
    """This process's times of one step, in seconds."""

    start: float = field(default_factory=time.monotonic)
    data: float = 0.0
    """Dealing pairs onto packs and bringing them to the device."""
    own: float = 0.0
    """Until this process was done with its own packs' forward passes and had to wait for others."""

    def elapsed(self) -> float:
        """Since the step began."""
        return time.monotonic() - self.start


def record(
    scores: PairScores, terms: ReferenceScores | None, output: ObjectiveOutput
) -> dict[str, Tensor]:
    """What a pack reports of its pairs, (B,) each."""
    margins = output.chosen_rewards - output.rejected_rewards
    found = {
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
        found["dispersion/weight_mean"] = 2 * terms.neg_log_phi
    return {key: value.detach() for key, value in found.items()}


def gathered(
    accelerator: Accelerator, records: list[dict[str, Tensor]], clock: StepClock, stop: bool
) -> tuple[dict[str, Any], bool]:
    """Means over all pairs of the step, times and memory over processes, and whether any process
    was asked to stop; in one exchange.
    """
    keys = list(records[0])
    sums = torch.stack([torch.cat([r[k] for r in records]).double().sum() for k in keys])
    pairs = sum(len(r["loss"]) for r in records)
    about = [pairs, clock.data, clock.own, memory_gib(), float(stop)]
    row = torch.cat([sums, sums.new_tensor(about)])[None]
    rows = accelerator.gather(row)
    assert isinstance(rows, Tensor)
    total = rows.sum(0).tolist()
    means = {key: total[i] / total[len(keys)] for i, key in enumerate(keys)}
    data, own, memory, stops = rows[:, -4:].T
    return {
        **means,
        "dispersion/weight_mean": means.get("dispersion/weight_mean"),
        "seconds/data": float(data.max()),
        "seconds/first_rank": float(own.min()),
        "seconds/last_rank": float(own.max()),
        "memory_gib": float(memory.max()),
    }, bool(stops.any())


def memory_gib() -> float:
    """The most that this process has held: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
