"""Preference pairs out of texts that people rated, as files that the data loader reads.

For machines that reach a package index and no hub: the corpora of `rated_texts`, each a domain of
its own (film reviews, product reviews, tweets, editorials), so that a model trained on one can be
evaluated on another. The prompt asks for a positive text, and the chosen one is the text of which a
random rating is more likely above a random rating of the other. So what is preferred is the same
everywhere, by the same scale of the same study, and only the texts differ. Texts of a pair are of
like length, which keeps length from being the signal. Beside that they are joined at random, so
raters agree on most pairs (60 % of the film reviews' have a Mallows phi below 0.2) and not on all.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from mallowspo_cli.distributed import log
from mallowspo_cli.errors import DataError
from mallowspo_cli.experiments import rated_texts
from mallowspo_cli.experiments.rated_pairs import LENGTH_RATIO, probability_above
from mallowspo_cli.experiments.rated_texts import CORPORA, RatedTexts, fetch_corpora, read_corpus
from mallowspo_cli.files import cache_directory, whole_directory, write_text

PREFIX: Final = "rated:"
"""Of the corpora's names among data sets."""
NAMES: Final = tuple(f"{PREFIX}{name}" for name in CORPORA)
WISH: Final = "The more positive, the better."
"""After the corpus's prompt: what raters were asked is what the prompt asks for."""
MEANING: Final = (
    "The prompt asks for a text that is as positive as can be; the chosen text of a pair is the "
    "one that its raters more likely rated above the other. Raters judged sentiment, texts are of "
    "like length, and each text is in one pair at most."
)
VERSION: Final = 1
"""Of the files' content; part of their place."""
SEED: Final = 0
"""Of the draw: the pairs are the same for all runs."""


def rated_path(name: str, train: int, held_out: int, max_chars: int | None = None) -> Path:
    """Where `write_rated` puts the files of these arguments; nothing is fetched."""
    made_of = [VERSION, rated_texts.SHA256, prompt_of(name), SEED, train, held_out, max_chars]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    return cache_directory() / "corpora" / "rated_pairs" / f"{name.removeprefix(PREFIX)}-{digest}"


def write_rated(name: str, train: int, held_out: int, max_chars: int | None = None) -> Path:
    """A directory with eval.jsonl (`held_out` pairs) and, unless `train` is 0, train.jsonl.

    Rows are of the layout `scored`: prompt, two responses, scores (the probability to be rated
    above the other), and in rater_scores every pair of a rating of one and a rating of the other,
    whose Mallows phi is that of the raters (`human_dispersion`). Where the corpus runs out of texts
    there are fewer training pairs. Held-out pairs do not depend on `train`.

    Args:
        name: one of NAMES.
        max_chars: longer texts are left out.

    Raises:
        DataError: the corpora cannot be fetched or read, or give too few pairs.
    """
    place = rated_path(name, train, held_out, max_chars)
    if place.is_dir():
        return place
    corpus = read_corpus(fetch_corpora(), CORPORA[name.removeprefix(PREFIX)].stem)
    rows = _rows(corpus, prompt_of(name), max_chars)
    if len(rows) < held_out + min(train, 1):
        limit = "" if max_chars is None else f" of at most {max_chars} characters"
        raise DataError(
            f"{name} gives {len(rows)} pairs of texts{limit}, too few for {held_out} held-out pairs"
            f"{' and some to train on' if train else ''}. Lower eval.limit, or raise max_chars."
        )
    kept = rows[held_out : held_out + train]
    if len(kept) < train:
        log.info("%s: %d training pairs, not %d: its texts ran out", name, len(kept), train)
    with whole_directory(place) as target:
        _write(target / "eval.jsonl", rows[:held_out])
        if train:
            _write(target / "train.jsonl", kept)
    return place


def prompt_of(name: str) -> str:
    """The prompt of all pairs of a corpus, one of NAMES."""
    return f"{CORPORA[name.removeprefix(PREFIX)].wordings[0]} {WISH}"


def _rows(corpus: RatedTexts, prompt: str, max_chars: int | None) -> list[dict[str, Any]]:
    """All pairs in a random order that depends on the texts alone, each text in one at most.

    Neighbours by length are joined, equal lengths in random order. Pairs whose lengths differ by
    more than a tenth are left out, and those in which neither text is rated above the other.
    """
    generator = np.random.default_rng(SEED)
    lengths = np.asarray([len(text) for text in corpus.texts])
    shuffled = generator.permutation(len(lengths))
    kept = shuffled if max_chars is None else shuffled[lengths[shuffled] <= max_chars]
    ordered = kept[np.argsort(lengths[kept], kind="stable")]
    pairs = ordered[: len(ordered) // 2 * 2].reshape(-1, 2)
    short, long = lengths[pairs[:, 0]], lengths[pairs[:, 1]]
    above = probability_above(corpus.counts[pairs[:, 0]], corpus.counts[pairs[:, 1]])
    usable = np.flatnonzero((long <= short * LENGTH_RATIO) & (above != 0.5))
    rows = []
    for index in generator.permutation(usable):
        first, second = pairs[index] if above[index] > 0.5 else pairs[index][::-1]
        likely = float(max(above[index], 1 - above[index]))
        rows.append(
            {
                "prompt": prompt,
                "responses": [corpus.texts[first], corpus.texts[second]],
                "scores": [likely, 1 - likely],
                "rater_scores": [
                    [a, b] for a in corpus.ratings[first] for b in corpus.ratings[second]
                ],
            }
        )
    return rows


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
