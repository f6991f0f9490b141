"""summary.json: AlpacaEval's keys, the right fit under the right name, and why one is missing."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.outputs import Annotation
from mallowspo_cli.evaluation.win_rates.summary import LengthData, summarise

ALPACA_KEYS = {
    *("win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total"),
    *("discrete_win_rate", "length_controlled_winrate", "lc_standard_error", "avg_length"),
}
NOTHING = LengthData(None, None, None)


def rows(count: int = 40, names: tuple[str, str] = ("base", "model")) -> list[Annotation]:
    """Judgements that go by length in part."""
    generator = np.random.default_rng(0)
    found = []
    for index in range(count):
        theirs, ours = (int(size) for size in generator.integers(5, 80, 2))
        preference = 1 + float(generator.random() < 0.3 + 0.4 * (ours > theirs))
        found.append(
            Annotation(
                f"instruction {index}",
                "x" * theirs,
                names[0],
                "y" * ours,
                names[1],
                "j",
                preference,
            )
        )
    return found


def files(tmp_path: Path, count: int = 40) -> tuple[Path, Path]:
    """df_gamed.csv and instruction_difficulty.csv, with the instructions' texts in the latter."""
    difficulty, gamed = tmp_path / "difficulty.csv", tmp_path / "gamed.csv"
    lines = [f"instruction {i},{i},{math.sin(i)}" for i in range(count)]
    difficulty.write_text("\n".join(["instruction,index,instruction_difficulty", *lines]) + "\n")
    head = "model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"
    lines = [
        f"g{k},{i},{0.3 + 0.4 * (i % 2)},{(i % 9) / 3 - 1},{math.sin(i)},False"
        for k in range(2)
        for i in range(count)
    ]
    gamed.write_text("\n".join([head, *lines]) + "\n")
    return gamed, difficulty


def test_the_keys_are_alpacaevals_and_the_figures_theirs(tmp_path: Path) -> None:
    gamed, difficulty = files(tmp_path)
    found = summarise(rows(), LengthData(gamed, difficulty, None))
    assert found.keys() >= ALPACA_KEYS
    wins = [row.preference - 1 for row in rows()]
    assert found["win_rate"] == pytest.approx(100 * np.mean(wins))
    assert found["n_wins"] + found["n_wins_base"] == found["n_total"] == 40
    low, high = (found[f"length_controlled_winrate_{end}"] for end in ("low", "high"))
    assert low < found["length_controlled_winrate"] < high
    assert found["length_control"]["fit"] == "length_controlled_v1"


def test_sides_of_one_name_are_judged_by_their_answers() -> None:
    """Two runs may both be called seed0."""
    same = summarise(rows(names=("seed0", "seed0")), NOTHING)
    other = summarise(rows(), NOTHING)
    assert same["length_controlled_minimal_winrate"] == other["length_controlled_minimal_winrate"]
    assert same["length_controlled_minimal_winrate"] != 50


def test_the_baseline_against_itself_is_50_without_a_fit() -> None:
    own = [
        Annotation(row.instruction, row.output_1, "base", row.output_1, "base", "j", 1.5)
        for row in rows()
    ]
    found = summarise(own, NOTHING)
    assert found["length_controlled_winrate"] == found["win_rate"] == 50
    assert found["lc_standard_error"] == 0


def test_without_difficulties_the_reason_is_told_and_the_stand_in_has_its_own_name() -> None:
    found = summarise(rows(), LengthData(None, None, None, "no hub"))
    assert found["length_controlled_winrate"] is None
    assert found["lc_standard_error"] is None
    assert found["length_control"]["reason"] == "no hub"
    assert found["length_controlled_minimal_winrate_low"] < found["win_rate"]


def test_without_gamed_rows_the_fit_has_its_own_name(tmp_path: Path) -> None:
    _, difficulty = files(tmp_path)
    found = summarise(rows(), LengthData(None, difficulty, None))
    assert found["length_controlled_winrate"] is None
    assert 0 < found["length_controlled_noreg_winrate"] < 100
    assert any("gamed=FILE" in note for note in found["notes"])


def test_too_few_judgements_leave_length_control_out_and_say_so() -> None:
    found = summarise(rows(4), NOTHING)
    assert found["length_controlled_winrate"] is None
    assert "length_controlled_minimal_winrate" not in found
    assert any("no length-controlled win rate" in note for note in found["notes"])


@pytest.mark.parametrize("field", ["generator_1", "generator_2"])
def test_files_of_several_models_are_refused(field: str) -> None:
    mixed: list[Any] = rows()
    mixed[3] = Annotation(**{**vars(mixed[3]), field: "another"})
    with pytest.raises(EvalError, match=f"2 values of {field}"):
        summarise(mixed, NOTHING)
