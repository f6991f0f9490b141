"""Before the first step: is the policy the model that the store's numbers are of?"""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor

from mallowspo_cli.data.table import TokenizedPair
from mallowspo_cli.distributed import log
from mallowspo_cli.errors import CacheError
from mallowspo_cli.objectives.base import Objective, PairScores, ReferenceScores
from mallowspo_cli.packing.layout import Layout, PairBatch, collate
from mallowspo_cli.reference.terms import Reference

EXACT = "float32"
"""The compute type that never rounds to bfloat16."""
NEXT_TO_IT = 1e-8
"""Nats, in float64: no loss without a jump moves by 1e-3 over it, were its slope 1e5."""


def check_start(
    score: Callable[[PairBatch], PairScores],
    pairs: Sequence[TokenizedPair],
    objective: Objective,
    reference: Reference,
    compute: str,
    device: torch.device,
    layout: Layout,
) -> float:
    """Score training pairs with the policy and compare with the store; returns the largest
    difference of a summed log-prob, in nats.

    Args:
        score: a forward pass of the policy, as `objective` needs it.
        pairs: a few training pairs.
        compute: how the policy computes, as a fingerprint says it.

    Raises:
        CacheError: the policy is not the reference; says what may explain it.
    """
    # One pair a pass: no more memory than a training step takes.
    with torch.no_grad():
        found_scores = [score(collate([pair], layout).to(device)) for pair in pairs]
    kind = type(found_scores[0])
    policy = kind(*(torch.cat([getattr(s, f.name) for s in found_scores]) for f in fields(kind)))
    pair_ids = [pair.pair_id for pair in pairs]
    stored = reference(pair_ids, device)
    computes = (reference.store.fingerprint.compute, compute)
    worst = 0.0
    for side in ("chosen", "rejected"):
        expected, found = getattr(stored, f"{side}_logps"), getattr(policy, f"{side}_logps")
        allowed = tolerance(expected, getattr(stored, f"{side}_tokens"), computes)
        outside = ((found - expected).abs() > allowed).nonzero().flatten().tolist()
        if outside:
            index = outside[0]
            raise CacheError(
                f"the policy is not the reference of the store {reference.store.path}: the {side} "
                f"response of pair {pair_ids[index]} has log-prob {float(found[index]):.4f}, "
                f"stored is {float(expected[index]):.4f}, and {float(allowed[index]):.4f} of "
                f"difference would be rounding. {_explanation(computes, reference)} "
                "reference.startup_check=0 leaves this check out."
            )
        worst = max(worst, float((found - expected).abs().max()))
    _check_loss(objective, policy, stored)
    return worst


def tolerance(logps: Tensor, tokens: Tensor, computes: Sequence[str]) -> Tensor:
    """Largest difference of summed log-probs, (B,), that rounding explains, in nats.

    float32 on both sides: 1e-4 of the sum (other kernels, other packs). With bfloat16 on either
    side each token's rounding adds up like noise: 0.4 nats times the root of their number, and 1e-3
    of the sum. That is about twice the largest that was measured (docs/decisions/0005).
    """
    if all(name == EXACT for name in computes):
        return 1e-3 + 1e-4 * logps.abs()
    return 0.4 * tokens.sqrt() + 1e-3 * logps.abs()


def sample(pairs: Sequence[TokenizedPair], count: int) -> list[TokenizedPair]:
    """Up to `count` pairs at even distances."""
    places = np.unique(np.linspace(0, len(pairs) - 1, count).round().astype(int))
    return [pairs[int(place)] for place in places]


def _explanation(computes: Sequence[str], reference: Reference) -> str:
    store = reference.store
    if computes[0] != computes[1]:
        return (
            f"The store computed in {computes[0]}, the policy in {computes[1]}: set model.dtype or "
            "train.precision so that they agree."
        )
    return (
        f"The store's attention is {store.fingerprint.attention}. If that is the run's too, the "
        "model's files or the store's rows changed: `mallowspo cache verify` tells."
    )


def _check_loss(objective: Objective, policy: PairScores, stored: ReferenceScores) -> None:
    """Where a loss is log 2 at the reference itself, it is so next to it, on either side.

    At the policy it need not be: how far a loss moves within the tolerance is its own affair.
    """
    exact = replace(
        stored,
        chosen_logps=stored.chosen_logps.double(),
        rejected_logps=stored.rejected_logps.double(),
    )
    # What the store has; what only the policy has is the reference's too, as was just seen.
    same = replace(policy, **{f.name: getattr(exact, f.name) for f in fields(PairScores)})
    ideal = objective(same, exact).losses
    if not torch.allclose(ideal, torch.full_like(ideal, math.log(2)), atol=1e-5):
        return
    for nats in (-NEXT_TO_IT, NEXT_TO_IT):
        beside = replace(same, chosen_logps=same.chosen_logps + nats)
        losses = objective(beside, exact).losses
        broken = (losses - math.log(2)).abs() > 1e-3
        if bool(broken.any()):
            raise CacheError(
                f"the first loss is {float(losses[broken][0]):.4f} where policy and reference "
                f"agree; expected log 2 = {math.log(2):.4f}. This is a fault of the objective "
                f"{type(objective).__name__}."
            )
    loss = float(objective(policy, stored).losses.mean())
    log.info("start-up check: loss %.5f (log 2 is 0.69315)", loss)
