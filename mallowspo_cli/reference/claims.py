"""Who works on what, among processes that share a directory and nothing else.

A claim is a file that one process creates and keeps touching. A claim whose process died, or that
was not touched for a while, may be taken over. Two processes can then work on one thing for a
moment; what they write is the same, so nothing breaks.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mallowspo_cli.distributed import heartbeat

STALE_SECONDS = 60.0
"""Silence after which a claim on another machine is taken over."""


class Claims:
    """The claims of one process in a directory."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._signs: dict[str, tuple[int, float]] = {}

    @contextmanager
    def held(self, name: str) -> Iterator[bool]:
        """Claim `name` for the block; yields whether it is ours."""
        file = self.directory / name
        if not (self._create(file) or (self._abandoned(file) and self._take_over(file))):
            yield False
            return
        try:
            with heartbeat(file):
                yield True
        finally:
            file.unlink(missing_ok=True)

    def _create(self, file: Path) -> bool:
        owner = {"host": socket.gethostname(), "process": os.getpid()}
        try:
            # Made in one step, also on a shared file system: two cannot both succeed.
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as stream:
            json.dump(owner, stream)
        return True

    def _take_over(self, file: Path) -> bool:
        file.unlink(missing_ok=True)
        return self._create(file)

    def _abandoned(self, file: Path) -> bool:
        try:
            sign, text = file.stat().st_mtime_ns, file.read_text()
        except FileNotFoundError:
            return True
        try:
            owner = json.loads(text)
            here = owner["host"] == socket.gethostname()
            if here and not process_alive(int(owner["process"])):
                return True
        except (ValueError, KeyError, TypeError):
            # Not written yet, or cut off: its age decides.
            pass
        # Ages are told by our own clock; that of a file server may be another.
        last, since = self._signs.get(file.name, (None, 0.0))
        if sign != last:
            self._signs[file.name] = (sign, time.monotonic())
            return False
        return time.monotonic() - since > STALE_SECONDS


def process_alive(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
