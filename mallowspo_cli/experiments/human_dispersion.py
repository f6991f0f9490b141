"""Does token entropy measure human disagreement? The data, the pairs and the statistics.

MallowsPO takes a reference model's token entropy for the dispersion phi(x) of a prompt. Here people
say what phi is: the four corpora of Hutto and Gilbert (VADER, ICWSM 2014), short texts that some 15
to 99 people each rated from -4 (negative) to 4 (positive), with every single rating.

Two texts of one corpus are the two responses to a prompt. p is the probability that a random rating
of one is above a random rating of the other, ties half, and phi_human = min(p, 1 - p) /
max(p, 1 - p) is the maximum-likelihood Mallows phi of two responses (`raters.neg_log_phi`). Ratings
are compared across raters, not within: the published lists do not say who rated, and position in
them marks a rater among neighbouring rows of the movie corpus alone (`position_correlation`).

The texts answer no prompt, so each corpus gets a neutral one of ours, and another wording of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mallowspo_cli.data.pairs import Message, PreferencePair
from mallowspo_cli.data.tokenize import tokenize_pairs
from mallowspo_cli.dispersion import normalised_entropy
from mallowspo_cli.distributed import log
from mallowspo_cli.errors import DataError
from mallowspo_cli.experiments.correlations import (
    PAIR_MEASURES,
    RESAMPLES,
    TEXT_MEASURES,
    correlate,
    shuffled_control,
)
from mallowspo_cli.experiments.rated_pairs import RatedPairs, draw_pairs, reliability
from mallowspo_cli.experiments.rated_texts import (
    CORPORA,
    PACKAGE,
    SCALE,
    VERSION,
    Floats,
    RatedTexts,
    fetch_corpora,
    position_correlation,
    read_corpus,
)
from mallowspo_cli.files import sha256
from mallowspo_cli.models.load import load_tokenizer, model_directory
from mallowspo_cli.recipe.schema import DatasetConfig, Recipe
from mallowspo_cli.reference.build import complete_store, open_store


@dataclass(frozen=True)
class Estimates:
    """What the reference model says of P pairs, (P,) each."""

    entropy: Floats
    """Normalised entropy: the estimate of phi(x). -ln of it is the weight, before its scale."""
    better_entropy: Floats
    """Nats per token of the better text alone."""
    worse_entropy: Floats
    better_tokens: Floats
    worse_tokens: Floats
    margin: Floats
    """Absolute difference of the two texts' mean log-probs, nats per token."""


def run_experiment(
    names: Sequence[str], num_pairs: int, recipe: Recipe, device: torch.device, seed: int
) -> dict[str, Any]:
    """Draw, score and correlate; returns the report as plain values.

    Args:
        names: keys of CORPORA.
        num_pairs: pairs drawn from each corpus, or fewer where its texts run out.
        recipe: its model is the reference; its `reference` and `train.precision` apply.
        device: where the reference pass runs.
        seed: of the draw, the bootstrap and the shuffled control.

    Raises:
        DataError: the corpora cannot be fetched or read, or give too few pairs.
        ModelError: the model cannot be fetched, loaded or scored.
    """
    archive = fetch_corpora()
    corpora, drawn = {}, {}
    for name in names:
        corpora[name] = read_corpus(archive, CORPORA[name].stem)
        drawn[name] = draw_pairs(corpora[name], num_pairs, seed)
        found = len(drawn[name].phi)
        log.info("%s: %d pairs of %d texts", name, found, len(corpora[name].texts))
        for cause, count in corpora[name].losses.items():
            log.info("  %d of %d texts left out: %s", count, corpora[name].read, cause)
        if found < num_pairs:
            log.info("  %d pairs asked for, but texts of like length ran out", num_pairs)
    first, second = (
        {
            name: score(corpora[name], drawn[name], CORPORA[name].wordings[k], recipe, device)
            for name in names
        }
        for k in (0, 1)
    )
    groups = {name: pair_columns(drawn[name].phi, first[name], second[name]) for name in names}
    singles = {name: text_columns(corpora[name], drawn[name], first[name]) for name in names}
    populations = {name: [name] for name in names}
    if len(names) > 1:
        populations["pooled"] = list(names)
    return {
        "data": {"package": f"{PACKAGE}=={VERSION}", "sha256": sha256(archive)},
        "model": recipe.model.source,
        "precision": recipe.train.precision.value,
        "seed": seed,
        "resamples": RESAMPLES,
        "corpora": {
            name: {
                "rows": corpora[name].read,
                "texts": len(corpora[name].texts),
                "left_out": dict(corpora[name].losses),
                "pairs": len(drawn[name].phi),
                "pairs_by_phi": drawn[name].strata,
                "prompts": list(CORPORA[name].wordings),
                "position_correlation": position_correlation(corpora[name].ratings),
                "position_correlation_100_apart": position_correlation(
                    corpora[name].ratings, apart=100
                ),
                "reliability_of_phi": reliability(corpora[name], drawn[name], seed),
                **_means(first[name]),
            }
            for name in names
        },
        "correlations": {
            population: {
                **correlate([groups[name] for name in members], PAIR_MEASURES, seed),
                "shuffled": shuffled_control([groups[name] for name in members], seed),
                **correlate([singles[name] for name in members], TEXT_MEASURES, seed),
            }
            for population, members in populations.items()
        },
    }


def score(
    corpus: RatedTexts, pairs: RatedPairs, prompt: str, recipe: Recipe, device: torch.device
) -> Estimates:
    """The reference's view of the pairs, by the path that training takes."""
    question = (Message("user", prompt),)
    rows = [
        PreferencePair(
            question,
            Message("assistant", corpus.texts[better]),
            Message("assistant", corpus.texts[worse]),
            f"texts {better} and {worse}",
        )
        for better, worse in zip(pairs.better, pairs.worse, strict=True)
    ]
    directory = model_directory(recipe.model)
    tokenizer = load_tokenizer(directory, recipe.model.chat_template)
    tokenized = tokenize_pairs(rows, tokenizer, DatasetConfig(path=PACKAGE))
    if len(tokenized) != len(rows):
        causes = "; ".join(f"{count} {cause}" for cause, count in tokenized.losses.items())
        raise DataError(f"this model's tokenizer does not keep all {len(rows)} pairs: {causes}.")
    precision = recipe.train.precision
    store = open_store(directory, recipe.model, recipe.reference, precision)
    pack_tokens = recipe.reference.pack_tokens
    complete_store(store, tokenized, directory, recipe.model, precision, pack_tokens, device)
    found = store.lookup(tokenized.pair_ids)
    entropy = normalised_entropy(
        found.chosen_entropy_sum,
        found.chosen_tokens,
        found.rejected_entropy_sum,
        found.rejected_tokens,
        store.vocab_size,
    )
    better_tokens, worse_tokens = found.chosen_tokens.double(), found.rejected_tokens.double()
    margin = found.chosen_logp / better_tokens - found.rejected_logp / worse_tokens
    return Estimates(
        entropy=entropy.double().numpy(),
        better_entropy=(found.chosen_entropy_sum / better_tokens).numpy(),
        worse_entropy=(found.rejected_entropy_sum / worse_tokens).numpy(),
        better_tokens=better_tokens.numpy(),
        worse_tokens=worse_tokens.numpy(),
        margin=margin.abs().numpy(),
    )


def _means(estimates: Estimates) -> dict[str, float]:
    tokens = np.concatenate([estimates.better_tokens, estimates.worse_tokens])
    entropy = np.concatenate([estimates.better_entropy, estimates.worse_entropy])
    return {
        "tokens_per_text": float(tokens.mean()),
        "nats_per_token": float(entropy.mean()),
        "neg_log_entropy_mean": float(-np.log(estimates.entropy).mean()),
        "neg_log_entropy_deviation": float(np.log(estimates.entropy).std()),
    }


def pair_columns(phi: Floats, first: Estimates, second: Estimates) -> Floats:
    """(P, 6), in the order of PAIR_MEASURES: phi_human, entropy by both wordings, mean length in
    tokens, share by which the lengths differ, absolute log-prob margin.
    """
    total = first.better_tokens + first.worse_tokens
    gap = np.abs(first.better_tokens - first.worse_tokens) / total
    return np.stack([phi, first.entropy, second.entropy, total / 2, gap, first.margin], axis=1)


def text_columns(corpus: RatedTexts, pairs: RatedPairs, estimates: Estimates) -> Floats:
    """(2P, 3), a row for each text: standard deviation of its ratings, nats per token, tokens."""
    texts = np.concatenate([pairs.better, pairs.worse])
    share = corpus.counts[texts] / corpus.counts[texts].sum(axis=1, keepdims=True)
    steps = np.asarray(SCALE, dtype=np.float64)
    mean = share @ steps
    deviation = np.sqrt(np.maximum(share @ steps**2 - mean**2, 0))
    entropy = np.concatenate([estimates.better_entropy, estimates.worse_entropy])
    tokens = np.concatenate([estimates.better_tokens, estimates.worse_tokens])
    return np.stack([deviation, entropy, tokens], axis=1)
