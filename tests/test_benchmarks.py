"""The comparisons count and compare right; what needs TRL is measured by hand."""

import importlib
import json
import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mallowspo_cli.files import write_json

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    """A script of benchmarks/, which is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module(name)


measure, against_trl, one_side = load("measure"), load("against_trl"), load("one_side")
sides, trainers = load("sides"), load("trainers")

SETTING = sides.Setting(
    lengths="hh",
    max_length=64,
    too_long="drop",
    pairs=2,
    batches=2,
    device_batch=2,
    tuned_batch=1,
    pack_tokens=128,
    model="cpu_small",
    vocab=97,
    checkpointing="none",
    device="cpu",
    precision="fp32",
)


def fake_round(ours: float, theirs: float) -> dict[str, dict[str, float]]:
    """Figures with these pairs/s; every side but ours has the same."""
    keys = ("cpu_s", "wall_s", "useful_tokens_per_s")
    return {
        name: {"pairs_per_s": ours if name == "mallowspo" else theirs, **dict.fromkeys(keys, 1.0)}
        for name in against_trl.SIDES
    }


def test_too_long_pairs_are_dropped_or_cut() -> None:
    lengths = [(10, 5, 6), (10, 5, 7), (16, 1, 1), (15, 9, 1)]
    assert measure.fit_lengths(lengths, 16, "drop") == [(10, 5, 6)]
    assert measure.fit_lengths(lengths, 16, "cut") == [(10, 5, 6), (10, 5, 6), (15, 1, 1)]


@pytest.mark.parametrize("name", ["dpo", "hh"])
def test_known_lengths_give_enough_pairs_for_the_defaults(name: str) -> None:
    fitting = measure.fit_lengths(measure.known_lengths(name), 512, "drop")
    assert len(fitting) >= 4 * against_trl.BATCHES[name]
    assert min(min(row) for row in fitting) > 0


def test_drawn_pairs_are_different_ones_and_the_same_every_time() -> None:
    lengths = [(n, 1, 1) for n in range(20)]
    drawn = measure.draw_lengths(lengths, 20)
    assert sorted(drawn) == lengths != drawn
    assert measure.draw_lengths(lengths, 5) == drawn[:5]
    with pytest.raises(ValueError, match="asked for 21 pairs, of which 20 fit"):
        measure.draw_lengths(lengths, 21)


def test_random_pairs_have_the_lengths_and_the_vocabulary() -> None:
    pairs = measure.random_pairs([(3, 2, 1), (4, 5, 6)], 7)
    assert [(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs] == [
        (3, 2, 1),
        (4, 5, 6),
    ]
    assert len({p.pair_id for p in pairs}) == 2
    assert max(int(p.prompt.max()) for p in pairs) < 7
    again = measure.random_pairs([(3, 2, 1), (4, 5, 6)], 7)
    assert [p.pair_id for p in again] == [p.pair_id for p in pairs]


def test_padded_tokens_are_counted_by_batch() -> None:
    # Rows of 5 and of 4: 2 rows a pair, 20 padded tokens a batch of two, 7 + 6 shared.
    assert measure.padded_over_shared([(3, 2, 2), (2, 2, 2)], 2) == pytest.approx(20 / 13)
    assert measure.padded_over_shared([(3, 2, 2), (2, 2, 2)], 1) == pytest.approx(18 / 13)


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # Not the ratio of the medians, which would be 20 / 8.
    rounds = [fake_round(10, 5), fake_round(20, 8), fake_round(30, 10)]
    ratios, ranges = measure.ratios_of(rounds, "mallowspo")
    assert set(ratios) == set(against_trl.SIDES) - {"mallowspo"}
    assert ratios["trl_tuned"] == 2.5
    assert ranges["trl_tuned"] == {"min": 2.0, "max": 3.0}
    assert measure.medians_of(rounds)["mallowspo"]["pairs_per_s"] == 20


def test_peak_memory_is_what_was_held_at_once() -> None:
    def work() -> None:
        np.ones(64 * 2**20, dtype=np.uint8).sum()
        np.ones(32 * 2**20, dtype=np.uint8).sum()

    assert 50 < measure.peak_rss(work) < 90


def arrays(**changed: Any) -> dict[str, Any]:
    """A side's numbers."""
    found = {"logps": [[-9.0, -8.0]], "loss": [0.7], "gradient_norm": [5.0], "gradient": [3.0, 4.0]}
    return {name: np.array(value) for name, value in {**found, **changed}.items()}


def test_differences_are_relative_and_of_the_gradient_as_a_vector() -> None:
    found = one_side.differences(arrays(), arrays(gradient=[3.0, 4.5], logps=[[-9.0, -8.8]]))
    assert found == pytest.approx({"logps": 0.1, "loss": 0, "gradient_norm": 0, "gradient": 0.1})
    with pytest.raises(ValueError, match="logps"):
        one_side.differences(arrays(), arrays(logps=[[-9.0, -8.0]] * 2))


@pytest.mark.parametrize("value", [2e-5, math.nan])
def test_a_side_that_differs_is_named(value: float) -> None:
    same = one_side.differences(arrays(), arrays())
    assert one_side.beyond_limits({"trl_tuned": same}) == []
    lines = one_side.beyond_limits({"trl_tuned": {**same, "logps": value}})
    assert len(lines) == 1
    assert lines[0].startswith("trl_tuned: logps differs")


def test_no_number_is_given_where_sides_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def process(name: str, _purpose: str, _setting: Any, scratch: Path) -> dict[str, str]:
        other = {} if name != "trl_precompute" else {"loss": [0.8]}
        np.savez(scratch / f"{name}.npz", **arrays(**other))
        return {"arrays": str(scratch / f"{name}.npz")}

    monkeypatch.setattr(against_trl, "process", process)
    with pytest.raises(SystemExit) as stopped:
        against_trl.compare(SETTING, tmp_path)
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("trl_precompute: loss differs by 1.4e-01")


@pytest.mark.parametrize("memory", [False, True])
def test_the_file_holds_ratios_beside_the_rounds(
    memory: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = [fake_round(10, 5), fake_round(20, 8)]
    peaks = {name: {"peak_mib": 400.0} for name in against_trl.SIDES} if memory else None
    if peaks:
        peaks["mallowspo"]["peak_mib"] = 100.0
    machine = measure.machine()
    found = against_trl.report(SETTING, rounds, {"time": {}}, peaks, machine)
    write_json(tmp_path / "found.json", found)
    read = json.loads((tmp_path / "found.json").read_text())
    sides_of_theirs = ("trl_default", "trl_precompute", "trl_tuned", "full_logits_cached")
    assert read["ratios"] == dict.fromkeys(sides_of_theirs, 2.25)
    assert read["ratio_ranges"]["trl_tuned"] == {"min": 2.0, "max": 2.5}
    assert [set(row) for row in read["rounds"]] == [set(against_trl.SIDES)] * 2
    assert read["pairs_per_batch"] == 2
    assert {"lengths", "checkpointing", "vocab", "parity", "versions", "machine"} <= set(read)
    assert ("peak_memory_ratio" in read) == memory
    if memory:
        assert read["peak_memory_ratio"]["trl_default"] == 4
    against_trl.show(found)
    assert "2.25 (2.00 to 2.50)" in capsys.readouterr().out


def test_our_step_is_the_plain_one(tmp_path: Path) -> None:
    """Log-probs, losses and gradients, with micro-batches and packs smaller than the batch."""
    checked = {}
    for name, setting in (
        ("mallowspo", SETTING),
        ("full_logits_cached", replace(SETTING, device_batch=1, checkpointing="full")),
    ):
        side = sides.side_class(name)(setting)
        one_side.parity_of(side, tmp_path / f"{name}.npz")
        checked[name] = np.load(tmp_path / f"{name}.npz")
    found = one_side.differences(*checked.values())
    assert one_side.beyond_limits({"plain": found}) == []
    assert checked["mallowspo"]["loss"] == pytest.approx([math.log(2)] * 2)
    assert checked["mallowspo"]["gradient_norm"][0] > 0


def test_a_trainer_that_starts_elsewhere_or_ends_elsewhere_is_named() -> None:
    good = {"first_loss": math.log(2), "last_loss": 0.69}
    row = {
        "mallowspo": good,
        "trl_default": {**good, "last_loss": 0.68},
        "trl_tuned": {**good, "first_loss": math.nan},
    }
    lines = trainers.broken(row)
    assert [line.split(":")[0] for line in lines] == ["trl_default", "trl_tuned"]


def test_trainers_are_compared_with_and_without_the_reference_pass(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = Namespace(
        pairs=8, max_length=64, global_batch=4, device_batch=2, checkpointing="none", model="tiny"
    )
    cpu = {"mallowspo": 4, "mallowspo_full_store": 2, "trl_default": 8, "trl_tuned": 6}
    row = {
        name: trainers.rates(
            options, {"wall_s": 1.0, "cpu_s": cpu[name], "peak_rss_mib": 1.0}, 2.0, [0.7, 0.6]
        )
        for name in trainers.SIDES
    }
    found = trainers.report(options, [row], measure.machine())
    assert found["ratios"]["mallowspo/pairs_per_cpu_s"] == {"trl_default": 2, "trl_tuned": 1.5}
    assert found["ratios"]["mallowspo_full_store/pairs_per_cpu_s"]["trl_default"] == 4
    assert found["ratios"]["mallowspo/loop_pairs_per_s"]["trl_tuned"] == 1
    trainers.show(found)
    assert "whole process, CPU" in capsys.readouterr().out


def test_coverage_is_counted_against_the_true_difference() -> None:
    coverage = load("interval_coverage")
    row = coverage.seeds_row(40, (1, 1), 0.0, 40)
    # Three standard errors below 95 %.
    assert row["covered"] >= 0.85
    generator, one = np.random.default_rng(0), np.linspace(0, 1, 40)[None]
    drawn = coverage.preferences(generator, generator.normal(size=200_000), 1, 0.3, 0.0)
    assert drawn.mean() == pytest.approx(coverage.true_mean(0.3, 0.0), abs=0.005)
    for interval in (coverage.in_use(one, one + 2, 0), coverage.two_level(one, one + 2, 0)):
        assert interval == pytest.approx((2, 2))
