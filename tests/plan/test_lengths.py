"""Lengths from a file obey the recipe's limits as tokens do."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mallowspo_cli.data.tokenize import _fit
from mallowspo_cli.errors import DataError
from mallowspo_cli.plan.lengths import _within, read_lengths
from mallowspo_cli.recipe.choices import Truncation
from mallowspo_cli.recipe.schema import DatasetConfig

FILES = Path(__file__).parents[2] / "benchmarks" / "lengths"
PART = st.integers(1, 20)


def config(**values: object) -> DatasetConfig:
    return DatasetConfig(path="unread", **values)  # type: ignore[arg-type]


def written(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


@given(
    st.lists(st.tuples(PART, PART, PART), min_size=1, max_size=20),
    st.integers(2, 30),
    st.none() | st.integers(1, 30),
    st.sampled_from(Truncation),
)
def test_limits_leave_what_they_leave_of_tokens(
    rows: list[tuple[int, int, int]], limit: int, prompts: int | None, truncation: Truncation
) -> None:
    limits = config(max_length=limit, max_prompt_length=prompts, truncation=truncation)
    expected = []
    for row in rows:
        # Responses of different tokens, so that none is dropped for being the same.
        parts = [np.full(size, value, np.int32) for value, size in enumerate(row)]
        fitted, _ = _fit(*parts, limits)
        if fitted is not None:
            expected.append([len(part) for part in fitted])
    assert _within(np.array(rows), limits).tolist() == expected


@pytest.mark.parametrize(
    ("name", "limit", "fitting", "of"),
    [("dpo_en_demo", 2048, 288, 300), ("hh_harmless_test", 512, 2240, 2312)],
)
def test_the_known_files_are_of_the_form(name: str, limit: int, fitting: int, of: int) -> None:
    found = read_lengths(FILES / f"lengths_{name}.json", config(max_length=limit))
    assert found.rows.shape == (fitting, 3)
    assert (found.rows[:, 0] + found.rows[:, 1:].max(axis=1) <= limit).all()
    assert f"{fitting:,} of {of:,} pairs fit" in found.about


def test_a_sample_is_repeated_to_the_number_of_pairs(tmp_path: Path) -> None:
    file = written(tmp_path / "a.json", {"lengths": [[1, 2, 3], [4, 5, 6], [9000, 1, 1]]})
    found = read_lengths(file, config(), pairs=5)
    assert found.rows.tolist() == [[1, 2, 3], [4, 5, 6]] * 2 + [[1, 2, 3]]
    assert "2 of 3 pairs fit, repeated" in found.about
    assert read_lengths(file, config(), pairs=1).rows.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    "value",
    [
        [[1, 2, 3]],
        {"rows": []},
        {"lengths": []},
        {"lengths": [[1, 2]]},
        {"lengths": [[1, 2, 3], [1, 2]]},
        {"lengths": [[1, 2, 0]]},
        {"lengths": [[1.5, 2, 3]]},
        {"lengths": "many"},
        {"columns": ["chosen", "rejected", "prompt"], "lengths": [[1, 2, 3]]},
    ],
)
def test_another_form_is_refused_with_what_is_expected(value: object, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Expected: "):
        read_lengths(written(tmp_path / "a.json", value), config())


def test_a_file_that_is_not_there_or_fits_nowhere_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file of lengths at"):
        read_lengths(tmp_path / "nothing.json", config())
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(DataError, match="holds no lengths"):
        read_lengths(tmp_path / "b.json", config())
    file = written(tmp_path / "a.json", {"lengths": [[100, 2, 3]]})
    with pytest.raises(DataError, match="none of the 1 pairs"):
        read_lengths(file, config(max_length=50))
