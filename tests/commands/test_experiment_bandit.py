"""`mallowspo experiment bandit`: its files, its determinism, and words that cannot be."""

import csv
import json
from itertools import product
from pathlib import Path

import pytest

from mallowspo_cli.commands.experiment_bandit import bandit_words
from mallowspo_cli.experiments.bandit.methods import LABELS
from tests.commands.conftest import Command

SMALL = (
    *("experiment", "bandit", "dispersions=0.05,0.9", "pairs=16", "betas=0.1,1", "seeds=2"),
    *("distances=kendall", "prompts=4", "features=3", "prompt_pairs=8", "conflicts=0"),
    "objectives=dpo,mallows_theta,mallows_phi_smooth",
)
FILES = ("rows.csv", "summary.csv", "prompts.csv", "claims.csv", "results.json", "report.md")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_command_leaves_rows_claims_and_pictures_and_the_same_again(
    mallowspo: Command, tmp_path: Path
) -> None:
    done = mallowspo(*SMALL, "to=first")
    assert done.code == 0, done.err
    assert mallowspo(*SMALL, "to=second").code == 0
    first, second = tmp_path / "first", tmp_path / "second"
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    single = rows(first / "rows.csv")
    assert {row["method"] for row in single} == set(SMALL[-1].split("=")[1].split(","))
    assert {row["seed"] for row in single} == {"0", "1"}
    # One that is told nothing, and two times true, unit mean and two wrong, of two phi each but
    # for the wrong that is the truth; two budgets of two betas and at most three KL; two seeds.
    settings = (2 + 2 * (2 + 2 + 1 + 1)) * 2
    assert len([row for row in single if row["at"].startswith("beta=")]) == settings * 4
    assert settings * 2 < len(single) - settings * 4 <= settings * 3
    summary = rows(first / "summary.csv")
    left_out = [r for r in single if r["phi_told"] == "unit_mean" and r["at"].startswith("kl=")]
    assert sum(int(row["seeds"]) for row in summary) == len(single) - len(left_out)
    setting = list(summary[0])[:6]
    for row, name in product(summary[:20], ("kl", "wrong_collapse")):
        of = [float(one[name]) for one in single if all(one[key] == row[key] for key in setting)]
        assert float(row[name]) == pytest.approx(sum(of) / len(of), rel=6e-3, abs=1e-5)
    report = (first / "report.md").read_text()
    for picture in first.glob("*.png"):
        assert f"({picture.name})" in report
    assert len(list(first.glob("*.png"))) == 5
    assert "report: first/report.md" in done.out
    # The terminal has the report's first five lines and no more.
    top = report.partition("## ")[0].replace("**", "").strip().splitlines()[1:]
    assert done.out.strip().splitlines()[:-1] == top[1:]
    assert [line[:2] for line in top if line[:1].isdigit()] == [f"{n}." for n in range(1, 6)]
    assert "-0.0000" not in report
    assert "-0.0e" not in report
    order = [report.index(f"## {part}") for part in ("Set-up", "One prompt", "Many", "All claims")]
    assert order == sorted(order)
    assert_claims_agree(first)


def assert_claims_agree(place: Path) -> None:
    """The report, the CSV and the JSON have the same claims, numbers and verdicts."""
    results = json.loads((place / "results.json").read_text())
    listed = {(row["section"], row["claim"]): row for row in rows(place / "claims.csv")}
    assert len(listed) == sum(map(len, results["claims"].values())) > 40
    shown = cells((place / "report.md").read_text().partition("## All claims")[2])
    assert len(shown) == len(listed)
    for section, claims in results["claims"].items():
        for claim in claims:
            row = listed[section, claim["claim"]]
            assert claim["verdict"] == row["found"]
            method = max((m for m in LABELS.values() if claim["claim"].startswith(m)), key=len)
            text = claim["claim"].removeprefix(method).lstrip(",: ")
            cell = shown[section, method, text]
            assert cell.endswith(f" **{claim['verdict']}**")
            if claim["value"] is not None:
                assert float(row["mean"]) == pytest.approx(claim["value"], rel=1e-3, abs=1e-6)
                assert float(cell.split()[0]) == pytest.approx(claim["value"], abs=6e-5)


def cells(report: str) -> dict[tuple[str, str, str], str]:
    """What the tables say by section, column and first cell of the row."""
    found = {}
    for part in report.split("### ")[1:]:
        section, *lines = part.splitlines()
        head, _, *table = [line.strip("| ").split(" | ") for line in lines if line[:1] == "|"]
        for text, _measure, *values in table:
            found |= {
                (section, m, text): v for m, v in zip(head[-len(values) :], values, strict=True)
            }
    return found


def test_one_prompt_alone_and_one_method_alone_run_too(mallowspo: Command, tmp_path: Path) -> None:
    # Told phi = 0.9 is told the truth where there is no other, and no claim.
    words = ("prompts=0", "wrong_phi=0.9", "dispersions=0.9", "to=here")
    small = [word for word in SMALL[:6] if not word.startswith("dispersions")]
    done = mallowspo(*small, *words, "objectives=mallows_theta")
    assert done.code == 0, done.err
    assert not (tmp_path / "here" / "prompts.csv").exists()
    told = {row["phi_told"] for row in rows(tmp_path / "here" / "rows.csv")}
    assert told == {"true", "unit_mean"}
    report = (tmp_path / "here" / "report.md").read_text()
    assert "**Many prompts**" not in report
    assert "## Many prompts" not in report


def test_the_defaults_are_those_of_the_help(mallowspo: Command) -> None:
    grid, prompts, place = bandit_words([])
    assert prompts is not None
    shown = " ".join(mallowspo("experiment", "bandit", "--help").out.split())
    for values in (grid.dispersions, grid.pairs, grid.betas, grid.wrong_phi):
        assert f"(default: {','.join(f'{value:g}' for value in values)})" in shown
    for value in (f"{grid.arms};", f"{grid.seeds} from", f"{prompts.prompts};", f"{place})"):
        assert f"(default: {value}" in shown
    assert f"(default: {','.join(map(str, prompts.prompt_pairs))})" in shown
    assert grid.seeds >= 20


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("seed=x", "seed=x is not a whole number of at least 0."),
        ("seeds=1", "seeds=1 is not a whole number of at least 2."),
        ("betas=0.1,0", "betas=0.1,0: '0' is not a number from 0.0001 to 1000."),
        ("betas=nan", "betas=nan: 'nan' is not a number from 0.0001 to 1000."),
        ("betas=1e6", "betas=1e6: '1e6' is not a number from 0.0001 to 1000."),
        ("conflicts=-1", "conflicts=-1: '-1' is not a number of at least 0."),
        ("conflicts=inf", "conflicts=inf: 'inf' is not a number of at least 0."),
        ("dispersions=0.1,1", "'1' is not a number from 1e-12 to 0.9999."),
        ("dispersions=0.1,1e-300", "'1e-300' is not a number from 1e-12 to 0.9999."),
        ("wrong_phi=0.9999999", "'0.9999999' is not a number from 1e-12 to 0.9999."),
        ("dispersions=0.3", "give two, or prompts=0"),
        ("pairs=16,", "pairs=16,: '' is not a whole number of at least 1."),
        ("arms=8", "take arms=7 at most, or distances=kendall."),
        ("arms=21", "arms=21 is more than 20."),
        ("distances=spearmann", "Did you mean 'spearman'?"),
        ("objectives=dpo,mallows_tehta", "Did you mean 'mallows_theta'?"),
        ("bettas=1", "Did you mean 'betas'?"),
        ("prompts=1", "prompts=1 is not a whole number of at least 2."),
        ("prompts=5", "prompts=5 is odd, and half of them are agreed, half disputed."),
        ("features=0", "features=0 is not a whole number of at least 1."),
    ],
)
def test_a_bad_word_gets_one_line(mallowspo: Command, word: str, says: str) -> None:
    done = mallowspo("experiment", "bandit", word)
    assert done.code == 2
    assert says in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_what_float64_does_not_solve_gets_one_line(
    mallowspo: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mallowspo_cli.experiments.bandit.solver.MOST_STEPS", 1)
    done = mallowspo("experiment", "bandit", "prompts=0", "seeds=2", "pairs=16", "betas=1")
    assert done.code == 2
    assert "are not solved in 1 steps: take betas nearer to 1" in done.err


def test_words_of_prompts_that_are_left_out_are_refused(mallowspo: Command) -> None:
    done = mallowspo("experiment", "bandit", "prompts=0", "features=3")
    assert done.code == 2
    assert "features= is of the prompts, and prompts=0 leaves them out." in done.err
