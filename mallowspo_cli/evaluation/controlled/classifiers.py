"""Classifiers that say how positive a text is."""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from scipy.special import logsumexp
from scipy.stats import binomtest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from mallowspo_cli.distributed import log
from mallowspo_cli.errors import EvalError, ModelError, first_line
from mallowspo_cli.evaluation.controlled.reviews import Reviews, split_reviews
from mallowspo_cli.files import cache_directory, make_directory, whole_file
from mallowspo_cli.reference.fingerprint import weights_digest

Floats = NDArray[np.float64]
VERSION = 1
"""Of the cached files."""
FEATURES: dict[str, Any] = {
    "ngram_range": (1, 2),
    "max_features": 50_000,
    "sublinear_tf": True,
}
LEAST_TEXTS, SMALL = 3, 1000
"""A term counts that is in so many texts; or in any, where there are fewer reviews than SMALL."""
SHORT_WORDS = 40
"""Held-out reviews are also scored by so many first words: samples are short, and harder."""
BATCH_TEXTS = 32


class Classifier(Protocol):
    """What says how positive a text is."""

    about: dict[str, Any]
    """What it is and how well it does, in plain values."""

    def log_odds(self, texts: Sequence[str]) -> Floats:
        """(N,) ln p / (1 - p) of positive."""
        ...


class TfidfClassifier:
    """Logistic regression on TF-IDF weights of words and of neighbouring pairs of words."""

    def __init__(self, terms: list[str], idf: Floats, weights: Floats, about: dict[str, Any]):
        """`idf` (V,) and `weights` (V + 1,), the last of which is added to every text."""
        self.terms, self.idf, self.weights, self.about = terms, idf, weights, about
        self._vectorizer = TfidfVectorizer(**FEATURES, vocabulary=terms)
        self._vectorizer.idf_ = idf

    def log_odds(self, texts: Sequence[str]) -> Floats:
        """(N,) ln p / (1 - p) of positive."""
        found: Any = self._vectorizer.transform(texts)
        return found @ self.weights[:-1] + self.weights[-1]


def tfidf_classifier(reviews: Reviews) -> TfidfClassifier:
    """The classifier of these reviews, from the cache or fitted now (about half a minute)."""
    settings = json.dumps([VERSION, FEATURES, LEAST_TEXTS, SHORT_WORDS, reviews.digest()])
    key = hashlib.blake2b(settings.encode(), digest_size=12).hexdigest()
    place = cache_directory() / "classifiers" / f"tfidf-{key}.npz"
    if place.is_file():
        try:
            return _read(place)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            log.info("%s is damaged (%s) and is fitted again", place, first_line(error))
    fitted = fit_tfidf(reviews)
    make_directory(place.parent, "the classifier")
    arrays = {
        "terms": _bytes("\n".join(fitted.terms)),
        "about": _bytes(json.dumps(fitted.about)),
        "idf": fitted.idf,
        "weights": fitted.weights,
    }
    with whole_file(place) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(handle, **arrays)
    return fitted


def fit_tfidf(reviews: Reviews) -> TfidfClassifier:
    """Fit on one part of the reviews, and measure on the other.

    Raises:
        EvalError: they have no words.
    """
    fitted, held_out = split_reviews(reviews)
    log.info("fitting the classifier on %d of %s", len(fitted), reviews.name)
    least = LEAST_TEXTS if len(reviews.texts) >= SMALL else 1
    vectorizer = TfidfVectorizer(**FEATURES, min_df=least)
    try:
        rows = vectorizer.fit_transform([reviews.texts[i] for i in fitted])
    except ValueError as error:
        raise EvalError(f"no classifier of {reviews.name}: {first_line(error)}.") from error
    model = LogisticRegression(max_iter=1000).fit(rows, [reviews.labels[i] for i in fitted])
    found = TfidfClassifier(
        vectorizer.get_feature_names_out().tolist(),
        np.asarray(vectorizer.idf_, dtype=np.float64),
        np.append(model.coef_[0], model.intercept_[0]),
        {},
    )
    texts, labels = [reviews.texts[i] for i in held_out], [reviews.labels[i] for i in held_out]
    found.about = {
        "name": "tfidf",
        "kind": "TF-IDF of words and pairs of words, logistic regression "
        f"(scikit-learn {sklearn.__version__})",
        "reviews": reviews.name,
        "fitted_on": len(fitted),
        **accuracy(found, texts, labels),
    }
    return found


def accuracy(classifier: Classifier, texts: Sequence[str], labels: Sequence[int]) -> dict[str, Any]:
    """Share of texts, whole and by their first words, whose label is found; 95 % intervals (exact,
    Clopper and Pearson)."""
    starts = [" ".join(text.split()[:SHORT_WORDS]) for text in texts]
    found: dict[str, Any] = {"held_out": len(texts), "short_words": SHORT_WORDS}
    for name, given in (("accuracy", texts), ("accuracy_short", starts)):
        right = int(((classifier.log_odds(given) > 0) == np.asarray(labels, dtype=bool)).sum())
        interval = binomtest(right, len(texts)).proportion_ci()
        found[name] = right / len(texts)
        found[f"{name}_low"], found[f"{name}_high"] = float(interval.low), float(interval.high)
    return found


def _read(place: Path) -> TfidfClassifier:
    with place.open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
        terms, about = (stored[name].tobytes().decode() for name in ("terms", "about"))
        idf, weights = stored["idf"], stored["weights"]
    names = terms.split("\n")
    if not len(names) == len(idf) == len(weights) - 1:
        raise ValueError("its arrays do not fit each other")
    return TfidfClassifier(names, idf, weights, json.loads(about))


def _bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), dtype=np.uint8)


@dataclass
class TransformersClassifier:
    """A sequence classifier of transformers."""

    model: Any
    tokenizer: Any
    positive: int
    """Which of its labels is meant."""
    about: dict[str, Any]

    @classmethod
    def load(
        cls, directory: Path, name: str, device: torch.device, label: str | None = None
    ) -> "TransformersClassifier":
        """The classifier in a directory; safetensors only, no code of the model's own.

        Args:
            label: name of the positive label; None finds the one that begins with `pos`.

        Raises:
            ModelError: it does not load, or is no classifier.
            EvalError: which of its labels is positive is not known.
        """
        try:
            config = AutoConfig.from_pretrained(directory)
            tokenizer = AutoTokenizer.from_pretrained(directory)
            model, info = AutoModelForSequenceClassification.from_pretrained(  # type: ignore[misc]
                directory, use_safetensors=True, output_loading_info=True, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"cannot load the classifier {name}: {first_line(error)}") from error
        if missing := sorted(info["missing_keys"]):
            raise ModelError(
                f"{name} is no sequence classifier: its weights lack {', '.join(missing[:3])}."
            )
        labels = {int(index): str(text) for index, text in (config.id2label or {}).items()}
        place = _positive(labels, name, label)
        about = {
            "name": name,
            "kind": type(model).__name__,
            "positive_label": labels[place],
            "weights": weights_digest(directory),
        }
        return cls(model.to(device).eval(), tokenizer, place, about)

    @torch.inference_mode()
    def log_odds(self, texts: Sequence[str]) -> Floats:
        """(N,) ln p / (1 - p) of positive; texts are cut at the model's longest input."""
        config, limit = self.model.config, self.tokenizer.model_max_length
        limit = min(limit, getattr(config, "max_position_embeddings", None) or limit)
        # Rows of different lengths need a padding token, in models that read the last one as well.
        padded = None not in (self.tokenizer.pad_token_id, config.pad_token_id)
        size = BATCH_TEXTS if padded else 1
        found = [np.empty(0)]
        for start in range(0, len(texts), size):
            batch = self.tokenizer(
                list(texts[start : start + size]),
                return_tensors="pt",
                padding=size > 1,
                truncation=True,
                max_length=limit,
            )
            logits = self.model(**batch.to(self.model.device)).logits.double().cpu().numpy()
            others = np.delete(logits, self.positive, axis=1)
            found.append(logits[:, self.positive] - logsumexp(others, axis=1))
        return np.concatenate(found)


def _positive(labels: dict[int, str], name: str, label: str | None) -> int:
    wanted = [
        index
        for index, text in labels.items()
        if (text == label if label is not None else text.lower().startswith("pos"))
    ]
    if len(wanted) != 1 or len(labels) < 2:
        told = f"positive={label}" if label is not None else "no positive= was given"
        raise EvalError(
            f"{name} has the labels {', '.join(labels.values())}, and {told}. Name one of several: "
            "positive=LABEL."
        )
    return wanted[0]
