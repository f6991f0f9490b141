"""The bandits' outcomes as rows of a CSV file: single seeds, means over seeds, claims."""

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from mallowspo_cli.evaluation.claims import Claim, t_estimate
from mallowspo_cli.experiments.bandit.claims import AT_KL
from mallowspo_cli.experiments.bandit.many_prompts import (
    GROUPS,
    MEASURES,
    PENALTIES,
    REGIMES,
    ManyPrompts,
    tuned,
)
from mallowspo_cli.experiments.bandit.methods import UNIT_MEAN
from mallowspo_cli.experiments.bandit.one_prompt import OnePrompt
from mallowspo_cli.experiments.bandit.outcomes import OUTCOMES

Rows = Iterator[Sequence[Any]]


def claim_rows(claims: dict[str, list[Claim]]) -> Rows:
    """A head, then a row for each claim."""
    yield ("section", "claim", "measure", "found", "mean", "low", "high", "seeds")
    for section, group in claims.items():
        for claim in group:
            e = claim.estimate
            numbers = (e.value, e.low, e.high, e.prompts)
            yield (section, claim.text, claim.measure, claim.verdict, *numbers)


def one_prompt_rows(one: OnePrompt) -> Rows:
    """A head, then a row for each setting and seed; settings that are none are left out."""
    yield ("method", "phi_told", "at", "distance", "dispersion", "pairs", "seed", *OUTCOMES)
    grid = one.grid
    seeds = range(grid.seed, grid.seed + grid.seeds)
    settings = list(product(grid.distances, grid.dispersions, grid.pairs, seeds))
    for (v, variant), (a, at) in product(enumerate(one.variants), enumerate(one.at)):
        columns = np.stack([one.outcomes[name][v, a].ravel() for name in OUTCOMES], axis=1)
        for setting, numbers in zip(settings, columns, strict=True):
            if not np.isnan(numbers[0]):
                yield (variant.method, variant.told, at, *setting, *numbers)


def one_prompt_summary(one: OnePrompt) -> Rows:
    """The same over the seeds that have it: means to three digits and, but for the KL, half the
    width of the 95 % t interval to two. Without the scaled w at equal KL, where it changes little.
    """
    names = [n for outcome in OUTCOMES for n in (outcome, f"{outcome}_half") if n != "kl_half"]
    yield ("method", "phi_told", "at", "distance", "dispersion", "pairs", "seeds", *names)
    grid = one.grid
    settings = list(product(grid.distances, grid.dispersions, grid.pairs))
    for (v, variant), (a, at) in product(enumerate(one.variants), enumerate(one.at)):
        if variant.told == UNIT_MEAN and at.startswith("kl="):
            continue
        of = {name: one.outcomes[name][v, a].reshape(len(settings), -1) for name in OUTCOMES}
        for index, setting in enumerate(settings):
            estimates = {name: t_estimate(values[index]) for name, values in of.items()}
            seeds = estimates["kl"].prompts
            if seeds:
                columns = {name: f"{e.value:.3g}" for name, e in estimates.items()}
                columns |= {f"{n}_half": f"{e.high - e.value:.2g}" for n, e in estimates.items()}
                numbers = (float(columns[name]) for name in names)
                yield (variant.method, variant.told, at, *setting, seeds, *numbers)


def many_prompts_rows(many: ManyPrompts, one: OnePrompt) -> Rows:
    """A head, then a row for each setting and seed, at AT_KL and at the chosen betas."""
    names = [f"{measure}_{group}" for measure, group in product(MEASURES, GROUPS)]
    yield (
        *("method", "phi_told", "regime", "at", "conflict", "distance", "pairs_of_a_prompt"),
        *("seed", "chosen_beta", *names),
    )
    grid = one.grid
    seeds = range(grid.seed, grid.seed + grid.seeds)
    settings = list(product(many.grid.conflicts, grid.distances, many.grid.prompt_pairs, seeds))
    choices = {tuned(penalty): index for index, penalty in enumerate(PENALTIES)}
    places = [(many.at.index(name), name) for name in (AT_KL, *choices)]
    for (v, variant), (r, regime), (a, at) in product(
        enumerate(many.variants), enumerate(REGIMES), places
    ):
        columns = np.concatenate([many.values[name][v, r, a] for name in MEASURES])
        betas = many.chosen_betas[v, choices[at]].ravel() if at in choices else None
        for index, setting in enumerate(settings):
            numbers = columns.reshape(len(names), -1)[:, index]
            if not np.isnan(numbers[0]):
                beta = "" if betas is None else betas[index]
                yield (variant.method, variant.told, regime, at, *setting, beta, *numbers)


def as_csv(rows: Rows) -> str:
    """Text of rows of names and numbers, the numbers to five digits or a millionth."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        # A negative number that rounds to 0 has no sign.
        shown = (f"{round(v, 6) + 0.0:.5g}" if isinstance(v, float) else v for v in row)
        writer.writerow(["" if v == "nan" else v for v in shown])
    return text.getvalue()
