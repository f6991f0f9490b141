"""Runs compared in and out of distribution: pairing, intervals, gaps, claims, the report."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mallowspo_cli.evaluation.preference import ScoredPairs
from mallowspo_cli.experiments.ood_samples import Scored, Table, read_table
from mallowspo_cli.experiments.out_of_distribution import OUTSIDE, analyse
from mallowspo_cli.report.out_of_distribution import (
    as_csv,
    as_markdown,
    draw_accuracy,
    verdict,
)

IN, OUT, FAR = "films", "gadgets", "posts"
PAIRS = 120
SUMMED = "log-ratio, summed"


def made_up(
    skill: dict[str, float],
    seeds: Sequence[int] = (0, 1, 2),
    places: Sequence[str] = (IN, OUT, FAR),
    lost: float = 0.5,
    noise: float = 0.1,
) -> list[Scored]:
    """Runs whose margins are a pair's own plus the entry's skill, less of it out of `IN`."""
    runs = []
    for number, place in enumerate(places):
        generator = np.random.default_rng(number)
        pair = generator.normal(0, 1, PAIRS)
        weights = generator.uniform(0.5, 1.5, PAIRS)
        for entry, of_entry in skill.items():
            for seed in seeds:
                drawn = np.random.default_rng([number, seed, *entry.encode()])
                gain = of_entry * (1 if place == IN else lost)
                margins = pair + gain + drawn.normal(0, noise, PAIRS)
                wins = (margins > 0).astype(np.float64)
                ids = [f"{place}{i}" for i in range(PAIRS)]
                runs.append((entry, seed, place, Table(ids, ids, wins, margins, weights)))
    found: dict[tuple[str, int], dict[str, Table]] = {}
    for entry, seed, place, table in runs:
        found.setdefault((entry, seed), {})[place] = table
    return [Scored(entry, seed, tables, SUMMED) for (entry, seed), tables in found.items()]


def row(rows: list[dict], **wanted: object) -> dict:
    (found,) = [each for each in rows if all(each[key] == v for key, v in wanted.items())]
    return found


def test_a_difference_is_of_the_same_pairs_and_seeds() -> None:
    runs = made_up({"dpo": 0.2, "phi": 0.6})
    results, _ = analyse(runs, ["dpo", "phi"], IN, [OUT, FAR], {}, resamples=400)
    tables = {(run.entry, run.seed): run.tables for run in runs}
    for place in (IN, OUT, FAR):
        gaps = [
            tables["phi", seed][place].margins - tables["dpo", seed][place].margins
            for seed in range(3)
        ]
        found = row(results["differences"], data_set=place, measure="margin")
        assert found["value"] == pytest.approx(np.mean(gaps))
        # The pairs' own spread of 1 is in neither: 0.1 * sqrt(2 / (120 * 3)) is what is left.
        assert 0.004 < found["standard_error"] < 0.02
        unpaired = row(results["outcomes"], data_set=place, measure="margin", entry="phi")
        assert unpaired["standard_error"] > 0.08
        assert found["seeds"] == 3


def test_where_a_seed_is_missing_on_one_side_the_others_are_compared() -> None:
    runs = [run for run in made_up({"dpo": 0.2, "phi": 0.6}) if (run.entry, run.seed) != ("phi", 1)]
    results, claims = analyse(runs, ["dpo", "phi"], IN, [OUT], {}, resamples=200)
    assert {each["seeds"] for each in results["differences"]} == {2}
    assert row(results["outcomes"], entry="phi", data_set=IN, measure="accuracy")[
        "seeds"
    ].keys() == {
        "0",
        "2",
    }
    apart = [run for run in runs if (run.entry == "dpo") == (run.seed == 0)]
    results, claims = analyse(apart, ["dpo", "phi"], IN, [OUT], {}, resamples=200)
    assert {claim.verdict for claim in claims} == {"not seen"}
    assert all(math.isnan(each["value"]) for each in results["differences"])


@pytest.mark.parametrize(("other", "verdict"), [(1.0, "held"), (-0.6, "opposite")])
def test_a_claim_goes_the_way_of_a_clear_difference(other: float, verdict: str) -> None:
    runs = made_up({"dpo": 0.2, "phi": other})
    _, claims = analyse(runs, ["dpo", "phi"], IN, [OUT, FAR], {}, resamples=400)
    assert [claim.verdict for claim in claims] == [verdict] * 4
    assert [claim.text for claim in claims] == [
        f"In distribution ({IN}), phi is better than dpo",
        f"Out of distribution ({OUT}), phi is better than dpo",
        f"Out of distribution ({FAR}), phi is better than dpo",
        "Out of distribution (mean of 2 data sets), phi is better than dpo",
    ]


def test_equal_entries_are_rarely_told_apart() -> None:
    held = 0
    for trial in range(40):
        runs = []
        for entry in ("a", "b"):
            for seed in range(3):
                drawn = np.random.default_rng([trial, seed, ord(entry)])
                margins = drawn.normal(drawn.normal(0.3, 0.1), 1, PAIRS)
                ids = [str(i) for i in range(PAIRS)]
                table = Table(
                    ids, ids, (margins > 0).astype(np.float64), margins, np.full(PAIRS, np.nan)
                )
                runs.append(Scored(entry, seed, {IN: table, OUT: table}, SUMMED))
        _, claims = analyse(runs, ["a", "b"], IN, [OUT], {}, resamples=300)
        held += claims[0].verdict != "not seen"
    assert held <= 5


def test_the_mean_over_targets_counts_each_alike() -> None:
    results, _ = analyse(made_up({"dpo": 0.5}), ["dpo"], IN, [OUT, FAR], {}, resamples=200)
    values = [
        row(results["outcomes"], data_set=place, measure="accuracy")
        for place in (OUT, FAR, OUTSIDE)
    ]
    assert values[2]["value"] == pytest.approx((values[0]["value"] + values[1]["value"]) / 2)
    assert values[2]["standard_error"] < values[0]["standard_error"]
    one, _ = analyse(made_up({"dpo": 0.5}), ["dpo"], IN, [OUT], {}, resamples=200)
    assert {each["data_set"] for each in one["outcomes"]} == {IN, OUT}


def test_the_gap_is_accuracy_in_minus_out() -> None:
    runs = made_up({"dpo": 1.0, "phi": 1.0}, lost=0.0)
    results, _ = analyse(runs, ["dpo", "phi"], IN, [OUT], {}, resamples=400)
    inside, outside = (
        row(results["outcomes"], data_set=place, entry="dpo", measure="accuracy")["value"]
        for place in (IN, OUT)
    )
    gap = row(results["gaps"], entry="dpo", against=None)
    assert gap["value"] == pytest.approx(inside - outside)
    assert gap["low"] > 0.1
    between = row(results["gaps"], entry="phi", against="dpo")
    assert between["low"] < 0 < between["high"]


def test_terciles_are_by_the_references_weights_and_add_up() -> None:
    runs = made_up({"dpo": 0.2, "phi": 0.6})
    results, _ = analyse(runs, ["dpo", "phi"], IN, [OUT, FAR], {}, resamples=200)
    found = row(results["differences"], data_set=IN, measure="accuracy")
    thirds = [third["value"] for third in found["by_dispersion"].values()]
    assert list(found["by_dispersion"]) == [
        "low_dispersion",
        "middle_dispersion",
        "high_dispersion",
    ]
    assert np.mean(thirds) == pytest.approx(found["value"])
    assert found["interaction"]["value"] == pytest.approx(thirds[2] - thirds[0])
    table = runs[0].tables[IN]
    high = table.weights >= np.sort(table.weights)[-PAIRS // 3]
    outcome = row(results["outcomes"], data_set=IN, measure="accuracy", entry="dpo")
    of_seeds = [run.tables[IN].wins[high].mean() for run in runs if run.entry == "dpo"]
    assert outcome["by_dispersion"]["low_dispersion"]["value"] == pytest.approx(np.mean(of_seeds))


def test_pairs_of_a_prompt_go_together() -> None:
    margins = np.repeat(np.random.default_rng(0).normal(0, 1, 30), 4)
    ids = [str(i) for i in range(120)]
    weights = np.full(120, np.nan)
    errors = []
    for units in (ids, [str(i // 4) for i in range(120)]):
        table = Table(ids, units, (margins > 0).astype(np.float64), margins, weights)
        run = Scored("dpo", 0, {IN: table, OUT: table}, SUMMED)
        results, _ = analyse([run], ["dpo"], IN, [OUT], {})
        errors.append(results["outcomes"][0]["standard_error"])
    assert errors[1] == pytest.approx(2 * errors[0], rel=0.15)


def test_a_control_is_compared_with_what_it_controls_and_claims_nothing() -> None:
    skill = {"dpo": 0.2, "theta": 0.6, "theta+shuffled": 0.3}
    controls = {"theta+shuffled": "theta", "phi+shuffled": "phi"}
    _, claims = analyse(made_up(skill), list(skill), IN, [OUT], controls, resamples=200)
    assert [claim.text.partition(", ")[2] for claim in claims] == [
        "theta is better than dpo",
        "theta is better than dpo",
        "theta is better than its control theta+shuffled",
        "theta is better than its control theta+shuffled",
    ]
    for entries in (["theta", "theta+shuffled"], ["theta+shuffled", "theta"]):
        runs = made_up({entry: skill[entry] for entry in entries})
        results, claims = analyse(runs, entries, IN, [OUT], controls, resamples=200)
        assert len(claims) == 2
        assert all("theta is better than its control" in claim.text for claim in claims)
        assert {each["entry"] for each in results["differences"]} == {"theta"}


def test_a_control_as_the_baseline_is_nobody_elses_control() -> None:
    skill = {"theta+constant": 0.3, "theta": 0.6, "phi": 0.6}
    runs = made_up(skill)
    _, claims = analyse(runs, list(skill), IN, [OUT], {"theta+constant": "theta"}, resamples=200)
    assert {claim.text.partition(", ")[2] for claim in claims} == {
        "theta is better than its control theta+constant",
        "phi is better than theta+constant",
    }


def test_holm_corrects_over_the_claims_alone() -> None:
    # A control that is far worse: its p-values would come first in a family of all differences.
    skill = {"dpo": 0.2, "theta": 0.24, "phi": 0.5, "theta+shuffled": -2.0}
    controls = {"theta+shuffled": "theta"}
    runs = made_up(skill, noise=0.6)
    results, claims = analyse(runs, list(skill), IN, [OUT, FAR], controls, resamples=400)
    rows = [each for each in results["differences"] if each["measure"] == "accuracy"]
    of_claims = [each for each in rows if each["entry"] != "theta+shuffled"]
    # Theta and phi against DPO, theta against its control; three data sets and their mean.
    assert len(claims) == len(of_claims) == 12
    assert len(rows) == 16
    assert not any("p_holm" in each for each in rows if each not in of_claims)
    ordered = sorted(of_claims, key=lambda each: each["p"])
    least = 0.0
    for rank, each in enumerate(ordered):
        least = max(least, min(1.0, (12 - rank) * each["p"]))
        assert each["p_holm"] == pytest.approx(least)
    assert any(each["p"] < 0.05 < each["p_holm"] for each in of_claims)


def test_margins_of_different_rewards_are_not_compared() -> None:
    runs = [
        replace(run, reward="log-prob, per token") if run.entry == "simpo" else run
        for run in made_up({"dpo": 0.2, "phi": 0.6, "simpo": 0.6})
    ]
    results, claims = analyse(runs, ["dpo", "phi", "simpo"], IN, [OUT], {}, resamples=100)
    measured = {(each["entry"], each["measure"]) for each in results["differences"]}
    assert measured == {("phi", "accuracy"), ("phi", "margin"), ("simpo", "accuracy")}
    assert len(claims) == 4


def test_the_table_is_read_in_nats(tmp_path: Path) -> None:
    columns = {
        "chosen_reward": torch.tensor([0.3, 0.0, -0.6], dtype=torch.float64),
        "rejected_reward": torch.tensor([0.0, 0.3, -0.6], dtype=torch.float64),
    }
    scored = ScoredPairs(["a", "b", "c"], ["p", "p", "q"], columns, torch.tensor([1.0, 2.0, 0.5]))
    scored.write(tmp_path / "x.parquet")
    table = read_table(tmp_path / "x.parquet", beta=0.3)
    assert table.margins == pytest.approx([1.0, -1.0, 0.0])
    assert table.wins.tolist() == [1, 0, 0.5]
    assert table.units == ["p", "p", "q"]
    assert read_table(tmp_path / "x.parquet", None).margins == pytest.approx([0.3, -0.3, 0.0])


def reported(failed: list[dict[str, str]]) -> dict:
    runs = made_up({"dpo": 0.2, "phi+objective.beta=0.3": 0.9})
    entries = ["dpo", "phi+objective.beta=0.3"]
    results, claims = analyse(runs, entries, IN, [OUT, FAR], {}, resamples=200)
    about = {
        "objective": "dpo",
        "reward": "log-ratio, summed",
        "begins_at_chance": True,
        "precision": "fp32",
        "learning_rate": 1e-5,
        "global_batch_size": 8,
        "train_pairs": 321,
        "knobs": {"beta": 0.1, "link": "exact"},
        "weighted": True,
        "dispersion": {"source": "entropy", "mode": "estimated", "weight_mean": 1.0, "scale": 2.0},
        "steps": 3,
        "pairs_seen": 24,
        "training_seconds": 10.0,
        "training_pairs_per_second": 2.4,
        "evaluation_pairs_per_second": dict.fromkeys((IN, OUT, FAR), 7.5),
        "displacement": dict.fromkeys((IN, OUT, FAR), 0.25),
        "reward_margin": dict.fromkeys((IN, OUT, FAR), 0.05),
    }
    data = {
        "pairs": PAIRS,
        "prompts": 1,
        "documents": 17,
        "of": 500,
        "known": {"training pairs": 2},
        "left_out": {"dropped: scores are equal": 3},
        "prompt_tokens": 20.0,
        "response_tokens": 11.0,
    }
    results |= {
        "setup": {
            "command": "mallowspo experiment out-of-distribution targets=...",
            "recipe": "quickstart",
            "model": "a-model",
            "inside": IN,
            "targets": [OUT, FAR],
            "entries": entries,
            "seeds": [0, 1, 2],
            "sizes": {},
            "train_pairs": 654,
            "meaning": "The chosen text is the one rated above.",
            "prompts": {IN: "Write."},
        },
        "data": dict.fromkeys((IN, OUT, FAR), data),
        "runs": [{"entry": run.entry, "seed": run.seed, **about} for run in runs],
        "failed": failed,
    }
    return {"results": results, "claims": claims}


def test_the_report_tells_set_up_numbers_and_verdicts(tmp_path: Path) -> None:
    found = reported([{"run": "dpo-seed9", "reason": "out of memory"}])
    results, claims = found["results"], found["claims"]
    report = as_markdown(results, claims, "accuracy.png")
    assert "Claims: 4 held, 0 not seen, 0 opposite." in report
    assert "2 of 2 entries with a reward against the reference rank held-out pairs better" in report
    assert report.count("**held**") == 4
    accuracy = row(results["differences"], data_set=OUTSIDE, measure="accuracy")
    shown = f"{accuracy['value']:+.3f} [{accuracy['low']:+.3f}, {accuracy['high']:+.3f}]"
    assert f"| {OUTSIDE}, phi+objective.beta=0.3 - dpo | {shown} |" in report
    for told in (
        *("The chosen text is the one rated above.", "- prompt of films: Write."),
        *("beta=0.1, link=exact", "entropy, estimated, mean 1.000", "- trained on 654 pairs of"),
        *("seeds 0, 1, 2", "- dpo-seed9: out of memory", "3: dropped: scores are equal"),
        *("`out of distribution` is the mean", "120 of 500", "| 1 | 17 documents |"),
        *("| 2 training pairs |", "| 321 | fp32 | 1e-05 | 3 (8) | 24 |"),
        "intervals speak of other training",
    ):
        assert told in report
    draw_accuracy(results, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_the_report_tells_what_intervals_of_one_seed_and_of_several_speak_of() -> None:
    found = reported([])
    results, claims = found["results"], found["claims"]
    single, several = (
        "Intervals of a single seed speak",
        "so intervals speak of other training runs",
    )
    report = as_markdown(results, claims, "accuracy.png")
    assert several in report
    assert single not in report
    # Two runs failed, and the others have one seed in common.
    results["differences"][0]["seeds"] = 1
    report = as_markdown(results, claims, "accuracy.png")
    assert several in report
    assert single in report
    assert "| data set, entries | accuracy [95%] | seeds |" in report


def test_an_entry_whose_reward_holds_no_reference_is_not_set_against_chance() -> None:
    found = reported([])
    results = found["results"]
    for run in results["runs"]:
        run["begins_at_chance"] = run["entry"] != "dpo"
    assert "1 of 1 entries with a reward against the reference" in verdict(results, [])
    for run in results["runs"]:
        run["begins_at_chance"] = False
    assert verdict(results, []) == "Nothing could be compared."


def test_the_rows_hold_every_run_on_every_data_set() -> None:
    results = reported([])["results"]
    rows = list(csv.DictReader(io.StringIO(as_csv(results))))
    assert len(rows) == 6 * 3
    inside = [each for each in rows if each["entry"] == "dpo" and each["data_set"] == IN]
    assert {each["in_distribution"] for each in inside} == {"true"}
    mean = np.mean([float(each["accuracy"]) for each in inside])
    assert mean == pytest.approx(
        row(results["outcomes"], entry="dpo", data_set=IN, measure="accuracy")["value"]
    )


def test_a_claim_of_fewer_seeds_says_so() -> None:
    runs = made_up({"dpo": 0.2, "phi": 0.9})
    _, claims = analyse(runs[:-1], ["dpo", "phi"], IN, [OUT], {}, resamples=100)
    assert {claim.measure for claim in claims} == {"accuracy, phi minus dpo (2 of 3 seeds)"}
    _, claims = analyse(runs, ["dpo", "phi"], IN, [OUT], {}, resamples=100)
    assert {claim.measure for claim in claims} == {"accuracy, phi minus dpo"}


@pytest.mark.parametrize("seeds", [1, 3])
def test_values_that_do_not_differ_have_no_interval(seeds: int) -> None:
    """All pairs right, with every seed: of other pairs that says nothing like certainty."""
    runs = made_up({"dpo": 9.0, "phi": 9.0}, seeds=range(seeds), lost=1.0)
    results, claims = analyse(runs, ["dpo", "phi"], IN, [OUT], {}, resamples=100)
    for each in (*results["outcomes"], *results["differences"]):
        if each["measure"] == "accuracy":
            assert (each["low"], each["high"], each["p"], each["detectable"]) == (None,) * 4
    assert [claim.verdict for claim in claims] == ["not seen"] * 2


def test_one_entry_alone_claims_nothing() -> None:
    results, claims = analyse(made_up({"dpo": 0.2}), ["dpo", "phi"], IN, [OUT], {}, resamples=100)
    assert claims == []
    assert results["differences"] == []
    missing, claims = analyse(made_up({"phi": 0.2}), ["dpo", "phi"], IN, [OUT], {}, resamples=100)
    assert claims == []
    assert {each["entry"] for each in missing["outcomes"]} == {"phi"}
