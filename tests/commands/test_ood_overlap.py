"""Data sets of the out-of-distribution experiment that are one another's, or parts of one."""

from pathlib import Path

import pytest

from mallowspo_cli.commands.ood_overlap import same_data
from mallowspo_cli.recipe.schema import DatasetConfig, PartConfig

MIXTURE = DatasetConfig(
    path=None,
    parts={"one": PartConfig(path="org/one"), "two": PartConfig(path="org/two", data_dir="b")},
)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (DatasetConfig(path="org/one"), DatasetConfig(path="org/one"), True),
        (DatasetConfig(path="org/one"), DatasetConfig(path="org/two"), False),
        # A part of it, and two parts.
        (DatasetConfig(path="org/one"), DatasetConfig(path="org/one", data_dir="a"), True),
        (DatasetConfig(path="x", data_dir="a"), DatasetConfig(path="x", data_dir="b"), False),
        (DatasetConfig(path="x", subset="a"), DatasetConfig(path="x", subset="b"), False),
        (DatasetConfig(path="org/one"), MIXTURE, True),
        (DatasetConfig(path="org/two"), MIXTURE, True),
        (DatasetConfig(path="org/two", data_dir="b"), MIXTURE, True),
        (DatasetConfig(path="org/two", data_dir="c"), MIXTURE, False),
        (DatasetConfig(path="org/three"), MIXTURE, False),
    ],
)
def test_data_is_the_same_where_a_source_is_or_holds_a_source_of_the_other(
    one: DatasetConfig, other: DatasetConfig, expected: bool
) -> None:
    assert same_data(one, other) is expected
    assert same_data(other, one) is expected


def test_a_file_is_the_same_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pairs.jsonl").write_text("")
    (tmp_path / "link.jsonl").symlink_to("pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    whole = DatasetConfig(path=str(tmp_path / "pairs.jsonl"))
    for name in ("pairs.jsonl", "./pairs.jsonl", "link.jsonl"):
        assert same_data(whole, DatasetConfig(path=name))
