"""`mallowspo experiment estimator`: words, files, the same words give the same bytes."""

import csv
import json
import re
from pathlib import Path

import pytest

from mallowspo_cli.commands.experiment_estimator import estimator_words
from mallowspo_cli.errors import RecipeError
from tests.commands.conftest import Command

SMALL = ["items=5,10", "prompts=4", "model_items=4", "steps=10", "seeds=2", "seed=3"]
FILES = {"results.json", "exact.csv", "prompts.csv", "report.md", "exact.png", "transformer.png"}


def test_a_small_run_leaves_files_that_agree(mallowspo: Command, tmp_path: Path) -> None:
    done = mallowspo("experiment", "estimator", *SMALL, "to=out")
    assert done.code == 0, done.err
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == FILES

    results = json.loads((out / "results.json").read_text())
    assert [sweep["items"] for sweep in results["exact"]] == [5, 10]
    assert [run["seed"] for run in results["transformer"]["seeds"]] == [3, 4]
    with (out / "exact.csv").open(newline="") as handle:
        exact = list(csv.DictReader(handle))
    assert {row["items"] for row in exact} == {"5", "10"}
    with (out / "prompts.csv").open(newline="") as handle:
        prompts = list(csv.DictReader(handle))
    assert [(row["seed"], row["prompt"]) for row in prompts] == [
        (seed, prompt) for seed in "34" for prompt in "0123"
    ]
    means = results["transformer"]["over_seeds_by_prompt"]
    for row, other, mean in zip(prompts[:4], prompts[4:], means, strict=True):
        both = (float(row["estimate"]) + float(other["estimate"])) / 2
        assert mean["value"] == pytest.approx(both)

    report = (out / "report.md").read_text()
    for claim in results["claims"]:
        assert f"| {claim['claim']} |" in report
        assert f"**{claim['verdict']}**" in report
        assert f"{claim['verdict']}: {claim['claim']}" in done.out
    assert f"| 10 | {results['exact'][1]['correlation']['value']:.4f} |" in report
    assert "docs/results/human_dispersion.md" in report
    assert (out / "exact.png").read_bytes().startswith(b"\x89PNG")

    again = mallowspo("experiment", "estimator", *SMALL, "to=again")
    assert again.code == 0
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name


def test_one_seed_gives_no_interval_and_no_verdict(mallowspo: Command, tmp_path: Path) -> None:
    words = ["items=5", "prompts=4", "model_items=3", "steps=2", "seeds=1", "to=out"]
    done = mallowspo("experiment", "estimator", *words)
    assert done.code == 0, done.err
    (claim,) = json.loads((tmp_path / "out" / "results.json").read_text())["claims"]
    assert (claim["verdict"], claim["low"]) == ("not seen", None)


def test_the_defaults_are_those_of_the_help(mallowspo: Command) -> None:
    settings, place = estimator_words([])
    shown = mallowspo("experiment", "estimator", "--help").out
    told = dict(re.findall(r"^ *(\w+)=(?:.(?!\w+=))*?\(default: ([^;)]+)", shown, re.MULTILINE))
    assert told == {
        "items": ",".join(map(str, settings.items)),
        "prompts": str(settings.prompts),
        "model_items": str(settings.model_items),
        "steps": str(settings.steps),
        "seeds": str(settings.seeds),
        "seed": str(settings.seed),
        "to": str(place),
    }


def test_items_are_sorted_and_told_once() -> None:
    assert estimator_words(["items=20,5,20"])[0].items == (20, 5)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("item=5", "Did you mean 'items'"),
        ("promts=5", "Did you mean 'prompts'"),
        ("steps", "is no word of this command"),
        ("to=", "to is empty"),
        ("items=5,", "'' is not a whole number from 3 to 1000"),
        ("items=2", "'2' is not a whole number from 3 to 1000"),
        ("items=ten", "'ten' is not a whole number"),
        ("prompts=3", "prompts=3 is not a whole number of at least 4"),
        ("model_items=2", "whole number of at least 3"),
        ("model_items=500", "model_items=500 is more than 200"),
        ("steps=0", "whole number of at least 1"),
        ("seeds=1.5", "whole number of at least 1"),
        ("seed=-1", "whole number of at least 0"),
    ],
)
def test_a_wrong_word_is_told_in_one_line(word: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        estimator_words([word])
    assert "\n" not in str(error.value)
