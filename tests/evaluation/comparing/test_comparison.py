"""Comparisons join by instruction, compare like with like alone, and say what they left out."""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.comparing.comparison import (
    ACCURACY,
    CONTROLLED,
    DISCRETE,
    MINIMAL,
    WIN_RATE,
    compare,
)
from mallowspo_cli.evaluation.comparing.lengths import (
    LengthFiles,
    compared_length_control,
)
from mallowspo_cli.evaluation.comparing.metrics import Resampling
from mallowspo_cli.evaluation.comparing.sides import read_sides, short_names
from mallowspo_cli.evaluation.statistics import TERCILES
from mallowspo_cli.evaluation.win_rates.calibration import read_gamed
from mallowspo_cli.evaluation.win_rates.length_control import (
    UNPENALISED,
    Judged,
    length_controlled,
    refit_of,
)
from mallowspo_cli.report.comparison_rows import cautions
from tests.evaluation.comparing.compared import (
    annotation,
    model_rows,
    write_annotations,
    write_dispersion,
    write_preferences,
    write_run,
)

QUICK = Resampling(200, 20, 0)


def results(*words: Path | str, lengths: LengthFiles | None = None) -> dict[str, Any]:
    return compare(read_sides([str(word) for word in words]), QUICK, lengths)


def pair(found: dict[str, Any], metric: str = WIN_RATE) -> dict[str, Any]:
    """The one comparison of a metric."""
    ((only,),) = [m["pairs"] for m in found["metrics"] if m["metric"] == metric]
    return only


def test_win_rates_and_their_difference_by_hand(tmp_path: Path) -> None:
    preferences = {"a": [1.0, 1.5, 2.0, 1.25], "b": [2.0, 1.5, 2.0, 1.0]}
    for name, values in preferences.items():
        write_annotations(tmp_path / name, [annotation(i, p) for i, p in enumerate(values)])
    found = results(tmp_path / "a", tmp_path / "b")
    win, discrete = pair(found), pair(found, DISCRETE)
    assert [side["value"] for side in win["sides"]] == [43.75, 62.5]
    assert win["difference"]["value"] == 18.75
    assert [side["value"] for side in discrete["sides"]] == [37.5, 62.5]
    sign = win["sign_test"]
    assert (sign["better"], sign["worse"], sign["ties"], sign["p"]) == (1, 1, 2, 1)
    assert [side["label"] for side in found["sides"]] == ["a", "b"]
    assert any(f"no {CONTROLLED}" in note and "needs 5" in note for note in found["notes"])


def test_rows_are_joined_by_instruction_and_what_is_not_shared_is_counted(tmp_path: Path) -> None:
    write_annotations(tmp_path / "a", [annotation(i, 1 + i / 20) for i in range(20)])
    other = [annotation(i, 1 + i / 40) for i in reversed(range(10, 40))]
    other[0]["preference"], other[-1]["preference"] = None, None
    write_annotations(tmp_path / "b", other)
    win = pair(results(tmp_path / "a", tmp_path / "b"))
    # 11 to 19: the other's tenth failed.
    assert win["prompts"] == win["rows"] == 9
    assert [side["left_out"] for side in win["sides"]] == [11, 21]
    assert win["difference"]["value"] == pytest.approx(-100 * 15 / 40)


def test_nothing_shared_is_refused(tmp_path: Path) -> None:
    write_annotations(tmp_path / "a", [annotation(i, 1.5) for i in range(5)])
    write_annotations(tmp_path / "b", [annotation(i, 1.5) for i in range(5, 9)])
    with pytest.raises(EvalError, match=r"nothing can be compared: .*no instruction is judged"):
        results(tmp_path / "a", tmp_path / "b")
    pairs = [write_preferences(tmp_path / f"{n}.parquet", [(n, "p", 1.0, None)]) for n in "cd"]
    with pytest.raises(EvalError, match="no held-out pair is in both"):
        results(*pairs)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"annotator": "another judge"}, "is there for a alone"),
        ({"generator_1": "another baseline"}, "is there for a alone"),
        ({"output_1": "another answer"}, "the baseline's answers differ for 6 of 6"),
    ],
)
def test_only_like_is_compared_with_like(
    tmp_path: Path, other: dict[str, str], reason: str
) -> None:
    write_annotations(tmp_path / "a", [annotation(i, 1.5) for i in range(6)])
    write_annotations(tmp_path / "b", [annotation(i, 1.5, **other) for i in range(6)])
    with pytest.raises(EvalError, match=reason):
        results(tmp_path / "a", tmp_path / "b")


def test_another_protocol_of_the_judge_is_not_compared(tmp_path: Path) -> None:
    rows = [annotation(i, 1.5) for i in range(6)]
    settings_ = {"digest": "d", "judge": "m", "engine": "endpoint", "swap": "random", "seed": 0}
    write_annotations(tmp_path / "a", rows, settings_)
    write_annotations(tmp_path / "b", rows, settings_ | {"swap": "both"})
    write_annotations(tmp_path / "c", rows, settings_ | {"seed": 1})
    with pytest.raises(EvalError, match=r"judged otherwise \(swap random and both\)"):
        results(tmp_path / "a", tmp_path / "b")
    assert pair(results(tmp_path / "a", tmp_path / "c"))["difference"]["p"] == 1


def test_judges_that_cannot_be_told_to_be_the_same_are_noted(tmp_path: Path) -> None:
    rows = [annotation(i, 1.5) for i in range(6)]
    unnamed = [annotation(i, 1.5, annotator="unknown") for i in range(6)]
    for name, content, header in (
        ("a", rows, None),
        ("b", rows, {"judge": "m"}),
        ("c", rows, {"judge": "m"}),
        ("d", unnamed, None),
        ("e", unnamed, None),
    ):
        write_annotations(tmp_path / name, content, header)

    def told(*names: str) -> list[str]:
        notes = results(*(tmp_path / name for name in names))["notes"]
        return [note for note in notes if "was not checked that the judges are the same" in note]

    assert f"no judgements.jsonl lies in {tmp_path / 'a'}." in told("a", "b")[0]
    assert told("b", "c") == []
    assert "names no annotator" in told("d", "e")[0]


def test_answers_sampled_otherwise_are_compared_and_it_is_said(tmp_path: Path) -> None:
    for name, temperature in (("a", 0.7), ("b", 1.0)):
        place = write_annotations(tmp_path / name, [annotation(i, 1.5) for i in range(6)])
        header = json.dumps({"temperature": temperature, "model": name})
        (place / "generations.jsonl").write_text(header + "\n")
    found = results(tmp_path / "a", tmp_path / "b")
    assert "a and b: answers were sampled otherwise (temperature 0.7 and 1.0)." in found["notes"]


def test_all_evaluations_of_runs_are_compared_each_with_its_own(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write_run(tmp_path / name, seed)
        # The same judge and baseline: the name alone tells them apart.
        other = model_rows(seed + 7, 20)
        write_annotations(tmp_path / name / "evaluations" / "winrate-hh", other)
    found = results(tmp_path / "a", tmp_path / "b")
    names = [(metric["metric"], metric["evaluation"]) for metric in found["metrics"]]
    both = [WIN_RATE, MINIMAL, DISCRETE]
    expected = [(m, e) for e in ("alpacaeval", "winrate-hh") for m in both] + [(ACCURACY, "hh")]
    assert names == expected
    assert [m["pairs"][0]["rows"] for m in found["metrics"]] == [60] * 3 + [20] * 3 + [60]
    # A run's evaluation can be named by its directory, its file, and against a run.
    directory = tmp_path / "a" / "evaluations" / "winrate-hh"
    for word in (directory, directory / "annotations.json"):
        win = pair(results(word, tmp_path / "b"))
        assert win["difference"] == found["metrics"][3]["pairs"][0]["difference"]
    table = tmp_path / "a" / "evaluations" / "preferences_hh.parquet"
    assert pair(results(table, tmp_path / "b"), ACCURACY)["rows"] == 60


def test_temperatures_are_compared_each_with_its_own(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        for temperature in ("temperature-0.7", "temperature-1"):
            place = tmp_path / name / "evaluations" / "winrate-x" / temperature
            write_annotations(place, model_rows(seed + len(temperature), 20))
    inside = [tmp_path / name / "evaluations" / "winrate-x" for name in "ab"]
    for words, names in (
        (
            [tmp_path / "a", tmp_path / "b"],
            ["winrate-x/temperature-0.7", "winrate-x/temperature-1"],
        ),
        (inside, ["temperature-0.7", "temperature-1"]),
    ):
        metrics = [m for m in results(*words)["metrics"] if m["metric"] == WIN_RATE]
        assert [m["evaluation"] for m in metrics] == names


def test_a_model_against_itself_differs_in_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 0)
    found = results(run, run)
    assert len(found["metrics"]) == 4
    for metric in found["metrics"]:
        (only,) = metric["pairs"]
        for difference in (
            only["difference"],
            *only["by_dispersion"].values(),
            *([only["interaction"]] if only["interaction"] else []),
        ):
            assert (difference["value"], difference["low"], difference["high"]) == (0, 0, 0)
            assert difference["p"] == 1
        assert only["sign_test"] is None or only["sign_test"]["p"] == 1
    assert any("have a model in common" in note for note in found["notes"])


def test_the_comparison_turns_around_with_its_sides(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / name, seed, seed / 2) for seed, name in enumerate("ab"))
    write_dispersion(first / "evaluations" / "alpacaeval", {i: (i + 1) / 99 for i in range(60)})
    found, turned = results(first, second), results(second, first)
    assert [m["metric"] for m in found["metrics"]] == [m["metric"] for m in turned["metrics"]]
    for metric, other in zip(found["metrics"], turned["metrics"], strict=True):
        (ours,), (theirs,) = metric["pairs"], other["pairs"]
        parts = [(ours["difference"], theirs["difference"])]
        parts += [
            (ours["by_dispersion"][k], theirs["by_dispersion"][k]) for k in ours["by_dispersion"]
        ]
        if ours["interaction"]:
            parts.append((ours["interaction"], theirs["interaction"]))
        for one, back in parts:
            assert back["value"] == pytest.approx(-one["value"], abs=1e-9)
            assert back["low"] == pytest.approx(-one["high"], abs=1e-9)
            assert back["p"] == one["p"]
        if ours["sign_test"]:
            assert theirs["sign_test"]["better"] == ours["sign_test"]["worse"]
            assert theirs["sign_test"]["p"] == ours["sign_test"]["p"]


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms())
def test_the_order_of_rows_does_not_matter(tmp_path: Path, random: Any) -> None:
    rows = [model_rows(seed, 24, seed / 3) for seed in range(2)]
    entropies = {i: (i + 1) / 30 for i in range(24)}
    tables = [
        [(f"p{i}", f"q{i // 3}", float((i * s) % 5 > 1), i / 9) for i in range(24)] for s in (1, 3)
    ]

    def found(shuffle: bool) -> dict[str, Any]:
        words = []
        for name, annotations, table in zip("ab", rows, tables, strict=True):
            run = tmp_path / name / "evaluations"
            annotations, table, keys = list(annotations), list(table), list(entropies)
            if shuffle:
                for order in (annotations, table, keys):
                    random.shuffle(order)
            place = write_annotations(run / "alpacaeval", annotations)
            write_dispersion(place, {key: entropies[key] for key in keys})
            write_preferences(run / "preferences_x.parquet", table)
            words.append(run.parent)
        everything = results(*words)
        # A fit goes by the order of the files where both have the same.
        everything["metrics"] = [m for m in everything["metrics"] if m["metric"] != MINIMAL]
        return everything

    assert found(shuffle=True) == found(shuffle=False)


def test_seeds_make_a_group_with_their_spread(tmp_path: Path) -> None:
    for seed in (2, 10, 1):
        write_run(tmp_path / "dpo" / f"seed{seed}", seed)
        write_run(tmp_path / "phi" / f"seed{seed}", seed + 50, 0.5)
    found = results(tmp_path / "dpo" / "seed*", tmp_path / "phi" / "seed*")
    assert [side["label"] for side in found["sides"]] == ["dpo", "phi"]
    assert found["sides"][0]["seeds"] == ["seed1", "seed2", "seed10"]
    for metric in found["metrics"]:
        (only,) = metric["pairs"]
        for side in only["sides"]:
            values = list(side["seeds"].values())
            assert list(side["seeds"]) == ["seed1", "seed2", "seed10"]
            assert side["value"] == pytest.approx(np.mean(values))
            assert side["deviation"] == pytest.approx(np.std(values, ddof=1))
        assert only["difference"]["degrees_of_freedom"] is not None
    alone = results(tmp_path / "dpo" / "seed1", tmp_path / "phi" / "seed1")
    assert pair(alone)["difference"]["degrees_of_freedom"] is None
    assert pair(alone)["sides"][0]["deviation"] is None


def test_a_seed_without_an_evaluation_is_named(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path / "dpo" / f"seed{seed}", seed)
    write_run(tmp_path / "phi", 9)
    (tmp_path / "dpo" / "seed1" / "evaluations" / "alpacaeval" / "annotations.json").unlink()
    found = results(tmp_path / "dpo" / "seed*", tmp_path / "phi")
    assert list(pair(found)["sides"][0]["seeds"]) == ["seed0", "seed2"]
    assert any("missing for seed1 of dpo/seed*" in note for note in found["notes"])
    assert len(pair(found, ACCURACY)["sides"][0]["seeds"]) == 3


def test_more_than_two_sides_are_compared_each_with_each_and_corrected(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, i, i / 3) for i, name in enumerate("abc")]
    found = results(*runs)
    (metric,) = [m for m in found["metrics"] if m["metric"] == WIN_RATE]
    labels = [[side["label"] for side in only["sides"]] for only in metric["pairs"]]
    assert labels == [["a", "b"], ["a", "c"], ["b", "c"]]
    for test in ("difference", "sign_test"):
        tests = [only[test] for only in metric["pairs"]]
        least = min(tests, key=lambda each: each["p"])
        assert least["p_holm"] == pytest.approx(min(1, 3 * least["p"]))
        assert all(each["p_holm"] >= each["p"] for each in tests)
    # What is compared of two does not depend on the third, but for the correction.
    two = pair(results(*runs[:2]))
    for difference in (two["difference"], metric["pairs"][0]["difference"]):
        difference.pop("p_holm")
    assert two["difference"] == metric["pairs"][0]["difference"]


def test_terciles_go_by_entropy_and_the_interaction_is_high_minus_low(tmp_path: Path) -> None:
    # Instructions 0 to 2 have the highest entropy, 6 to 8 the lowest, 9 none.
    gains = [0.4, 0.4, 0.4, 0.1, 0.1, 0.1, -0.2, -0.2, -0.2, 0.0]
    first = write_annotations(tmp_path / "a", [annotation(i, 1.3) for i in range(10)])
    write_annotations(tmp_path / "b", [annotation(i, 1.3 + g) for i, g in enumerate(gains)])
    write_dispersion(first, {i: 0.9 - i / 20 for i in range(9)})
    win = pair(results(tmp_path / "b", tmp_path / "a"))
    thirds = win["by_dispersion"]
    assert list(thirds) == list(TERCILES)
    values = [thirds[name]["value"] for name in TERCILES]
    assert values == pytest.approx([20, -10, -40])
    assert [thirds[name]["rows"] for name in TERCILES] == [3, 3, 3]
    assert win["interaction"]["value"] == pytest.approx(-60)
    assert thirds["high_dispersion"]["second"] == pytest.approx(30)


def test_entropies_of_another_reference_are_not_mixed_in(tmp_path: Path) -> None:
    for name, reference in (("a", "small"), ("b", "large")):
        place = write_annotations(tmp_path / name, [annotation(i, 1.5) for i in range(6)])
        write_dispersion(place, {i: 0.1 + i / 9 for i in range(6)}, reference)
    found = results(tmp_path / "a", tmp_path / "b")
    assert found["dispersion_reference"] == "small"
    assert any("its entropies are of large" in note for note in found["notes"])


def test_entropies_are_of_a_baselines_answers_and_not_of_instructions(tmp_path: Path) -> None:
    # The first baseline's entropies rise, the other's fall.
    entropies = [{i: 0.1 + i / 20 for i in range(9)}, {i: 0.9 - i / 20 for i in range(9)}]
    for name, gain in (("a", 0.0), ("b", 0.05)):
        for number in range(2):
            baseline = {"generator_1": f"base{number}", "output_1": f"of {number}"}
            rows = [annotation(i, 1.3 + gain * i, **baseline) for i in range(9)]
            place = write_annotations(tmp_path / name / "evaluations" / f"e{number}", rows)
            write_dispersion(place, entropies[number])
    found = results(tmp_path / "a", tmp_path / "b")
    rates = [m["pairs"][0] for m in found["metrics"] if m["metric"] == WIN_RATE]
    assert [each["interaction"]["value"] for each in rates] == pytest.approx([30, -30])
    assert not any("other entropies" in note for note in found["notes"])


def test_other_entropies_of_the_same_answers_are_told(tmp_path: Path) -> None:
    for name, shift in (("a", 0.0), ("b", 0.05)):
        place = write_annotations(tmp_path / name, [annotation(i, 1.5) for i in range(6)])
        write_dispersion(place, {i: 0.1 + i / 9 + shift * (i > 3) for i in range(6)})
    notes = results(tmp_path / "a", tmp_path / "b")["notes"]
    assert any("has other entropies" in note and "for 2 of the same" in note for note in notes)


def test_weights_that_differ_between_tables_are_told(tmp_path: Path) -> None:
    for name, shift in (("a", 0.0), ("b", 0.5)):
        rows = [(f"p{i}", f"q{i}", 1.0, 1 + i / 9 + shift * (i == 2)) for i in range(6)]
        write_preferences(tmp_path / f"{name}.parquet", rows)
    paths = [tmp_path / f"{name}.parquet" for name in "ab"]
    told = [note for note in results(*paths)["notes"] if "w differs for 1 of 6" in note]
    assert len(told) == 1
    assert not any("w differs" in note for note in results(paths[0], paths[0])["notes"])


def test_without_entropies_there_are_no_terciles(tmp_path: Path) -> None:
    for name in "ab":
        write_annotations(tmp_path / name, [annotation(i, 1.5) for i in range(6)])
    win = pair(results(tmp_path / "a", tmp_path / "b"))
    assert win["by_dispersion"] == {}
    assert win["interaction"] is None


def test_accuracy_is_of_pairs_by_prompt_and_terciles_are_by_weight(tmp_path: Path) -> None:
    # Prompt p has two pairs; w rises with the number, so the last two are of low dispersion.
    wins = {"a": [0, 0, 0.5, 1, 0, 0], "b": [1, 1, 0.5, 1, 0, 1]}
    for name, values in wins.items():
        prompts = ["p", "p", "q", "r", "s", "t"]
        rows = [(f"pair{i}", prompts[i], float(win), i / 2) for i, win in enumerate(values)]
        write_preferences(tmp_path / f"{name}.parquet", rows)
    found = pair(results(tmp_path / "a.parquet", tmp_path / "b.parquet"), ACCURACY)
    assert [side["value"] for side in found["sides"]] == pytest.approx([25, 75])
    assert (found["rows"], found["prompts"]) == (6, 5)
    assert (found["sign_test"]["better"], found["sign_test"]["ties"]) == (2, 3)
    thirds = {name: third["value"] for name, third in found["by_dispersion"].items()}
    assert thirds == pytest.approx(
        {"low_dispersion": 50, "middle_dispersion": 0, "high_dispersion": 100}
    )
    assert found["interaction"]["value"] == pytest.approx(50)


def test_a_pair_that_is_there_twice_counts_twice(tmp_path: Path) -> None:
    for name, win in (("a", 0.0), ("b", 1.0)):
        rows = [("x", "p", win, None), ("x", "p", win, None), ("y", "q", 1.0, None)]
        write_preferences(tmp_path / f"{name}.parquet", rows)
    found = pair(results(tmp_path / "a.parquet", tmp_path / "b.parquet"), ACCURACY)
    assert found["difference"]["value"] == pytest.approx(200 / 3)
    assert found["by_dispersion"] == {}


def test_judges_are_compared_where_they_judged_the_same_answers(tmp_path: Path) -> None:
    first = [annotation(i, 1 + i / 10) for i in range(10)]
    second = [{**row, "annotator": "other"} for row in first]
    # Two verdicts turn around, one answer is another, one judgement failed.
    second[0]["preference"], second[9]["preference"] = 2.0, 1.0
    second[1]["output_2"] = "something else"
    second[2]["preference"] = None
    for name, rows in (("alpacaeval", first), ("alpacaeval-other", second)):
        write_annotations(tmp_path / "a" / "evaluations" / name, rows)
    write_annotations(
        tmp_path / "b" / "evaluations" / "alpacaeval", [annotation(i, 1.2) for i in range(10)]
    )
    (agreement,) = results(tmp_path / "a", tmp_path / "b")["agreement"]
    assert (agreement["first"], agreement["second"]) == ("judge", "other")
    assert agreement["count"] == 8
    assert agreement["equal"] == 0.75
    # Of 8: baseline, draw, model 3, 1, 4 and 3, 1, 4; by chance 26 / 64.
    assert agreement["kappa"] == pytest.approx((0.75 - 26 / 64) / (1 - 26 / 64))
    assert agreement["low"] <= agreement["kappa"] <= agreement["high"]


def test_too_few_resamples_for_as_many_comparisons_are_warned_of(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        write_annotations(tmp_path / name, model_rows(seed, 20))
    found = results(*(tmp_path / name for name in "abc"))
    (told,) = [line for line in cautions(found) if "resamples" in line]
    assert told == (
        f"{MINIMAL}: with 20 resamples and 3 comparisons Holm's p cannot be below 0.05. Take "
        "bootstrap_lc=60 or more."
    )


def test_judges_do_not_agree_on_answers_that_nobody_asked_them_about(tmp_path: Path) -> None:
    rows = [annotation(i, 1 + i / 10) for i in range(10)]
    same = [annotation(i, 1.5, output_2="b" * (100 + i % 7)) for i in range(10, 30)]
    for judge in ("judge", "other"):
        both = [{**row, "annotator": judge} for row in rows + same]
        if judge == "other":
            both[0]["preference"] = 2.0
        write_annotations(tmp_path / "a" / "evaluations" / judge, both)
        write_annotations(tmp_path / "b" / "evaluations" / judge, both)
    (agreement,) = results(tmp_path / "a", tmp_path / "b")["agreement"]
    assert (agreement["count"], agreement["equal"]) == (10, 0.9)


def calibration(tmp_path: Path, count: int, gamed: int) -> LengthFiles:
    """Difficulties of the instructions in an order of their own, and gamed rows."""
    lines = [f"{i},{math.cos(i)}" for i in range(count)]
    files = LengthFiles(
        tmp_path / "gamed.csv",
        tmp_path / "difficulty.csv",
        [f"Instruction {i}" for i in range(count)],
    )
    assert files.difficulty is not None
    files.difficulty.write_text("index,instruction_difficulty\n" + "\n".join(lines) + "\n")
    head = "index,preference,std_delta_len,instruction_difficulty\n"
    rows = [f"{i},{0.2 + 0.1 * (i % 4)},{(-1) ** i},{math.cos(i)}" for i in range(gamed)]
    files.gamed.write_text(head + "\n".join(rows) + "\n")
    return files


def test_length_control_joins_difficulties_by_instruction(tmp_path: Path) -> None:
    # Good enough that the penalty leaves them a coefficient.
    rows = [model_rows(seed, 50, 1.5 + seed / 2) for seed in range(2)]
    files = calibration(tmp_path, 60, 40)
    write_annotations(tmp_path / "a", rows[0])
    write_annotations(tmp_path / "b", rows[1][::-1])
    found = results(tmp_path / "a", tmp_path / "b", lengths=files)
    only = pair(found, CONTROLLED)
    for side, of_side in zip(only["sides"], rows, strict=True):
        judged = Judged(
            np.array([row["preference"] for row in of_side]),
            np.array([len(row["output_1"]) for row in of_side]),
            np.array([len(row["output_2"]) for row in of_side]),
            np.cos(np.arange(50)),
            read_gamed(files.gamed),
            np.arange(50),
        )
        assert side["value"] == pytest.approx(length_controlled(judged).win_rate, rel=1e-9)
    difference = only["difference"]
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert only["sign_test"] is None


def test_without_files_the_fit_is_the_minimal_one_without_a_penalty(tmp_path: Path) -> None:
    rows = [model_rows(seed, 40, seed / 2)[::-1] for seed in range(2)]
    for name, of_side in zip("ab", rows, strict=True):
        write_annotations(tmp_path / name, of_side)
    found = results(tmp_path / "a", tmp_path / "b")
    only = pair(found, MINIMAL)
    assert any("without a penalty (C = 10,000)" in note for note in found["notes"])
    for side, of_side in zip(only["sides"], rows, strict=True):
        columns = ([row[key] for row in of_side] for key in ("preference", "output_1", "output_2"))
        preference, baseline, ours = columns
        lengths = [np.array([len(text) for text in texts]) for texts in (baseline, ours)]
        judged = Judged(np.array(preference), lengths[0], lengths[1])
        assert side["value"] == refit_of(judged, UNPENALISED)(np.arange(40))
        # What a penalty takes away is little here, where there is much to find.
        assert side["value"] == pytest.approx(length_controlled(judged).win_rate, abs=3)


def test_the_interval_of_length_control_covers_a_true_difference() -> None:
    """45 against 55 %, lengths without meaning: a penalty sets such sides to 50 %."""
    generator, times, truth = np.random.default_rng(11), 40, 10.0
    covered, values, penalised = 0, [], []
    for time_ in range(times):
        hard, lengths = generator.random(200), generator.integers(500, 2500, size=(3, 200))
        sides = []
        for rate, own in zip((0.45, 0.55), lengths[1:], strict=True):
            # Half of the instructions are as hard for one model as for the other.
            luck = np.where(np.arange(200) % 2, hard, generator.random(200))
            preference = 1 + (luck < rate).astype(np.float64)
            sides.append([Judged(preference, lengths[0], own)])
        found = compared_length_control(sides, Resampling(100, 50, time_))["difference"]
        covered += found["low"] <= truth <= found["high"]
        values.append(found["value"])
        if time_ < 15:
            fits = [length_controlled(side[0]).win_rate for side in sides]
            penalised.append(fits[1] - fits[0])
    # The standard error of a difference is some 4.3 points, that of the mean 0.7; with 50
    # resamples the ends of the interval are rough.
    assert np.mean(values) == pytest.approx(truth, abs=2)
    assert covered >= 0.87 * times
    assert np.mean(penalised) < 0.75 * truth


def test_a_full_fit_that_the_penalty_empties_is_fitted_without_and_it_is_said(
    tmp_path: Path,
) -> None:
    files = calibration(tmp_path, 30, 30)
    for name, win in (("a", 1), ("b", 2)):
        # As many wins as losses, and nothing that explains them.
        rows = [annotation(i, 1.0 + (i % (win + 1) == 0)) for i in range(30)]
        write_annotations(tmp_path / name, rows)
    files.gamed.write_text(
        "index,preference,std_delta_len,instruction_difficulty\n"
        + "".join(f"{i},0.5,{(-1) ** i},{math.cos(i)}\n" for i in range(30))
    )
    found = results(tmp_path / "a", tmp_path / "b", lengths=files)
    only = pair(found, CONTROLLED)
    assert only["unpenalised"]
    assert any("without a coefficient of its own" in note for note in found["notes"])
    assert only["sides"][1]["value"] < 45


def test_files_of_official_instructions_are_not_asked_of_others(tmp_path: Path) -> None:
    files = calibration(tmp_path, 30, 10)
    for seed, name in enumerate("ab"):
        write_annotations(tmp_path / name, model_rows(seed, 30))
    official = LengthFiles(files.gamed, files.difficulty, official_only=True)
    found = results(tmp_path / "a", tmp_path / "b", lengths=official)
    assert pair(found, MINIMAL)["rows"] == 30
    assert not any("instructions=FILE" in note for note in found["notes"])


def test_difficulties_that_cannot_be_told_are_left_out_and_it_is_said(tmp_path: Path) -> None:
    files = calibration(tmp_path, 30, 10)
    for seed, name in enumerate("ab"):
        write_annotations(tmp_path / name, model_rows(seed, 30))
    by_position = LengthFiles(files.gamed, files.difficulty, None)
    found = results(tmp_path / "a", tmp_path / "b", lengths=by_position)
    assert pair(found, MINIMAL)["rows"] == 30
    assert any("Give instructions=FILE" in note for note in found["notes"])


def test_names_are_short_and_different() -> None:
    assert short_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert short_names(["runs/a/seed*", "runs/b/seed*/"]) == ["a", "b"]
    assert short_names(["runs/a/x", "runs/b"]) == ["a/x", "b"]
    assert short_names(["./runs/a", "runs/a"]) == ["a", "a (2)"]
    assert short_names(["/x/a/evaluations/y", "/x/b/evaluations/y"]) == ["a", "b"]
    assert short_names(["a"]) == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ('[{"instruction": "x"}]', "'output_1' is missing"),
        ('{"win_rate": 3}', "'instruction' is missing"),
    ],
)
def test_a_file_that_is_no_evaluation_is_told(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "annotations.json").write_text(content)
    with pytest.raises(EvalError, match=message):
        read_sides([str(tmp_path)])


def test_what_lies_beside_an_evaluation_is_checked(tmp_path: Path) -> None:
    write_annotations(tmp_path, [annotation(0, 1.5), annotation(1, 1.5, annotator="other")])
    with pytest.raises(EvalError, match="judgements of judge, other; expected one"):
        read_sides([str(tmp_path)])
    write_annotations(tmp_path, [annotation(0, 1.5)])
    for text in ('{"entropy": {"x": 2}}', '{"entropy": {"x": "y"}}', '{"entropy": []}'):
        (tmp_path / "dispersion.json").write_text(text)
        with pytest.raises(EvalError, match="expected an entropy above 0"):
            read_sides([str(tmp_path)])
    (tmp_path / "dispersion.json").write_text('{"reference": "r", "entropy": {"x": null}}')
    assert read_sides([str(tmp_path)])[0].members[0].evaluations[0].entropies == {}


def test_a_table_that_is_none_of_pairs_is_told(tmp_path: Path) -> None:
    path = tmp_path / "preferences_x.parquet"
    path.write_text("no parquet")
    with pytest.raises(EvalError, match="is no table of pairs"):
        read_sides([str(path)])
    pq.write_table(pa.table({"pair_id": ["a"], "win": [1.0]}), path)
    with pytest.raises(EvalError, match="is no table of pairs"):
        read_sides([str(path)])


@pytest.mark.parametrize("win", [math.nan, math.inf, -0.5, 2.0])
def test_a_win_that_is_none_is_refused(tmp_path: Path, win: float) -> None:
    path = tmp_path / "preferences_x.parquet"
    write_preferences(path, [("x", "p", 1.0, None), ("y", "q", win, None)])
    with pytest.raises(EvalError, match=r"preferences_x\.parquet: 'win' is .* 1 of 2 .* as y;"):
        read_sides([str(path)])


def test_places_without_an_evaluation_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="nothing is at"):
        read_sides([str(tmp_path / "none")])
    with pytest.raises(EvalError, match="nothing matches"):
        read_sides([str(tmp_path / "none*")])
    (tmp_path / "run" / "evaluations").mkdir(parents=True)
    with pytest.raises(EvalError, match=r"Evaluate it first: mallowspo eval alpacaeval model="):
        read_sides([str(tmp_path / "run")])
    (tmp_path / "run" / "evaluations" / "preferences_hh.json").write_text("{}")
    with pytest.raises(EvalError, match="of an older version"):
        read_sides([str(tmp_path / "run")])


def test_two_runs_of_805_judgements_are_compared_in_seconds(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, i, i / 5, 805) for i, name in enumerate("ab")]
    sides = read_sides([str(run) for run in runs])
    start = time.process_time()
    compare(sides, Resampling())
    assert time.process_time() - start < 10
