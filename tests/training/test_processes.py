"""The loss curve depends neither on the number of processes nor on how pairs lie in their packs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import one_rank

KEYS = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "dispersion/weight_mean")
# As it is before accelerate writes to it.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
RUNS = {"shared": (1, "auto"), "padded": (1, "sdpa"), "two processes": (2, "auto")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A short run in each way, by name."""
    places = {}
    for name, (processes, attention) in RUNS.items():
        place = tmp_path_factory.mktemp(name.replace(" ", "_"))
        places[name] = place
        if processes == 1:
            one_rank.main(place, attention)
            continue
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        words = ["-m", "tests.training.one_rank", str(place), attention]
        done = subprocess.run(
            [sys.executable, *launcher, *words],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            timeout=150,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return places


def curve(place: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return {key: [line[key] for line in lines if "loss" in line] for key in KEYS}


@pytest.mark.parametrize("other", ["padded", "two processes"])
def test_the_loss_curve_is_the_same(runs: dict[str, Path], other: str) -> None:
    expected, found = curve(runs["shared"]), curve(runs[other])
    assert len(expected["loss"]) == 6
    # The loss falls, or agreement would say little.
    assert expected["loss"][-1] < 0.9 * expected["loss"][0]
    for key in KEYS:
        assert found[key] == pytest.approx(expected[key], rel=2e-3, abs=2e-4), key


def test_the_runs_were_different_ones(runs: dict[str, Path]) -> None:
    packs = {name: json.loads((place / "packs.json").read_text()) for name, place in runs.items()}
    # Prompts twice and padding take more packs; two processes take about half of them each.
    assert sum(packs["padded"]) > sum(packs["shared"]) > sum(packs["two processes"])
    assert min(packs["two processes"]) > 1
