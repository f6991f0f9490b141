"""Runs the command line as a user does."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure

from mallowspo_cli.__main__ import main
from tests.conftest import pair_rows


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def mallowspo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """A function that runs `mallowspo WORDS` with `tmp_path` as the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Figure, "savefig", _save_plots_once)

    def run(*words: str) -> Outcome:
        # Accelerate keeps the precision of the first Accelerator of a process.
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", ["mallowspo", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return Outcome(stop.value.code or 0, out, err)

    return run


_savefig = Figure.savefig
_plots: dict[str, bytes] = {}


def _save_plots_once(figure: Figure, file: Path, **options: Any) -> None:
    """The plots of a training run are half of its time here: each is rasterised for the first run
    of a process, and is the same bytes for later ones. Other pictures are always drawn."""
    name = file.name.rpartition(".png")[0] if file.parent.name == "plots" else None
    if name in _plots:
        file.write_bytes(_plots[name])
        return
    _savefig(figure, file, **options)
    if name is not None:
        _plots[name] = file.read_bytes()


@pytest.fixture
def mallowspo_process(tmp_path: Path) -> Command:
    """The same in a process of its own."""

    def run(*words: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "mallowspo_cli", *words],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def tiny_words(write_rows: Callable[..., Path]) -> list[str]:
    """Words that make any recipe a run of seconds: a random model, 12 training pairs, float32."""
    path = write_rows(pair_rows(16))
    return [
        "recipe=quickstart",
        "model=tiny_random",
        "dataset=local",
        f"dataset.path={path}",
        "dataset.eval_size=4",
        "train.precision=fp32",
        "train.global_batch_size=4",
        "train.epochs=2",
        "train.max_steps=6",
        "train.learning_rate=1e-3",
        "eval.kl_prompts=0",
        "checkpoint.every=2",
        "checkpoint.keep=9",
        "name=tiny",
    ]
