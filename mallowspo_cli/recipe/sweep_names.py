"""Names of a sweep's jobs: short, readable, safe as file names."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from mallowspo_cli.recipe.find import GROUPS

CHOSEN = ("recipe", *GROUPS)
"""Keys that say enough by their values alone."""
LONGEST_NAME = 100

Value = str | int | float | bool | None


def labels_of(keys: Sequence[str]) -> dict[str, str]:
    """Each key's last part; the whole key where two have the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: safe(key if last.count(short) > 1 else short)
        for key, short in zip(keys, last, strict=True)
    }


def job_names(chosen: Sequence[dict[str, Value]], labels: dict[str, str]) -> list[str]:
    """A name for each choice of values; a digest of them tells those apart that look the same."""
    names = ["-".join(_part(k, v, labels[k]) for k, v in values.items()) for values in chosen]
    return [
        name
        if names.count(name) == 1 and len(name) <= LONGEST_NAME
        else f"{name[:LONGEST_NAME]}-{_digest(values)}"
        for name, values in zip(names, chosen, strict=True)
    ]


def safe(text: str) -> str:
    """Letters, digits, _ and -, and points between digits."""
    kept = re.sub(r"[^\w.-]+|(?<!\d)\.|\.(?!\d)", "_", text, flags=re.ASCII)
    return kept.strip("_") or "_"


def _part(key: str, value: Value, label: str) -> str:
    text = _text(value)
    if key in CHOSEN:
        return safe(Path(text).stem if text.endswith(".yaml") else text)
    return f"{label}{safe(text)}"


def _text(value: Value) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, float):
        return str(value)
    # 1e-5 and not 1e-05; 0.3 and not 0.30000000000000004.
    return re.sub(r"e(-?)\+?0*", r"e\1", f"{value:.6g}")


def _digest(values: dict[str, Value]) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=3).hexdigest()
