"""Evaluations on disk, as `mallowspo eval` leaves them, for comparisons."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def annotation(number: int, preference: float | None, **others: Any) -> dict[str, Any]:
    """A judged answer to instruction `number`."""
    row = {
        "instruction": f"Instruction {number}",
        "output_1": "b" * (100 + number % 7),
        "generator_1": "base",
        "output_2": f"answer {number}",
        "generator_2": "model",
        "annotator": "judge",
        "preference": preference,
    }
    return row | others


def write_annotations(
    directory: Path, rows: Sequence[dict[str, Any]], judging: dict[str, Any] | None = None
) -> Path:
    """An evaluation's directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "annotations.json").write_text(json.dumps(list(rows)))
    if judging is not None:
        lines = [judging, {"answer": "of the judge"}]
        (directory / "judgements.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return directory


def write_preferences(path: Path, rows: Sequence[tuple[str, str, float, float | None]]) -> Path:
    """A table of (pair id, prompt, win, w)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ids, prompts, wins, weights = zip(*rows, strict=True)
    table = {"pair_id": ids, "prompt": prompts, "win": wins, "margin": wins}
    pq.write_table(pa.table({**table, "weight": pa.array(weights, pa.float64())}), path)
    return path


def write_dispersion(directory: Path, entropies: dict[int, float], reference: str = "ref") -> None:
    named = {f"Instruction {number}": value for number, value in entropies.items()}
    (directory / "dispersion.json").write_text(
        json.dumps({"reference": reference, "entropy": named})
    )


def model_rows(
    seed: int, count: int = 60, quality: float = 0.0, name: str = "model", judge: str = "judge"
) -> list[dict[str, Any]]:
    """Annotations whose preferences go with the instruction, the quality, and the length."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length = int(80 + 60 * generator.random())
        score = quality + math.sin(number) + (length - 110) / 40 + generator.normal()
        rows.append(
            annotation(
                number,
                1 + 1 / (1 + math.exp(-score)),
                output_2=name + "x" * length,
                generator_2=name,
                annotator=judge,
            )
        )
    return rows


def write_run(run: Path, seed: int, quality: float = 0.0, count: int = 60) -> Path:
    """A run with a judged evaluation and held-out pairs."""
    write_annotations(
        run / "evaluations" / "alpacaeval", model_rows(seed, count, quality, run.name)
    )
    generator = np.random.default_rng(seed + 1000)
    wins = (generator.random(count) < 0.6 + quality / 10).astype(float)
    weights = np.exp(np.cos(np.arange(count))).tolist()
    rows = [(f"pair{i}", f"prompt{i // 2}", float(wins[i]), weights[i]) for i in range(count)]
    write_preferences(run / "evaluations" / "preferences_hh.parquet", rows)
    return run
