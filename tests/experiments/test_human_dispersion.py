"""Raters' disagreement against token entropy: parsing, pairs, statistics, the whole command."""

import io
import json
import math
import tarfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, rankdata, spearmanr

from mallowspo_cli import package_index, raters
from mallowspo_cli.commands import experiment_human_dispersion
from mallowspo_cli.commands.experiment_human_dispersion import human_dispersion_words
from mallowspo_cli.errors import DataError, RecipeError
from mallowspo_cli.experiments import rated_texts
from mallowspo_cli.experiments.correlations import (
    PAIR_MEASURES,
    correlate,
    rank_matrix,
    shuffled_control,
)
from mallowspo_cli.experiments.human_dispersion import Estimates, pair_columns, text_columns
from mallowspo_cli.experiments.rated_pairs import (
    LENGTH_RATIO,
    draw_pairs,
    human_phi,
    probability_above,
    reliability,
)
from mallowspo_cli.experiments.rated_texts import (
    CORPORA,
    SCALE,
    RatedTexts,
    fetch_corpora,
    position_correlation,
    read_corpus,
)
from mallowspo_cli.files import sha256
from mallowspo_cli.models.sources import resolve_model

RATINGS = st.lists(st.integers(-4, 4), min_size=2, max_size=12)


def counts_of(ratings: list[int]) -> np.ndarray:
    return np.asarray([[ratings.count(step) for step in SCALE]], dtype=np.float64)


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_archive(
    path: Path, corpora: dict[str, list[tuple[str, list[int]]]], sentences: int = 1
) -> Path:
    """A source distribution whose inner archive holds made-up corpora in the published format.

    So many texts after another are `sentences` of one document.
    """
    files = {}
    for stem, rows in corpora.items():
        means = [sum(ratings) / len(ratings) for _, ratings in rows]
        texts = [
            f"{i // sentences}_{i % sentences + 1}\t{m:.9g}\t{t}"
            for i, ((t, _), m) in enumerate(zip(rows, means, strict=True))
        ]
        rated = [
            f"{i // sentences}_{i % sentences + 1}\t{m:.11g}\t{np.std(r):.5f}\t{r}"
            for i, ((_, r), m) in enumerate(zip(rows, means, strict=True))
        ]
        # As published: a byte order mark in some files, carriage returns, no newline at the end.
        files[f"hutto_ICWSM_2014/{stem}_GroundTruth.txt"] = "\r\n".join(texts).encode("utf-8-sig")
        files[f"hutto_ICWSM_2014/{stem}_anonDataRatings.txt"] = "\r\n".join(rated).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed({rated_texts.INNER_ARCHIVE: packed(files)}))
    return path


def made_up(num_texts: int, seed: int = 0, num_raters: int = 12) -> list[tuple[str, list[int]]]:
    """Texts of several lengths, with a sentiment and a spread of their own."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(num_texts):
        words = " ".join(["so"] * int(generator.integers(1, 9)))
        centre, spread = generator.uniform(-3, 3), generator.uniform(0.2, 2)
        drawn = np.clip(np.rint(generator.normal(centre, spread, num_raters)), -4, 4)
        rows.append((f"Thing {index} is {words} fine", [int(value) for value in drawn]))
    return rows


def rated(rows: list[tuple[str, list[int]]]) -> RatedTexts:
    counts = np.concatenate([counts_of(ratings) for _, ratings in rows])
    texts, ratings = [text for text, _ in rows], [r for _, r in rows]
    return RatedTexts(texts, ratings, counts, [str(i) for i in range(len(rows))], len(rows))


def estimates(num_pairs: int, seed: int = 0) -> Estimates:
    generator = np.random.default_rng(seed)
    columns = [generator.uniform(0.1, 0.9, num_pairs) for _ in range(6)]
    columns[3:5] = [generator.integers(3, 40, num_pairs).astype(np.float64) for _ in range(2)]
    return Estimates(*columns)


# Data


def test_every_row_is_read_or_counted(tmp_path: Path) -> None:
    good = [("One\u2028text", [1, 2, 3]), ("Two  &  texts ", [0, 0, -4]), ("Three", [4, 4])]
    archive = write_archive(tmp_path / "a.tar.gz", {"tweets": [*good, ("Three", [1, 1, 2])]})
    corpus = read_corpus(archive, "tweets")
    assert corpus.texts == ["One text", "Two & texts", "Three"]
    assert corpus.documents == ["0", "1", "2"]
    assert corpus.counts.sum(axis=1).tolist() == [3, 3, 2]
    assert corpus.counts[1].tolist() == [1, 0, 0, 0, 2, 0, 0, 0, 0]
    assert (corpus.read, dict(corpus.losses)) == (4, {"the same text again": 1})


@pytest.mark.parametrize(
    ("texts", "ratings", "cause"),
    [
        ("1\t2.5\tFine", "1\t2.0\t0\t[2, 2]", "its mean is not that of its ratings"),
        ("1\t2.0\tFine", "2\t2.0\t0\t[2, 2]", "cannot be read"),
        ("1\t2.0\tFine", "1\t2.0\t0\t[2, 5]", "cannot be read"),
        ("1\t2.0\tFine", "1\t2.0\t0\t[2]", "cannot be read"),
        ("1\t2.0\tFine", "1\t2.0\t0\t[2, 2", "cannot be read"),
        ("1\t2.0\tFine", "1\t2.0\t[2, 2]", "cannot be read"),
        ("1\t2.0\t ", "1\t2.0\t0\t[2, 2]", "cannot be read"),
        ("1\t2.0", "1\t2.0\t0\t[2, 2]", "cannot be read"),
        ("1\ttwo\tFine", "1\t2.0\t0\t[2, 2]", "its mean is not that of its ratings"),
    ],
)
def test_a_row_that_does_not_fit_is_left_out(
    tmp_path: Path, texts: str, ratings: str, cause: str
) -> None:
    files = {
        "hutto_ICWSM_2014/tweets_GroundTruth.txt": f"{texts}\r\n9\t1\tKept".encode(),
        "hutto_ICWSM_2014/tweets_anonDataRatings.txt": f"{ratings}\r\n9\t1\t0\t[1, 1]".encode(),
    }
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(packed({rated_texts.INNER_ARCHIVE: packed(files)}))
    corpus = read_corpus(archive, "tweets")
    assert corpus.texts == ["Kept"]
    assert dict(corpus.losses) == {cause: 1}


def test_an_archive_without_the_corpus_is_told_in_one_line(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "a.tar.gz", {"tweets": made_up(3)})
    with pytest.raises(DataError, match="cannot read hutto_ICWSM_2014/movies_anonDataRatings"):
        read_corpus(archive, "movies")
    archive.write_bytes(b"no archive")
    with pytest.raises(DataError, match="cannot read"):
        read_corpus(archive, "tweets")


def test_another_digest_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path))
    write_archive(tmp_path / "corpora" / "vaderSentiment-3.3.2.tar.gz", {"tweets": made_up(3)})
    with pytest.raises(DataError, match=r"expected 5d7c06e027fc8b99.*Not opened"):
        fetch_corpora()


def test_the_corpora_are_fetched_by_hash_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_archive(tmp_path / "source.tar.gz", {"tweets": made_up(3)})
    calls: list[list[str]] = []

    class Done:
        returncode, stderr = 0, ""

    def pip(command: list[str], **_options: object) -> Done:
        calls.append(command)
        requirement = Path(command[-1]).read_text(encoding="utf-8")
        assert requirement == f"vaderSentiment==3.3.2 --hash=sha256:{sha256(source)}\n"
        place = Path(command[command.index("--dest") + 1])
        (place / "vaderSentiment-3.3.2.tar.gz").write_bytes(source.read_bytes())
        return Done()

    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path))
    monkeypatch.setattr(rated_texts, "SHA256", sha256(source))
    monkeypatch.setattr(package_index.subprocess, "run", pip)
    assert fetch_corpora() == fetch_corpora() == tmp_path / "corpora/vaderSentiment-3.3.2.tar.gz"
    assert len(calls) == 1
    assert {"--require-hashes", "--no-deps"} <= set(calls[0])
    assert [file.name for file in (tmp_path / "corpora").iterdir()] == [fetch_corpora().name]


def test_pips_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        returncode, stderr = 1, "WARNING: x\nERROR: No matching distribution\n  more"

    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path))
    monkeypatch.setattr(package_index.subprocess, "run", lambda *_a, **_k: Failed())
    with pytest.raises(DataError, match=r"vaderSentiment==3.3.2: ERROR: No matching distribution$"):
        fetch_corpora()


# Pairs


@given(first=RATINGS, second=RATINGS)
def test_p_is_the_share_of_rating_pairs_above_ties_half(
    first: list[int], second: list[int]
) -> None:
    pairs = list(product(first, second))
    brute = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
    (p,) = probability_above(counts_of(first), counts_of(second))
    assert p == pytest.approx(brute, abs=1e-12)
    (back,) = probability_above(counts_of(second), counts_of(first))
    assert p + back == pytest.approx(1)


@given(first=RATINGS, second=RATINGS)
def test_phi_is_the_mallows_phi_of_every_pair_of_ratings(
    first: list[int], second: list[int]
) -> None:
    phi = human_phi(probability_above(counts_of(first), counts_of(second)))[0]
    theta = raters.neg_log_phi([list(map(float, pair)) for pair in product(first, second)])
    assert max(phi, 1e-6) == pytest.approx(math.exp(-theta), rel=1e-6)


def test_pairs_are_of_like_length_and_spread_over_phi_with_each_text_once() -> None:
    corpus = rated(made_up(600))
    pairs = draw_pairs(corpus, 100, seed=3)
    used = np.concatenate([pairs.better, pairs.worse])
    assert len(used) == len(set(used.tolist())) == 200
    assert pairs.strata == [20] * 5 == np.histogram(pairs.phi, 5, (0, 1))[0].tolist()
    lengths = np.asarray([len(text) for text in corpus.texts])
    ratio = lengths[pairs.better] / lengths[pairs.worse]
    assert np.abs(np.log(ratio)).max() <= math.log(LENGTH_RATIO) + 1e-12
    p = probability_above(corpus.counts[pairs.better], corpus.counts[pairs.worse])
    assert (p >= 0.5).all()
    assert human_phi(p) == pytest.approx(pairs.phi)


def test_the_draw_depends_on_the_seed_alone_and_a_smaller_one_is_its_beginning() -> None:
    corpus = rated(made_up(300))
    one, two, other = (draw_pairs(corpus, 50, seed) for seed in (1, 1, 2))
    assert one.better.tolist() == two.better.tolist()
    assert one.better.tolist() != other.better.tolist()
    fewer = draw_pairs(corpus, 20, 1)
    assert fewer.worse.tolist() == one.worse.tolist()[:20]


def test_a_stratum_that_runs_out_leaves_its_turns_to_the_others() -> None:
    # All texts are liked or disliked by all: phi is 0 or 1.
    rows = [(f"Text {index:03d}", [3, 3] if index % 2 else [-3, -3]) for index in range(40)]
    pairs = draw_pairs(rated(rows), 100, seed=0)
    assert len(pairs.phi) == 20
    assert pairs.strata == [10, 0, 0, 0, 10]


# Statistics


def test_one_group_gives_spearman_and_the_partial_rank_correlation() -> None:
    generator = np.random.default_rng(0)
    table = np.round(generator.normal(size=(80, 6)), 1)
    table[:, 3] += table[:, 0]
    table[:, 1] += table[:, 3]
    matrix = rank_matrix([table])
    assert matrix == pytest.approx(spearmanr(table).statistic, abs=1e-12)
    ranks = rankdata(table, axis=0)
    residuals = []
    for column in (0, 1):
        slope, shift = np.polyfit(ranks[:, 3], ranks[:, column], 1)
        residuals.append(ranks[:, column] - slope * ranks[:, 3] - shift)
    expected = pearsonr(*residuals).statistic
    assert PAIR_MEASURES["entropy_given_length"](matrix) == pytest.approx(expected, abs=1e-12)


def test_pooling_ranks_within_groups_hides_what_lies_between_them() -> None:
    generator = np.random.default_rng(1)
    groups = [generator.normal(size=(400, 2)) + 10 * shift for shift in range(4)]
    assert spearmanr(np.concatenate(groups)).statistic > 0.9
    assert abs(rank_matrix(groups)[0, 1]) < 0.1
    # Groups of one size: the mean of their own correlations.
    own = np.mean([spearmanr(group).statistic for group in groups])
    assert rank_matrix(groups)[0, 1] == pytest.approx(own, abs=1e-12)


def planted(rho: float, num_groups: int = 2, size: int = 250, seed: int = 0) -> list[np.ndarray]:
    """Tables whose first two columns are normal with correlation `rho`; the rest are noise."""
    generator = np.random.default_rng(seed)
    groups = []
    for _ in range(num_groups):
        table = generator.normal(size=(size, 6))
        table[:, 1] = rho * table[:, 0] + math.sqrt(1 - rho**2) * table[:, 1]
        groups.append(table)
    return groups


def test_a_planted_correlation_is_found_and_its_shuffled_control_is_not() -> None:
    groups = planted(0.4)
    found = correlate(groups, PAIR_MEASURES, seed=0, resamples=300)
    # Spearman's rho of normal variables with Pearson correlation r is 6 / pi asin(r / 2).
    truth = 6 / math.pi * math.asin(0.4 / 2)
    assert found["entropy"]["low"] < truth < found["entropy"]["high"]
    assert found["entropy"]["low"] > 0.2
    assert found["margin"]["low"] < 0 < found["margin"]["high"]
    control = shuffled_control(groups, seed=0, resamples=300)
    assert control["low"] < 0 < control["high"] < found["entropy"]["value"]
    assert abs(control["value"]) < 0.02
    assert control["p_value"] == pytest.approx(1 / 301)


def test_the_interval_is_as_wide_as_theory_says() -> None:
    found = correlate(planted(0.0, num_groups=4), PAIR_MEASURES, seed=0, resamples=600)["entropy"]
    # Without correlation the standard error of 1,000 ranks is 1 / sqrt(999).
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 / math.sqrt(999), rel=0.12)


def test_p_values_are_uniform_where_nothing_is_planted() -> None:
    values = [
        shuffled_control(planted(0.0, size=30, seed=s), seed=s, resamples=99)["p_value"]
        for s in range(60)
    ]
    assert 0.35 < np.mean(values) < 0.65
    assert 0 < np.mean(np.asarray(values) <= 0.2) < 0.4


def test_a_correlation_that_length_explains_vanishes_given_length() -> None:
    generator = np.random.default_rng(2)
    table = generator.normal(size=(2000, 6))
    table[:, 0] += 2 * table[:, 3]
    table[:, 1] += 2 * table[:, 3]
    matrix = rank_matrix([table])
    assert PAIR_MEASURES["entropy"](matrix) > 0.7
    assert abs(PAIR_MEASURES["entropy_given_length"](matrix)) < 0.08


def test_what_is_constant_has_no_correlation() -> None:
    table = np.ones((20, 6))
    table[:, 0] = np.arange(20)
    found = correlate([table], PAIR_MEASURES, seed=0, resamples=5)
    assert found["entropy"] == {"value": None, "low": None, "high": None}
    assert shuffled_control([table], seed=0)["p_value"] is None


def test_the_columns_are_what_the_measures_read() -> None:
    first, second = estimates(7, seed=1), estimates(7, seed=2)
    phi = np.linspace(0, 1, 7)
    table = pair_columns(phi, first, second)
    assert table[:, :3].T.tolist() == [c.tolist() for c in (phi, first.entropy, second.entropy)]
    assert table[2, 3] == (first.better_tokens[2] + first.worse_tokens[2]) / 2
    gap = abs(first.better_tokens[2] - first.worse_tokens[2]) / (2 * table[2, 3])
    assert table[2, 4] == pytest.approx(gap)
    assert table[:, 5].tolist() == first.margin.tolist()


def test_a_texts_row_holds_the_deviation_of_its_ratings() -> None:
    rows = made_up(40)
    corpus = rated(rows)
    pairs = draw_pairs(corpus, 6, seed=0)
    found = estimates(6)
    table = text_columns(corpus, pairs, found)
    assert table[:6, 0] == pytest.approx([np.std(rows[i][1]) for i in pairs.better])
    assert table[6:, 0] == pytest.approx([np.std(rows[i][1]) for i in pairs.worse])
    assert table[6:, 1].tolist() == found.worse_entropy.tolist()
    assert table[:6, 2].tolist() == found.better_tokens.tolist()


def test_reliability_grows_with_the_number_of_raters() -> None:
    few, many = (rated(made_up(400, num_raters=number)) for number in (4, 200))
    values = [reliability(corpus, draw_pairs(corpus, 100, 0), seed=0) for corpus in (few, many)]
    assert values[0] < values[1]
    assert 0.95 < values[1] <= 1


def test_position_marks_a_rater_where_lists_are_in_one_order() -> None:
    generator = np.random.default_rng(0)
    kindness = generator.normal(0, 1.5, 15)
    rows = [np.rint(kindness + generator.normal(0, 1, 15)).astype(int) for _ in range(200)]
    assert position_correlation([row.tolist() for row in rows]) > 0.4
    mixed = [generator.permutation(row).tolist() for row in rows]
    assert abs(position_correlation(mixed)) < 0.1
    assert position_correlation([[1, 1], [2, 3], [1, 2, 3]]) is None


# The command


@pytest.fixture
def fake_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own with made-up corpora and the tiny model, as the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path / "cache"))
    resolve_model("random:llama")
    place = tmp_path / "cache" / "corpora" / "vaderSentiment-3.3.2.tar.gz"
    rows = {corpus.stem: made_up(60, seed) for seed, corpus in enumerate(CORPORA.values())}
    monkeypatch.setattr(rated_texts, "SHA256", sha256(write_archive(place, rows)))


@pytest.mark.usefixtures("fake_corpora")
def test_the_command_writes_numbers_report_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model=tiny_random", "pairs=10", "corpora=tweets,movies"]
    experiment_human_dispersion.run([*words, "to=out"])
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {
        "results.json",
        "report.md",
        "correlations.png",
    }
    results = json.loads((out / "results.json").read_text())
    assert list(results["correlations"]) == ["movies", "pooled", "tweets"]
    assert results["corpora"]["tweets"]["pairs"] == 10
    assert results["corpora"]["tweets"]["rows"] == 60
    assert sum(results["corpora"]["movies"]["pairs_by_phi"]) == 10
    assert 0 < results["corpora"]["movies"]["nats_per_token"] < math.log(262)
    entropy = results["correlations"]["pooled"]["entropy"]
    assert -1 <= entropy["low"] <= entropy["high"] <= 1
    report = (out / "report.md").read_text()
    assert f"{entropy['value']:+.3f} [{entropy['low']:+.3f}, {entropy['high']:+.3f}]" in report
    assert all(prompt in report for prompt in CORPORA["tweets"].wordings)
    assert f"{entropy['value']:+.3f}" in capsys.readouterr().out

    # Again: the same numbers, from the reference store.
    experiment_human_dispersion.run([*words, "to=again"])
    for name in ("results.json", "report.md", "correlations.png"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.usefixtures("fake_corpora")
def test_the_entropy_is_that_of_training(tmp_path: Path) -> None:
    import torch

    from mallowspo_cli.experiments.human_dispersion import score
    from mallowspo_cli.models.load import load_model, load_tokenizer
    from mallowspo_cli.recipe.load import load_base

    words = ["model=tiny_random", "dataset=quickstart_pairs", "objective=dpo"]
    recipe = load_base([*words, "train.precision=fp32"]).recipe
    corpus = rated(made_up(20))
    pairs = draw_pairs(corpus, 4, 0)
    found = score(corpus, pairs, "Write.", recipe, torch.device("cpu"))

    directory = resolve_model("random:llama")
    tokenizer, model = load_tokenizer(directory), load_model(directory, torch.float32)

    def nats_and_logp(text: str) -> tuple[float, float]:
        ids = tokenizer(f"<|begin|><|user|>Write.<|end|>\n<|assistant|>{text}<|end|>")["input_ids"]
        start = len(tokenizer("<|begin|><|user|>Write.<|end|>\n<|assistant|>")["input_ids"])
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)[start - 1 : -1]
        entropy = -(logps.exp() * logps).sum(-1).mean()
        return float(entropy), float(logps[range(len(logps)), ids[start:]].mean())

    for index, (better, worse) in enumerate(zip(pairs.better, pairs.worse, strict=True)):
        (h, logp), (other_h, other_logp) = (
            nats_and_logp(corpus.texts[text]) for text in (better, worse)
        )
        vocab = model.config.vocab_size  # type: ignore[union-attr]
        expected = (h + other_h) / 2 / math.log(vocab)  # type: ignore[arg-type]
        assert found.entropy[index] == pytest.approx(expected, rel=1e-5)
        assert found.better_entropy[index] == pytest.approx(h, rel=1e-5)
        assert found.margin[index] == pytest.approx(abs(logp - other_logp), abs=1e-5)


def test_the_defaults_are_all_corpora() -> None:
    assert human_dispersion_words([]).corpora == tuple(CORPORA)
    assert human_dispersion_words(["corpora=all", "seed=3"]).seed == 3
    assert human_dispersion_words(["corpora=tweets,tweets"]).corpora == ("tweets",)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("pair=5", "Did you mean 'pairs'"),
        ("model", "is no word of this experiment"),
        ("to=", "to is empty"),
        ("pairs=3", "whole number of at least 10"),
        ("pairs=1e3", "whole number of at least 10"),
        ("seed=-1", "whole number of at least 0"),
        ("corpora=twets", "Did you mean 'tweets'"),
        ("corpora=movies,", "Choices: all, or some of movies,products,tweets,editorials"),
    ],
)
def test_a_wrong_word_is_told_in_one_line(word: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        human_dispersion_words([word])
    assert "\n" not in str(error.value)
