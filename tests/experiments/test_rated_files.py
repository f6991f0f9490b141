"""Rated texts as preference data: which text is chosen, what is held out, what raters say."""

import json
from pathlib import Path

import numpy as np
import pytest

from mallowspo_cli.data.dataset import load_pairs
from mallowspo_cli.errors import DataError
from mallowspo_cli.experiments import rated_files, rated_texts
from mallowspo_cli.experiments.rated_files import prompt_of, rated_path, write_rated
from mallowspo_cli.experiments.rated_pairs import LENGTH_RATIO, human_phi, probability_above
from mallowspo_cli.experiments.rated_texts import CORPORA, fetch_corpora, read_corpus
from mallowspo_cli.files import sha256
from mallowspo_cli.recipe.schema import DatasetConfig
from tests.experiments.test_human_dispersion import made_up, write_archive

NAME = "rated:movies"


@pytest.fixture(autouse=True)
def fake_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own with made-up corpora."""
    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "corpora" / "vaderSentiment-3.3.2.tar.gz"
    rows = {corpus.stem: made_up(120, seed) for seed, corpus in enumerate(CORPORA.values())}
    monkeypatch.setattr(rated_texts, "SHA256", sha256(write_archive(place, rows)))
    # Pairs of each corpus: 40 to 60.
    monkeypatch.setattr(rated_files, "HELD_OUT", 10)


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_chosen_text_is_the_one_rated_above_and_theta_is_the_raters() -> None:
    place = write_rated(NAME, 20)
    corpus = read_corpus(fetch_corpora(), CORPORA["movies"].stem)
    config = DatasetConfig(path=str(place), format="scored")
    rows, pairs = rows_of(place / "train.jsonl"), load_pairs(config, "train")
    assert len(pairs) == len(rows) == 20
    for row, pair in zip(rows, pairs, strict=True):
        better, worse = (corpus.texts.index(text) for text in row["responses"])
        above = probability_above(corpus.counts[[better]], corpus.counts[[worse]])
        assert row["scores"] == pytest.approx([above[0], 1 - above[0]])
        assert above[0] > 0.5
        assert (pair.chosen.content, pair.rejected.content) == tuple(row["responses"])
        assert [turn.content for turn in pair.prompt] == [prompt_of(NAME)]
        phi = max(float(human_phi(above)[0]), 1e-6)
        assert np.exp(-pair.rater_neg_log_phi) == pytest.approx(phi, rel=1e-5)


def test_no_text_is_in_two_pairs_and_held_out_pairs_do_not_depend_on_the_rest() -> None:
    place = write_rated(NAME, 20)
    rows = {name: rows_of(place / f"{name}.jsonl") for name in ("train", "eval")}
    assert {name: len(found) for name, found in rows.items()} == {"train": 20, "eval": 10}
    texts = [text for found in rows.values() for row in found for text in row["responses"]]
    assert len(set(texts)) == len(texts) == 60
    alone = write_rated(NAME, 0)
    assert not (alone / "train.jsonl").exists()
    assert rows_of(alone / "eval.jsonl") == rows["eval"]
    assert rows_of(write_rated(NAME, 5) / "train.jsonl") == rows["train"][:5]


def test_texts_of_a_pair_are_of_like_length() -> None:
    rows = rows_of(write_rated(NAME, 30) / "train.jsonl")
    for row in rows:
        short, long = sorted(map(len, row["responses"]))
        assert long <= short * LENGTH_RATIO
    first = [len(row["responses"][0]) for row in rows]
    # In random order, not by length.
    assert first != sorted(first)


def test_the_same_arguments_are_the_same_files() -> None:
    place = write_rated(NAME, 4)
    assert place == rated_path(NAME, 4)
    before = (place / "eval.jsonl").stat().st_mtime_ns
    assert write_rated(NAME, 4) == place
    assert (place / "eval.jsonl").stat().st_mtime_ns == before
    others = {rated_path("rated:tweets", 4), rated_path(NAME, 4, 30), rated_path(NAME, 5)}
    assert place not in others
    assert len(others) == 3


def test_longer_texts_are_left_out_and_too_few_pairs_are_told() -> None:
    short = rows_of(write_rated(NAME, 0, max_chars=30) / "eval.jsonl")
    assert max(len(text) for row in short for text in row["responses"]) <= 30
    # A third of what there is, where that is less than HELD_OUT.
    assert 2 <= len(short) < 10
    with pytest.raises(DataError, match=r"of at most 16 characters, too few to hold some .*max_ch"):
        write_rated(NAME, 0, max_chars=16)


def test_documents_are_held_out_whole_and_pairs_are_of_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "cache" / "corpora" / "vaderSentiment-3.3.2.tar.gz"
    rows = {corpus.stem: made_up(240, seed) for seed, corpus in enumerate(CORPORA.values())}
    archive = write_archive(place, rows, sentences=12)
    monkeypatch.setattr(rated_texts, "SHA256", sha256(archive))
    corpus = read_corpus(archive, CORPORA["products"].stem)
    assert corpus.documents == [str(i // 12) for i in range(240)]
    of = dict(zip(corpus.texts, corpus.documents, strict=True))
    place = write_rated("rated:products", 1000)
    sides = {name: rows_of(place / f"{name}.jsonl") for name in ("train", "eval")}
    for found in sides.values():
        for row in found:
            assert {of[text] for text in row["responses"]} == {str(row["document"])}
    held_out, trained = ({row["document"] for row in found} for found in sides.values())
    assert not held_out & trained
    assert len(sides["eval"]) >= 10
    assert len(held_out) > 1
