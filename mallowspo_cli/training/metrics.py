"""metrics.jsonl: one object a line, never ahead of the newest checkpoint after a resume."""

import json
from pathlib import Path
from typing import Any

from mallowspo_cli.files import write_text


class MetricsFile:
    """Appends metrics of steps and evaluations."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, values: dict[str, Any]) -> None:
        """Write one line; values are floats, ints or None."""
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(values) + "\n")

    def cut_back(self, step: int) -> None:
        """Drop the lines behind optimizer step `step`, and a line that a kill left unfinished."""
        kept = [json.dumps(line) for line in read_metrics(self.path) if line["step"] <= step]
        write_text(self.path, "".join(line + "\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl; empty where there is none."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
