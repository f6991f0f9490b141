"""Preference pairs out of texts that people rated, as files that the data loader reads.

For machines that reach a package index and no hub: the corpora of `rated_texts`, each a domain of
its own (film reviews, product reviews, tweets, editorials), so that a model trained on one can be
evaluated on another. The prompt asks for a positive text, and the chosen one is the text of which a
random rating is more likely above a random rating of the other. So what is preferred is the same
everywhere, by the same scale of the same study, and only the texts differ. Texts of a pair are of
like length, which keeps length from being the signal. Beside that they are joined at random, so
raters agree on most pairs (60 % of the film reviews' have a Mallows phi below 0.2) and not on all.

Product reviews and editorials are documents of several texts, whose ratings are alike. Both texts
of a pair are then of one document, and a document is held out whole: it is what is resampled.
"""

import hashlib
import json
from collections import Counter
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
    "like length, and each text is in one pair at most. Pairs of product reviews and of editorials "
    "are two sentences of one document, but for a few where max_chars left a document one; no "
    "document is both trained on and held out."
)
DOCUMENT: Final = "document"
"""Column with the number of a pair's document."""
HELD_OUT: Final = 500
"""Pairs that are held out, or a third of them where there are fewer than three times as many."""
VERSION: Final = 2
"""Of the files' content; part of their place."""
SEED: Final = 0
"""Of the draw: the pairs are the same for all runs."""


def rated_path(name: str, train: int, max_chars: int | None = None) -> Path:
    """Where `write_rated` puts the files of these arguments; nothing is fetched."""
    made_of = [VERSION, rated_texts.SHA256, prompt_of(name), SEED, train, max_chars]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    return cache_directory() / "corpora" / "rated_pairs" / f"{name.removeprefix(PREFIX)}-{digest}"


def write_rated(name: str, train: int, max_chars: int | None = None) -> Path:
    """A directory with eval.jsonl (the held-out pairs) and, unless `train` is 0, train.jsonl.

    Rows are of the layout `scored`: prompt, two responses, scores (the probability to be rated
    above the other), and in rater_scores every pair of a rating of one and a rating of the other,
    whose Mallows phi is that of the raters (`human_dispersion`); `document` is a number. Where the
    corpus runs out of texts there are fewer training pairs. Held-out pairs do not depend on
    `train`, nor training pairs on how many are scored.

    Args:
        name: one of NAMES.
        max_chars: longer texts are left out.

    Raises:
        DataError: the corpora cannot be fetched or read, or give too few pairs.
    """
    place = rated_path(name, train, max_chars)
    if place.is_dir():
        return place
    corpus = read_corpus(fetch_corpora(), CORPORA[name.removeprefix(PREFIX)].stem)
    held_out, rest = _split(_rows(corpus, prompt_of(name), max_chars))
    if len(held_out) < 2 or not rest:
        limit = "" if max_chars is None else f" of at most {max_chars} characters"
        raise DataError(
            f"{name} gives {len(held_out) + len(rest)} pairs of texts{limit}, too few to hold some "
            "out. Raise max_chars."
        )
    kept = rest[:train]
    if len(kept) < train:
        log.info("%s: %d training pairs, not %d: its texts ran out", name, len(kept), train)
    with whole_directory(place) as target:
        _write(target / "eval.jsonl", held_out)
        if train:
            _write(target / "train.jsonl", kept)
    return place


def prompt_of(name: str) -> str:
    """The prompt of all pairs of a corpus, one of NAMES."""
    return f"{CORPORA[name.removeprefix(PREFIX)].wordings[0]} {WISH}"


def _rows(corpus: RatedTexts, prompt: str, max_chars: int | None) -> list[dict[str, Any]]:
    """All pairs in a random order that depends on the texts alone, each text in one at most.

    Left out are those in which neither text is rated above the other.
    """
    generator = np.random.default_rng(SEED)
    pairs = np.asarray(_joined(corpus, max_chars, generator), np.int64).reshape(-1, 2)
    above = probability_above(corpus.counts[pairs[:, 0]], corpus.counts[pairs[:, 1]])
    documents = {name: number for number, name in enumerate(dict.fromkeys(corpus.documents))}
    rows = []
    for index in generator.permutation(np.flatnonzero(above != 0.5)):
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
                # Of two documents of one text each, one stands for both: they are in no other pair.
                DOCUMENT: documents[corpus.documents[first]],
            }
        )
    return rows


def _joined(
    corpus: RatedTexts, max_chars: int | None, generator: np.random.Generator
) -> list[tuple[int, int]]:
    """Neighbours by length, equal lengths in random order, whose lengths differ by a tenth at most.

    Within a document; documents of one text are joined with each other.
    """
    lengths = np.asarray([len(text) for text in corpus.texts])
    shuffled = generator.permutation(len(lengths))
    kept = shuffled if max_chars is None else shuffled[lengths[shuffled] <= max_chars]
    _, document, texts = np.unique(
        np.asarray(corpus.documents)[kept], return_inverse=True, return_counts=True
    )
    group = np.where(texts[document] > 1, document, -1)
    order = np.lexsort((lengths[kept], group))
    ordered, group = kept[order], group[order]
    found, place = [], 0
    while place + 1 < len(ordered):
        first, second = int(ordered[place]), int(ordered[place + 1])
        alike = lengths[second] <= lengths[first] * LENGTH_RATIO
        if alike and group[place] == group[place + 1]:
            found.append((first, second))
            place += 1
        place += 1
    return found


def _split(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(held out, rest): documents, whole and in random order, until they have enough pairs."""
    sizes = Counter(row[DOCUMENT] for row in rows)
    wanted, held, size = min(HELD_OUT, len(rows) // 3), set[int](), 0
    # By their numbers, not by the rows: there the larger ones come first.
    for document in np.random.default_rng(SEED).permutation(sorted(sizes)).tolist():
        if size >= wanted:
            break
        held.add(document)
        size += sizes[document]
    inside = [row for row in rows if row[DOCUMENT] in held]
    return inside, [row for row in rows if row[DOCUMENT] not in held]


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
