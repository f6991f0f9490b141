"""A sweep's rows: what each job measured, and means over seeds."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mallowspo_cli.evaluation.claims import t_estimate
from mallowspo_cli.evaluation.strata import Estimate
from mallowspo_cli.files import write_text

SEED = "seed"
"""Jobs that differ in this key alone are averaged."""
PATHS = {
    "accuracy": ("after", "eval/rewards/accuracies"),
    "accuracy_low": ("after", "eval/rewards/accuracies_low"),
    "accuracy_high": ("after", "eval/rewards/accuracies_high"),
    "margin": ("after", "eval/rewards/margins"),
    "loss": ("after", "eval/loss"),
    "displacement": ("after", "eval/displacement"),
    "kl": ("kl", "mean"),
    "kl_low": ("kl", "low"),
    "kl_high": ("kl", "high"),
    "pairs_per_second": ("pairs_per_second",),
    "peak_memory_gib": ("peak_memory_gib",),
}
"""Columns, and where results.json has them; kl in nats, displacement a share of pairs."""
METRICS = {
    "accuracy": "held-out accuracy",
    "margin": "held-out reward margin",
    "loss": "held-out loss",
    "displacement": "chosen log-prob fell (share)",
    "kl": "sequence KL, nats",
}
"""The columns that reports show."""


@dataclass(frozen=True)
class SweepRow:
    """A job, and what is known of it."""

    job: str
    values: dict[str, Any]
    """Swept key to value: a number, a text, or None."""
    status: str
    reason: str = ""
    """Why it failed."""
    results: dict[str, Any] | None = None
    """Its results.json, once it is finished."""

    def measured(self, column: str) -> float | None:
        """A column of `PATHS`; None where the run has it not."""
        found: Any = self.results
        for key in PATHS[column]:
            found = found.get(key) if isinstance(found, dict) else None
        known = isinstance(found, int | float) and not math.isnan(found)
        return float(found) if known else None

    @property
    def seconds(self) -> float | None:
        """Of training, without start, reference pass and evaluations."""
        return None if self.results is None else self.results.get("training_seconds")


@dataclass(frozen=True)
class Group:
    """Finished jobs that differ in their seed alone."""

    values: dict[str, Any]
    rows: tuple[SweepRow, ...]

    def estimate(self, metric: str) -> Estimate | None:
        """Mean over the jobs with a 95 % t interval; of one job its own interval, if it has one."""
        found = [(row, v) for row in self.rows if (v := row.measured(metric)) is not None]
        if not found:
            return None
        if len(found) > 1:
            return t_estimate([value for _, value in found])
        ((row, value),) = found
        own = f"{metric}_low" in PATHS
        low, high = (row.measured(f"{metric}_{end}") if own else None for end in ("low", "high"))
        return Estimate(
            value, math.nan if low is None else low, math.nan if high is None else high, 1
        )


def groups(rows: Sequence[SweepRow]) -> list[Group]:
    """Finished jobs, those together that differ in their seed alone, in the order of the rows."""
    found: dict[str, list[SweepRow]] = {}
    for row in rows:
        if row.results is not None:
            found.setdefault(repr(_but_seed(row)), []).append(row)
    return [Group(_but_seed(members[0]), tuple(members)) for members in found.values()]


def _but_seed(row: SweepRow) -> dict[str, Any]:
    return {key: value for key, value in row.values.items() if key != SEED}


def write_csv(path: Path, rows: Sequence[SweepRow]) -> None:
    """A line a job: its name, the swept keys, status, seconds, what was measured, why it failed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["job", *rows[0].values, "status", "seconds", *PATHS, "reason"])
    for row in rows:
        numbers = [row.seconds, *(row.measured(column) for column in PATHS)]
        shown = ["" if number is None else f"{number:.6g}" for number in numbers]
        values = ["null" if v is None else v for v in row.values.values()]
        writer.writerow([row.job, *values, row.status, *shown, row.reason])
    write_text(path, text.getvalue())
