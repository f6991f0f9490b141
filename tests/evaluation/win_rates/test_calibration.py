"""Gamed judgements are read as they are, and broken files named with their row."""

import gzip
import math
from pathlib import Path

import pytest

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.win_rates.calibration import read_gamed

HEAD = "model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"


@pytest.mark.parametrize("zipped", [False, True])
def test_every_column_is_read(tmp_path: Path, zipped: bool) -> None:
    content = f"{HEAD}\nverbose,0,0.25,-1.5,0.125,False\r\nconcise,0,,1.5,0.125,False\n".encode()
    path = tmp_path / "df_gamed.csv"
    path.write_bytes(gzip.compress(content) if zipped else content)
    found = read_gamed(path)
    assert found.index.tolist() == [0, 0]
    assert found.preference[0] == 0.25
    assert math.isnan(found.preference[1])
    assert found.std_delta_len.tolist() == [-1.5, 1.5]
    assert found.instruction_difficulty.tolist() == [0.125, 0.125]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("m,0,1.5,0,0,False", "row 0: 'preference' is 1.5; expected 0 to 1"),
        ("m,0,x,0,0,False", "row 0: 'preference' is 'x'; expected a number"),
        ("m,0,0.5,,0,False", "row 0: 'std_delta_len' is ''"),
        ("m,0,0.5,0,nan,False", "row 0: 'instruction_difficulty' is 'nan'"),
        ("m,-1,0.5,0,0,False", "row 0: 'index' is '-1'"),
        ("m,0,0.5,0,0,True", "'not_gamed_baseline' is not False everywhere"),
        ("m,0,0.5,0,0", "row 0: 5 fields; expected 6"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, row: str, told: str) -> None:
    path = tmp_path / "df_gamed.csv"
    path.write_text(f"{HEAD}\n{row}\n")
    with pytest.raises(EvalError, match=told):
        read_gamed(path)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "df_gamed.csv"
    path.write_text("model,index,preference\nm,0,0.5\n")
    with pytest.raises(
        EvalError, match=r"no column 'std_delta_len', 'instruction_difficulty'\. It has: 'model'"
    ):
        read_gamed(path)


def test_no_file_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"cannot read .*df_gamed\.csv"):
        read_gamed(tmp_path / "df_gamed.csv")
