"""Pictures are whole or absent, and the same numbers give the same file."""

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mallowspo_cli.report.pictures import save_picture


def draw(axes: Axes) -> None:
    axes.plot([0, 1], [1, 0])


def test_it_is_a_png_at_its_path_and_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert save_picture(draw, path) == path
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")
    save_picture(draw, path)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_a_writing_that_fails_leaves_the_earlier_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_picture(draw, tmp_path / "a.png")
    first = path.read_bytes()

    def full(_figure: Figure, file: Path, **_options: object) -> None:
        file.write_bytes(first[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="no space"):
        save_picture(draw, path)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]
