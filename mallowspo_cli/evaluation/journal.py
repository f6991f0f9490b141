"""Results that survive a kill: one line each, written as soon as it is known."""

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from mallowspo_cli.errors import EvalError
from mallowspo_cli.files import make_directory


class Journal:
    """An append-only JSONL file whose first line says what made it.

    A kill loses the line that was being written, which the next opening removes. Use it as a
    context manager; one process at a time can hold it.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        """Open `path`, new or with earlier lines.

        Args:
            settings: plain values that all results share; those of an earlier file must be equal.

        Raises:
            EvalError: other settings made what is there (names them), or another process holds it.
        """
        make_directory(path.parent, "the evaluation")
        self.path, self.lines = path, []
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise EvalError(f"another process is writing {path}. Wait for it to end.") from error
        try:
            self._read(json.loads(json.dumps(settings)))
        except BaseException:
            self._file.close()
            raise

    def _read(self, settings: dict[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        found = [_object(line, self.path) for line in content[:whole].splitlines()]
        if not found:
            self.append(settings)
            self.lines.clear()
            return
        if differing := sorted(k for k in {*found[0], *settings} if _differ(k, found[0], settings)):
            told = "; ".join(
                f"{key} was {found[0].get(key)}, is {settings.get(key)}" for key in differing
            )
            raise EvalError(
                f"{self.path} was made otherwise ({told}). Give another output_dir=, set it back, "
                f"or remove the file."
            )
        self.lines = found[1:]

    def append(self, line: dict[str, Any]) -> None:
        """Write a line so that it stays."""
        self._file.write(json.dumps(line, ensure_ascii=True, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines.append(line)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _differ(key: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    return key not in one or key not in other or one[key] != other[key]


def _object(line: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise EvalError(f"{path} is damaged: {line[:60]!r} is no JSON. Remove the file.") from error
    if not isinstance(value, dict):
        raise EvalError(f"{path} is damaged: {line[:60]!r} is no object. Remove the file.")
    return value
