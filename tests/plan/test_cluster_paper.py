"""The tables of docs/cluster.md are those of the script, and say what the plan says."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_benchmarks import load

paper = load("cluster_paper")
DOCS = Path(__file__).parents[2] / "docs"


def rows(recipe: str, model: str, hardware: str, models: Path) -> list[dict[str, Any]]:
    paper.MODELS[model].save_pretrained(models / model)
    return list(paper.rows_of(paper.Task(recipe, model, "UltraFeedback", hardware), models))


def test_eight_billion_parameters_do_not_fit_on_one_gpu(tmp_path: Path) -> None:
    (row,) = rows("llama3_phi", "llama3_8b", "h100", tmp_path)
    assert (row["parameters"], row["fits"]) == (8_030_261_248, False)
    memory = row["memory_gib"]
    states = memory["weights"] + memory["gradients"] + memory["optimizer"]
    assert states == pytest.approx(16 * 8.03e9 / 2**30, rel=1e-3)
    (warning,) = row["warnings"]
    for way in ("model.lora.rank", "zero3_offload.yaml", "take 4xh100"):
        assert way in warning


def test_sixty_four_gpus_send_for_a_second(tmp_path: Path) -> None:
    row = rows("llama3_phi", "llama3_8b", "64xh100", tmp_path)[0]
    # 256 pairs are four for each GPU, one pack; 47.4 GB at 50 GB/s.
    assert row["packs"] == 1
    assert row["traffic_s"] == row["step_s"] == pytest.approx(0.949, rel=1e-2)
    # 59,876 pairs are 233 steps.
    assert row["training_h"] == pytest.approx(233 * row["step_s"] / 3600)
    assert row["step_apart_s"] == pytest.approx(row["traffic_s"] + row["compute_s"])


@pytest.mark.parametrize(
    ("model", "parameters"),
    # Published: 2.8B (2,775,208,960 with an untied output layer) and 774M.
    [("pythia_2_8b", 2_775_208_960), ("gpt2_large", 774_030_080)],
)
def test_configurations_have_the_published_parameters(
    model: str, parameters: int, tmp_path: Path
) -> None:
    recipe = {"pythia_2_8b": "hh_pythia_phi", "gpt2_large": "imdb_gpt2_phi"}[model]
    assert rows(recipe, model, "h100", tmp_path)[0]["parameters"] == parameters


def test_the_document_has_every_line_of_the_file() -> None:
    found = json.loads((DOCS / "results" / "cluster" / "paper.json").read_text())
    text = (DOCS / "cluster.md").read_text()
    assert found["on_paper"]
    assert "No number of this section was measured" in text
    for row in found["rows"]:
        lines = [paper.time_line(row)] if row["fits"] else []
        lines += [paper.memory_line(row)] if row["bandwidth"] is None else []
        for line in lines:
            assert f"| {' | '.join(line)} |" in text
