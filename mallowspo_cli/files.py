"""Files that are whole or absent, and where caches lie."""

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mallowspo_cli.errors import MallowsPOError


def cache_directory() -> Path:
    """$MALLOWSPO_CACHE, else mallowspo under $XDG_CACHE_HOME, else ~/.cache/mallowspo."""
    named = os.environ.get("MALLOWSPO_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mallowspo"


def make_directory(path: Path, what: str) -> Path:
    """Create `path`, or say in one line why `what` cannot lie there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise MallowsPOError(f"cannot write {what} in {path}: {error.strerror}.") from error
    return path


def sync(path: Path) -> None:
    """Make a file's or directory's content survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends without an error."""
    # Unique also between machines that share the directory.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends without an error.

    Where another process has made `path` meanwhile, its directory stays and ours goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        temporary.chmod(0o755)
        if not path.exists():
            temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all. What is no finite number becomes null."""
    plain = _finite(value)
    text = json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


SETTLED_SECONDS = 2.0
"""A file that was changed more recently could change again without its time telling."""


def content_digest(path: Path) -> str:
    """`sha256`, remembered in the user's cache by the file's place, size and time of change."""
    status = path.stat()
    if time.time() - status.st_mtime < SETTLED_SECONDS:
        return sha256(path)
    name = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}"
    memo = cache_directory() / "digests" / hashlib.sha256(name.encode()).hexdigest()
    try:
        return memo.read_text()
    except OSError:
        digest = sha256(path)
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_text(memo, digest)
    except OSError:
        # A cache that cannot be written only makes the next start slower.
        pass
    return digest
