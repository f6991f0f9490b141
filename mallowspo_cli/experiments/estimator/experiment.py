"""Does the entropy estimate give back the dispersion where the true one is known?

MallowsPO (arXiv 2405.14953) estimates -log phi(x) by -phi* ln H: H is the mean entropy of a model's
next-token distributions as a share of the largest possible, phi* a constant to be fitted. Here the
truth is a Mallows model: once its exact conditionals are put into the estimate
(`exact.py`), once those of a transformer that was trained on its rankings
(`ranking_model.py`), from tokens to w.

It is a check of the estimate and of this code, not of what people think: that the entropy over
rankings tells phi does not make a language model's token entropy a measure of human disagreement
(`human_dispersion.py` asks people).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mallowspo_cli.distributed import log
from mallowspo_cli.evaluation.claims import Claim, t_estimate
from mallowspo_cli.evaluation.statistics import spearman
from mallowspo_cli.experiments.estimator.exact import (
    FOLLOWS,
    HIGHEST_THETA,
    LOWEST_THETA,
    Floats,
    best_scale,
    exact_claims,
    exact_estimate,
    exact_sweep,
    pearson,
)
from mallowspo_cli.experiments.estimator.ranking_model import (
    PAIRS_PER_PROMPT,
    RANKINGS_PER_STEP,
    Measured,
    RankingPrompts,
    measure,
    train_model,
)


@dataclass(frozen=True)
class Settings:
    """What is run."""

    items: tuple[int, ...]
    """Items of a ranking in the exact part."""
    prompts: int
    model_items: int
    steps: int
    seeds: int
    seed: int
    """The first one: of the central rankings, the weights, the samples and the bootstrap."""


@dataclass(frozen=True)
class Findings:
    """What came of it."""

    results: dict[str, Any]
    claims: list[Claim]
    exact: list[dict[str, Any]]
    """A row for each number of items and theta."""
    prompts: list[dict[str, Any]]
    """A row for each seed and prompt of the transformer part."""


def run_experiment(settings: Settings) -> Findings:
    """Both parts; the second trains `settings.seeds` models, one after another, on the CPU."""
    sweeps = [exact_sweep(num_items, settings.seed) for num_items in settings.items]
    theta = np.linspace(LOWEST_THETA, HIGHEST_THETA, settings.prompts)
    exact = exact_estimate(theta, settings.model_items)
    runs, rows = [], []
    for seed in range(settings.seed, settings.seed + settings.seeds):
        prompts = RankingPrompts.draw(theta, settings.model_items, seed)
        found = measure(train_model(prompts, settings.steps, seed), prompts, seed)
        runs.append(compare(theta, exact, found, seed))
        rows += _prompt_rows(seed, theta, exact, found)
        log.info("seed %d: r = %.4f", seed, runs[-1]["correlation"]["value"])
    results = {
        "settings": asdict(settings)
        | {"rankings_per_step": RANKINGS_PER_STEP, "pairs_per_prompt": PAIRS_PER_PROMPT},
        "exact": [sweep.summary for sweep in sweeps],
        "transformer": {
            "vocab_size": settings.model_items + settings.prompts,
            "exact": _of_exact(theta, exact, settings.seed),
            "seeds": runs,
            "over_seeds": over_seeds(runs),
            "over_seeds_by_prompt": [
                vars(t_estimate([row["estimate"] for row in rows if row["theta"] == value]))
                for value in theta.tolist()
            ],
        },
    }
    claims = [*exact_claims(sweeps, settings.seed), transformer_claim(settings, runs)]
    results["claims"] = [claim.row() for claim in claims]
    return Findings(results, claims, [row for sweep in sweeps for row in sweep.rows()], rows)


def compare(theta: Floats, exact: Floats, found: Measured, seed: int) -> dict[str, Any]:
    """One model's estimates of P prompts against the truth and the exact conditionals' estimates.

    Intervals are bootstraps over the prompts.
    """
    off = found.estimate - exact
    places = range(len(theta))
    return {
        "seed": seed,
        "correlation": vars(pearson(theta, found.estimate, seed)),
        "spearman": vars(spearman(theta, found.estimate, places, seed)),
        "correlation_vocab": vars(pearson(theta, found.estimate_vocab, seed)),
        "correlation_with_exact": vars(pearson(exact, found.estimate, seed)),
        "phi_star": best_scale(theta, found.estimate),
        "phi_star_vocab": best_scale(theta, found.estimate_vocab),
        "mean_model_error": float(off.mean()),
        "model_error": float(np.sqrt((off**2).mean())),
        "largest_model_error": float(np.abs(off).max()),
        "theta_of_largest_error": float(theta[np.abs(off).argmax()]),
        "excess_nats_per_token": float(found.excess.mean()),
        "clamped_pairs": found.clamped,
    }


OVER_SEEDS = (
    *("correlation", "spearman", "correlation_vocab", "correlation_with_exact"),
    *("phi_star", "phi_star_vocab", "mean_model_error", "model_error"),
    *("largest_model_error", "excess_nats_per_token"),
)


def over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over training seeds with Student-t intervals."""
    return {name: vars(t_estimate([_value(run[name]) for run in runs])) for name in OVER_SEEDS}


def _value(entry: Any) -> float:
    return entry["value"] if isinstance(entry, dict) else entry


def transformer_claim(settings: Settings, runs: Sequence[dict[str, Any]]) -> Claim:
    """Whether the correlation through a trained model is above FOLLOWS, over its seeds."""
    return Claim(
        "the estimate follows the true -log phi through a trained transformer, rankings of "
        f"{settings.model_items} items",
        f"correlation over {settings.prompts} prompts, minus {FOLLOWS}, mean over seeds",
        t_estimate([run["correlation"]["value"] - FOLLOWS for run in runs]),
    )


def _of_exact(theta: Floats, exact: Floats, seed: int) -> dict[str, Any]:
    """What a perfect model would give for these prompts."""
    scale = best_scale(theta, exact)
    return {
        "correlation": vars(pearson(theta, exact, seed)),
        "phi_star": scale,
        "by_prompt": [
            {"theta": t, "estimate": e} for t, e in zip(theta.tolist(), exact.tolist(), strict=True)
        ],
        "error_of_line": float(np.sqrt(((exact - theta / scale) ** 2).mean())),
    }


def _prompt_rows(seed: int, theta: Floats, exact: Floats, found: Measured) -> list[dict[str, Any]]:
    columns = {
        "theta": theta,
        "exact": exact,
        "estimate": found.estimate,
        "estimate_error": found.estimate_error,
        "estimate_vocab": found.estimate_vocab,
        "excess_nats_per_token": found.excess,
    }
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [
        {"seed": seed, "prompt": prompt, **dict(zip(columns, row, strict=True))}
        for prompt, row in enumerate(values)
    ]
