"""`mallowspo eval sentiment` on the tiny model, with labelled reviews of the project's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mallowspo_cli.commands.eval_sentiment import read_plan, run
from mallowspo_cli.errors import EvalError, MallowsPOError, RecipeError
from tests.commands.conftest import Command

GOOD, BAD = ("splendid", "moving", "witty"), ("dreary", "clumsy", "hollow")
SMALL = ("eval.limit=3", "generate.max_tokens=5", "generate.batch_size=4")


@pytest.fixture
def reviews(write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """The word reviews=FILE."""
    rows = [
        {"text": f"Film {i} was a {(GOOD if i % 2 else BAD)[i % 3]} thing", "label": i % 2}
        for i in range(90)
    ]
    path = write_rows(rows, "reviews.jsonl")
    monkeypatch.chdir(path.parent)
    return f"reviews={path}"


def results_in(place: Path) -> dict[str, Any]:
    return json.loads((place / "sentiment.json").read_text())


def test_a_model_has_no_divergence_from_itself_and_no_gain(reviews: str, tmp_path: Path) -> None:
    words = ["model=tiny_random", "reference=tiny_random", "reference_reward=true"]
    run([*words, reviews, *SMALL])
    place = tmp_path / "reports" / "sentiment-tiny_random"
    found = results_in(place)
    assert found["kl"] == {"value": 0, "low": 0, "high": 0, "prompts": 3}
    assert found["reward_gain"]["value"] == 0
    assert 0 < found["reward"]["low"] <= found["reward"]["value"] <= found["reward"]["high"] < 1
    assert found["classifier"]["accuracy"] == 1
    assert found["kl_left_out"] is None
    rows = [json.loads(line) for line in (place / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 3 * 2
    # 15 reviews are held out; the first five of their six words.
    assert all(row["prompt"].startswith("Film ") for row in rows)
    assert all(len(row["prompt"].split()) == 5 for row in rows)
    assert all(row["text"].startswith(row["prompt"]) for row in rows)
    report = (place / "report.md").read_text()
    assert "it is right on 100.0%" in report
    assert "given as a user's turn" in report
    assert (place / "rewards.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_words_give_the_same_numbers_and_another_seed_others(
    reviews: str, tmp_path: Path
) -> None:
    words = ["model=tiny_random", reviews, *SMALL]
    run([*words, "output_dir=one"])
    run([*words, "output_dir=two"])
    run([*words, "generate.seed=1", "output_dir=three"])
    one, two, three = (
        (tmp_path / name / "samples.jsonl").read_text() for name in ("one", "two", "three")
    )
    assert one == two != three
    assert [json.loads(a)["prompt"] for a in one.splitlines()] == [
        json.loads(a)["prompt"] for a in three.splitlines()
    ]


def test_a_run_is_measured_against_the_model_that_it_began_from(
    mallowspo: Command, tiny_words: list[str], reviews: str, tmp_path: Path
) -> None:
    assert mallowspo("train", *tiny_words).code == 0
    run(["model=runs/tiny", reviews, *SMALL])
    found = results_in(tmp_path / "runs" / "tiny" / "evaluations" / "sentiment")
    assert found["reference"] == "random:llama"
    assert found["kl"]["value"] != 0
    assert found["kl"]["low"] < found["kl"]["value"] < found["kl"]["high"]
    assert found["model"] == "runs/tiny"


def test_plain_beginnings_are_gone_on_with(reviews: str, tmp_path: Path) -> None:
    run(["model=tiny_random", "model.chat_template=plain", reviews, "prompt_words=3", *SMALL])
    place = tmp_path / "reports" / "sentiment-tiny_random"
    assert results_in(place)["continued"] is True
    assert "user's turn" not in (place / "report.md").read_text()
    assert results_in(place)["kl"] is None
    assert "give reference=MODEL" in (place / "report.md").read_text()


def test_prompts_come_from_a_file_or_from_a_datasets_held_out_pairs(
    reviews: str, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "own.txt").write_text("This film\n\nA story of\nThis film\n")
    run(["model=tiny_random", reviews, "prompts=own.txt", "output_dir=file", *SMALL])
    assert results_in(tmp_path / "file")["prompts"] == {"from": "own.txt", "count": 2}
    rows = [
        {"text": f"Film {i} is", "chosen": f"Film {i} is so good", "rejected": f"Film {i} is bad"}
        for i in range(8)
    ]
    data = write_rows(rows, "imdb.jsonl")
    words = ["dataset=imdb", f"dataset.path={data}", "dataset.eval_split=null"]
    words += ["dataset.eval_size=2", "output_dir=data"]
    run(["model=tiny_random", reviews, *words, *SMALL])
    found = results_in(tmp_path / "data")["prompts"]
    assert found == {"from": f"the held-out prompts of {data}", "count": 2}
    prompts = {
        json.loads(line)["prompt"]
        for line in (tmp_path / "data" / "samples.jsonl").read_text().splitlines()
    }
    assert prompts < {row["text"] for row in rows}


def test_at_another_temperature_there_is_a_reward_alone(reviews: str, tmp_path: Path) -> None:
    words = ["model=tiny_random", "reference=tiny_random", reviews, *SMALL, "output_dir=out"]
    run([*words, "generate.temperature=0.5"])
    found = results_in(tmp_path / "out")
    assert found["kl"] is None
    assert "generate.temperature=1" in found["kl_left_out"]
    assert found["reward"]["prompts"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "found no model="),
        (["model=tiny_random", "prompt=x.txt"], "no word of this command"),
        (["model=tiny_random", "dataset=imdb", "prompts=x.txt"], "one source of prompts"),
        (["model=tiny_random", "prompts=x.txt", "prompt_words=2"], "says nothing of prompts="),
        (["model=tiny_random", "dataset.path=x"], r"dataset\.path=x without dataset=NAME"),
        (["model=tiny_random", "generate.engine=vllm"], "transformers alone"),
        (["model=tiny_random", "generate.dtype=auto"], "name float32 or bfloat16"),
        (["model=tiny_random", "reference_reward=true"], "needs reference=MODEL"),
        (["model=tiny_random", "reference_reward=si"], "neither true nor false"),
        (["model=runs/none"], "no run directory"),
    ],
)
def test_words_that_cannot_be_used_are_refused_before_anything_is_fetched(
    words: list[str], message: str
) -> None:
    with pytest.raises(MallowsPOError, match=message):
        read_plan(words)


def test_models_of_two_vocabularies_have_no_divergence(
    reviews: str, tiny_directory: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_directory.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    names = tokenizer["model"]["vocab"]
    names["a"], names["b"] = names["b"], names["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(EvalError, match="different vocabularies"):
        run(["model=tiny_random", f"reference={other}", reviews, *SMALL])


def test_positive_is_no_word_of_the_fitted_classifier(reviews: str) -> None:
    with pytest.raises(RecipeError, match="another classifier than tfidf"):
        run(["model=tiny_random", "positive=good", reviews, *SMALL])
