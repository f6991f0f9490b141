"""Files are whole or absent, and caches lie where the user says."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from mallowspo_cli.errors import MallowsPOError
from mallowspo_cli.files import (
    cache_directory,
    make_directory,
    sha256,
    whole_directory,
    whole_file,
    write_json,
    write_text,
)


def test_the_cache_is_the_named_one_then_xdgs_then_the_homes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MALLOWSPO_CACHE", "~/named")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory() == tmp_path / "named"
    monkeypatch.delenv("MALLOWSPO_CACHE")
    assert cache_directory() == Path("/xdg/mallowspo")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_directory() == tmp_path / ".cache/mallowspo"


def test_a_directory_is_made_with_its_parents_and_left_empty(tmp_path: Path) -> None:
    path = make_directory(tmp_path / "a/b", "things")
    assert path == make_directory(path, "things") == tmp_path / "a/b"
    assert list(path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_directory_that_cannot_be_is_refused_in_one_line(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / below
    with pytest.raises(MallowsPOError) as caught:
        make_directory(path, "the reference store")
    message = str(caught.value)
    assert message.startswith(f"cannot write the reference store in {path}: ")
    assert "\n" not in message


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with whole_file(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("killed")

    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "parent/directory"
    with whole_directory(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner/file").write_text("text")
        assert not path.exists()
    assert (path / "inner/file").read_text() == "text"
    assert list(path.parent.iterdir()) == [path]


def test_a_directory_that_fails_half_way_is_absent(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_directory(tmp_path / "directory") as temporary:
            (temporary / "file").write_text("te")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_another_process_made_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    with whole_directory(path) as temporary:
        (temporary / "ours").write_text("")
        path.mkdir()
        (path / "theirs").write_text("")
    assert [p.name for p in path.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_whole_directory_can_be_read_by_others(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "directory"):
        pass
    assert (tmp_path / "directory").stat().st_mode & 0o777 == 0o755


def test_text_is_written_as_utf_8(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "ä\n")
    assert (tmp_path / "file").read_bytes() == "ä\n".encode()


def test_json_is_written_sorted_and_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"b": "ä", "a": [1, None]})
    text = (tmp_path / "file").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [1, None], "b": "ä"}
    assert text.index('"a"') < text.index('"b": "ä"')
    assert text.endswith("}\n")


def test_what_is_no_json_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "file", {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    content = os.urandom(1 << 17)
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
