"""`mallowspo eval compare`: its words, its report and its tables."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mallowspo_cli.commands.eval_compare import compare_words, run
from mallowspo_cli.errors import EvalError, MallowsPOError
from mallowspo_cli.evaluation.win_rates.alpacaeval import DIFFICULTY_FILE, GAMED_FILE
from mallowspo_cli.evaluation.win_rates.difficulty import digest
from tests.evaluation.comparing.compared import (
    annotation,
    model_rows,
    write_annotations,
    write_dispersion,
    write_run,
)

QUICK = ["bootstrap=100", "bootstrap_lc=100"]

Compare = Callable[..., str]


@pytest.fixture
def compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Compare:
    """Runs the command in `tmp_path`; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def with_words(*words: str) -> str:
        capsys.readouterr()
        run([*words, *QUICK])
        return capsys.readouterr().out

    return with_words


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Seeds of two configurations."""
    for seed in range(3):
        for name, quality in (("dpo", 0.0), ("phi", 0.5)):
            place = write_run(tmp_path / "runs" / name / f"seed{seed}", seed, quality)
            entropies = {i: 0.1 + (i % 9) / 10 for i in range(60)}
            write_dispersion(place / "evaluations" / "alpacaeval", entropies)
    return tmp_path / "runs"


def test_two_models_make_a_report_a_picture_and_a_table(
    compare: Compare, runs: Path, tmp_path: Path
) -> None:
    out = compare("runs/dpo/seed0", "runs/phi/seed0")
    place = tmp_path / "reports" / "compare-dpo-phi"
    found = json.loads((place / "comparison.json").read_text())
    report = (place / "report.md").read_text()
    (win,) = [m["pairs"][0] for m in found["metrics"] if m["metric"] == "win rate"]
    for value in (win["difference"]["value"], win["interaction"]["value"]):
        assert math.isfinite(value)
    shown = f"{win['difference']['value']:+.2f} [{win['difference']['low']:+.2f}"
    for text in (out, report):
        assert shown in text
        assert "phi - dpo" in text
        assert "preference accuracy" in text.lower()
        assert "high dispersion" in text
    assert "They say nothing of another training run" in " ".join(report.split())
    assert "100 times" in report
    assert (place / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert "report: reports/compare-dpo-phi/report.md" in out
    assert found["resampling"] == {"means": 100, "length_controlled": 100, "seed": 0}


def test_a_quoted_pattern_is_one_side_with_its_seeds(
    compare: Compare, runs: Path, tmp_path: Path
) -> None:
    out = compare("runs/dpo/seed*", "runs/phi/seed*", "runs/phi/seed0", "to=out", "seed=5")
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [side["label"] for side in found["sides"]] == ["dpo/seed*", "phi/seed*", "phi/seed0"]
    assert found["resampling"]["seed"] == 5
    report = (tmp_path / "out" / "report.md").read_text()
    for text in (out, report):
        assert "seed0 " in text
        assert "have a model in common" in text
    assert "3 seeds: seed0, seed1, seed2" in report
    assert "a t interval" in " ".join(report.split())
    assert r"phi/seed\* - dpo/seed\*" in report
    first = report.splitlines()[0]
    assert first == r"# phi/seed\*, phi/seed0 compared with dpo/seed\*"
    # The first lines are about the first side alone.
    assert r"phi/seed0 - phi/seed\*: " not in report.split("![")[0]


def test_the_same_words_give_the_same_files(compare: Compare, runs: Path, tmp_path: Path) -> None:
    def files() -> dict[str, bytes]:
        compare("runs/dpo/seed0", "runs/phi/seed0", "to=out")
        return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    first = files()
    assert sorted(first) == ["comparison.json", "comparison.png", "report.md"]
    assert files() == first


def test_a_pattern_that_the_shell_took_apart_is_hinted_at(compare: Compare, runs: Path) -> None:
    out = compare("runs/dpo/seed0", "runs/dpo/seed1", "runs/dpo/seed2")
    assert "quote them as one side: 'runs/dpo/seed*'" in out
    assert "quote" not in compare("runs/dpo/seed0", "runs/phi/seed0")


def test_few_prompts_and_few_seeds_are_warned_of(compare: Compare, tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b1", "b2")):
        write_run(tmp_path / name, seed, count=20)
    assert "only 20 prompts, so p is too small" in compare("a", "b1")
    assert "two seeds say little of how seeds vary" in compare("a", "b*")


@pytest.mark.parametrize("cached", [True, False])
def test_alpacaevals_own_files_serve_where_they_are_at_hand(
    compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    texts = [f"Instruction {i}" for i in range(60)]
    order = tmp_path / "order.txt"
    order.write_text("\n".join(map(digest, texts)))
    monkeypatch.setattr("mallowspo_cli.evaluation.win_rates.difficulty.OFFICIAL_ORDER", order)
    rows = [f"{i},{math.cos(i)}" for i in range(60)]
    (tmp_path / DIFFICULTY_FILE).write_text("\n".join(["index,instruction_difficulty", *rows]))
    rows = [f"{i},0.{i % 7},{(-1) ** i},{math.cos(i)}" for i in range(60)]
    head = "index,preference,std_delta_len,instruction_difficulty"
    (tmp_path / GAMED_FILE).write_text("\n".join([head, *rows]))

    def hub_file(name: str, instead: str) -> Path:
        if not cached:
            raise EvalError(f"{name} is not there. Give a local file: {instead}=FILE.")
        return tmp_path / name

    monkeypatch.setattr("mallowspo_cli.commands.eval_compare.hub_file", hub_file)
    for seed, name in enumerate("xy"):
        write_run(tmp_path / name, seed)
        other = [{**row, "instruction": f"Mine {row['instruction']}"} for row in model_rows(seed)]
        write_annotations(tmp_path / name / "evaluations" / "winrate", other)
    out = compare("x", "y", "to=out")
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    metrics = {(m["metric"], m["evaluation"]) for m in found["metrics"]}
    full = ("length-controlled win rate", "alpacaeval")
    minimal = "length-controlled win rate (minimal, unpenalised)"
    assert (full in metrics) == cached
    assert ((minimal, "alpacaeval") in metrics) != cached
    assert (minimal, "winrate") in metrics
    assert ("gamed=FILE" in out) != cached


def test_names_do_not_break_the_report(compare: Compare, tmp_path: Path) -> None:
    rows = [annotation(i, 1.5, generator_1="a|b[c]<d>", annotator="[red]j*") for i in range(6)]
    for name in ("x", "y"):
        write_annotations(tmp_path / name, rows)
    out = compare("x", "y", "to=out")
    report = (tmp_path / "out" / "report.md").read_text()
    assert r"Judge \[red]j\*, against a\|b\[c]\<d>." in report
    assert "win rate" in out


def test_judges_that_never_vary_have_no_kappa(compare: Compare, tmp_path: Path) -> None:
    for run_name in ("x", "y"):
        for judge in ("one", "two"):
            rows = [annotation(i, 2.0, annotator=judge) for i in range(6)]
            write_annotations(tmp_path / run_name / "evaluations" / judge, rows)
    assert " 100.0 %" in compare("x", "y", "to=out")
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["agreement"][0]["kappa"] is None
    assert "| one and two | 6 | 100.0 % | - |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "found nothing to compare, expected two or more. Example:"),
        (["runs/dpo/seed0"], "found runs/dpo/seed0 to compare, expected two"),
        (["runs/dpo/seed0", "runs/none"], "nothing is at runs/none"),
        (["runs/dpo/seed0", "runs/x*"], "nothing matches runs/x*"),
        (["a", "b", "bootsrap=9"], "'bootsrap=9' is no word of this command"),
        (["a", "b", "bootsrap=9"], "Did you mean 'bootstrap'?"),
        (["a", "b", "to="], "to is empty"),
        (["a", "b", "seed=1", "seed=2"], "seed is given twice"),
        (["a", "b", "bootstrap=10"], "bootstrap=10 is not a whole number of at least 100"),
        (["a", "b", "seed=x"], "seed=x is not a whole number"),
        (["a", "b", "gamed=none.csv"], "gamed=none.csv: there is no such file"),
        (["a", "b", "difficulty=file"], "is of use with gamed=FILE alone"),
        (["a", "b", "gamed=file"], "has no column"),
        (["a", "b", "gamed=good", "instructions=bare"], "has no text under 'instruction'"),
    ],
)
def test_wrong_words_are_told_in_a_line(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a,b\n1,2\n")
    head = "index,preference,std_delta_len,instruction_difficulty\n"
    (tmp_path / "good").write_text(f"{head}0,0.5,0.1,1.0\n")
    (tmp_path / "bare").write_text('[{"prompt": "x"}]')
    with pytest.raises(MallowsPOError) as error:
        run(words)
    assert message in str(error.value)
    assert error.value.exit_code == 2
    assert not (tmp_path / "reports").exists()


def test_a_path_with_an_equals_sign_is_a_side(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beta=1").mkdir()
    wanted = compare_words(["beta=1", "runs/beta=2/x", "to=out"])
    assert wanted.sides == ["beta=1", "runs/beta=2/x"]
    assert wanted.to == Path("out")
    assert compare_words(["runs/a*", "runs/b*"]).to == Path("reports/compare-a-b")
