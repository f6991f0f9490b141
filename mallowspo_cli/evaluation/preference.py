"""Held-out preferences: does the policy's implicit reward rank them as the data does?"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mallowspo_cli import dispersion
from mallowspo_cli.data.tokenize import TokenizedPair
from mallowspo_cli.distributed import progress
from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.statistics import TERCILES, bootstrap_interval
from mallowspo_cli.files import whole_file
from mallowspo_cli.objectives.base import Objective, PairScores, ReferenceScores
from mallowspo_cli.packing.layout import Layout, PairBatch, collate
from mallowspo_cli.packing.packer import lengths_of, pack
from mallowspo_cli.reference.terms import Reference

FIELDS = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/accuracies_low": "accuracy_low",
    "rewards/accuracies_high": "accuracy_high",
    "rewards/margins": "margin",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "logps/chosen": "chosen_logp",
    "logps/rejected": "rejected_logp",
    "displacement": "displacement",
}
"""Names of a report's fields in metrics.jsonl, without `eval/` in front."""
METRICS = tuple(f"eval/{name}" for name in FIELDS)


@dataclass(frozen=True)
class PreferenceReport:
    """Means over N held-out pairs; log-probs in nats."""

    pairs: int
    loss: float
    accuracy: float
    """Share of pairs with the chosen reward above the rejected one; equal rewards count half."""
    accuracy_low: float
    """Lower end of the 95 % interval (bootstrap over prompts; over pairs where all share one)."""
    accuracy_high: float
    margin: float
    chosen_reward: float
    rejected_reward: float
    chosen_logp: float
    rejected_logp: float
    displacement: float | None
    """Share of pairs whose chosen log-prob lies below the reference's; None without a reference."""
    by_dispersion: dict[str, dict[str, float]]
    """For each third by the estimated w: accuracy, margin, the means above, mean w and pairs; empty
    without a reference."""

    def metrics(self) -> dict[str, Any]:
        """The report under the names of metrics.jsonl, with `eval/` in front."""
        named = {name: getattr(self, field) for name, field in FIELDS.items()}
        for tercile, values in self.by_dispersion.items():
            named |= {f"{tercile}/{key}": value for key, value in values.items()}
        return {f"eval/{key}": value for key, value in named.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ScoredPairs:
    """What N held-out pairs got, in their order."""

    pair_ids: list[str]
    prompts: list[str]
    """Key of each pair's prompt."""
    columns: dict[str, Tensor]
    """(N,) float64 each: loss, rewards, log-probs (nats) and displacement."""
    weights: Tensor | None
    """(N,) estimated w, whatever the dispersion mode; None without a reference."""

    @property
    def units(self) -> list[str]:
        """What each pair is resampled with: its prompt, or the pair where all share a prompt."""
        return self.prompts if len(set(self.prompts)) > 1 else self.pair_ids

    @property
    def margins(self) -> Tensor:
        """(N,) chosen minus rejected reward."""
        return self.columns["chosen_reward"] - self.columns["rejected_reward"]

    def summary(self) -> PreferenceReport:
        """The means over all pairs, and over each third by w."""
        return _summarise(self)

    def write(self, path: Path) -> None:
        """A parquet file for paired comparisons of models: a row a pair; `prompt` is its unit."""
        columns: dict[str, Any] = {
            "pair_id": pa.array(self.pair_ids, pa.string()),
            "prompt": pa.array(self.units, pa.string()),
            "win": pa.array(win_indicator(self.margins).tolist(), pa.float64()),
            "margin": pa.array(self.margins.tolist(), pa.float64()),
            "weight": pa.array(
                [None] * len(self.pair_ids) if self.weights is None else self.weights.tolist(),
                pa.float64(),
            ),
        }
        with whole_file(path) as temporary:
            pq.write_table(pa.table(columns), temporary)


def score_pairs(
    score: Callable[[PairBatch], PairScores],
    pairs: Sequence[TokenizedPair],
    objective: Objective,
    reference: Reference | None,
    pack_tokens: int,
    device: torch.device,
    layout: Layout,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[list[Any]], list[Any]] = list,
) -> ScoredPairs:
    """Score held-out pairs.

    Args:
        score: a forward pass of the policy over one pack.
        pairs: N pairs, all shown to `reference` before.
        share: this process and the number of those that share the work.
        gather: joins a list of each process to one in all of them.

    Raises:
        EvalError: a reward is not finite; in all processes.
    """
    (packs,) = pack(lengths_of(pairs), pack_tokens, layout=layout)
    process, processes = share
    # As many passes in every process: engines need all of them at each. The last may be one that
    # another process counts.
    passes = range(process, -(-len(packs) // processes) * processes, processes)
    rows: list[dict[str, Tensor]] = []
    order: list[int] = []
    total = sum(len(packs[index % len(packs)]) for index in passes)
    with torch.no_grad(), progress("evaluation", total, "pairs") as advance:
        for index in passes:
            members = packs[index % len(packs)]
            batch = collate([pairs[i] for i in members], layout).to(device)
            scores = score(batch)
            terms = reference(batch.pair_ids, device) if reference is not None else None
            advance(len(members))
            if index < len(packs):
                rows.append(_columns(scores, terms, objective))
                order += members
    rows, order = gather(rows), gather(order)
    columns = {k: torch.cat([r[k] for r in rows]) for k in rows[0]}
    columns = {k: v[torch.argsort(torch.tensor(order))] for k, v in columns.items()}
    # By the estimate in every mode, so that a control and a treatment have the same strata.
    ids = [p.pair_id for p in pairs]
    _check_finite(columns, ids)
    weights = reference.estimates(ids) if reference is not None else None
    return ScoredPairs(ids, [_prompt_key(p) for p in pairs], columns, weights)


def _columns(
    scores: PairScores, terms: ReferenceScores | None, objective: Objective
) -> dict[str, Tensor]:
    """What is kept of a pack's B pairs, (B,) float64 each."""
    output = objective(scores, terms)
    displaced = (
        (scores.chosen_logps < terms.chosen_logps).float()
        if terms is not None
        else torch.full_like(output.losses, torch.nan)
    )
    values = {
        "loss": output.losses,
        "chosen_reward": output.chosen_rewards,
        "rejected_reward": output.rejected_rewards,
        "chosen_logp": scores.chosen_logps,
        "rejected_logp": scores.rejected_logps,
        "displacement": displaced,
    }
    return {key: value.double().cpu() for key, value in values.items()}


def win_indicator(margins: Tensor) -> Tensor:
    """1 where the chosen reward is above, 0 below, 1/2 where both are equal."""
    return (margins > 0).to(margins.dtype) + 0.5 * (margins == 0).to(margins.dtype)


def _check_finite(columns: dict[str, Tensor], ids: Sequence[str]) -> None:
    """A reward that is no number would count as a loss."""

    def broken(what: str) -> list[str]:
        finite = torch.isfinite(columns[f"chosen_{what}"] + columns[f"rejected_{what}"])
        return [pair_id for pair_id, fine in zip(ids, finite.tolist(), strict=True) if not fine]

    of_model, of_all = broken("logp"), broken("reward")
    if found := of_model or of_all:
        what = "the model's log-probs" if of_model else "rewards against the reference"
        raise EvalError(
            f"{what} are not finite for {len(found)} of {len(ids)} held-out pairs, such as "
            f"{', '.join(found[:3])}; expected numbers, as accuracy would count them as losses. "
            "Try train.precision=fp32; if that does not help, the weights are broken: take an "
            "earlier checkpoint."
        )


def _summarise(scored: ScoredPairs) -> PreferenceReport:
    means = {key: float(value.mean()) for key, value in scored.columns.items()}
    wins = win_indicator(scored.margins)
    low, high = bootstrap_interval(wins.tolist(), scored.units)
    displacement = means.pop("displacement")
    return PreferenceReport(
        pairs=len(wins),
        accuracy=float(wins.mean()),
        accuracy_low=low,
        accuracy_high=high,
        margin=float(scored.margins.mean()),
        displacement=None if displacement != displacement else displacement,
        by_dispersion=_by_tercile(scored, scored.weights) if scored.weights is not None else {},
        **means,
    )


def _by_tercile(scored: ScoredPairs, weights: Tensor) -> dict[str, dict[str, float]]:
    if bool((weights == weights[0]).all()):
        return {}
    # A low weight is a high dispersion.
    third = 2 - dispersion.terciles(weights)
    values = {
        "accuracy": win_indicator(scored.margins),
        "margin": scored.margins,
        **scored.columns,
        "weight_mean": weights,
    }
    return {
        name: {
            **{key: float(value[third == index].mean()) for key, value in values.items()},
            "pairs": int((third == index).sum()),
        }
        for index, name in enumerate(TERCILES)
        if bool((third == index).any())
    }


def _prompt_key(pair: TokenizedPair) -> str:
    return hashlib.blake2b(pair.prompt.tobytes(), digest_size=8).hexdigest()
