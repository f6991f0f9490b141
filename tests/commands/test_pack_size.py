"""The size of packs: the recipe's, the run's, the machine's, in this order."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mallowspo_cli.commands import pack_size
from mallowspo_cli.commands.launch import Launch
from mallowspo_cli.commands.pack_size import OTHERWISE, pack_tokens_of
from mallowspo_cli.errors import ModelError
from mallowspo_cli.models.load import load_model
from mallowspo_cli.recipe.load import load_recipe
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.scoring import PairScorer

ALONE = Launch(1, deepspeed=False, zero_stage=0, fsdp=False, cuda=False)


@pytest.fixture(scope="module")
def scorer(tiny_directory: Path) -> PairScorer:
    return PairScorer(load_model(tiny_directory, torch.float32))


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch):
    rows = [[20, 30, 10], [40, 60, 50]] * 50
    monkeypatch.setattr(pack_size, "lengths_of", lambda pairs: torch.tensor(rows).numpy())
    return rows


def recipe(*words: str) -> Recipe:
    return load_recipe("quickstart", ["model=tiny_random", "train.precision=fp32", *words]).recipe


def test_the_recipes_own(scorer: PairScorer, pairs, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"pack_tokens": 512, "processes": 1}))
    assert pack_tokens_of(recipe("train.pack_tokens=300"), tmp_path, scorer, pairs, ALONE) == 300


def test_a_resumed_run_goes_on_with_what_it_had(scorer: PairScorer, pairs, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"pack_tokens": 512, "processes": 1}))
    assert pack_tokens_of(recipe(), tmp_path, scorer, pairs, ALONE) == 512
    # Over other processes there is other room.
    assert pack_tokens_of(recipe(), tmp_path, scorer, pairs, replace(ALONE, processes=2)) != 512


def test_what_the_machine_has_room_for(
    scorer: PairScorer, pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for memory in (2**40, 30 * 2**20):
        monkeypatch.setattr(pack_size, "own_memory", lambda memory=memory: memory)
        large = recipe("train.global_batch_size=64")
        found[memory] = pack_tokens_of(large, tmp_path, scorer, pairs, ALONE)
    # The longest pair has 150 tokens, and 64 pairs have more than a pack takes on a CPU.
    assert found[2**40] == 4096
    assert 150 < found[30 * 2**20] < 4096


def test_the_longest_pair_where_nothing_fits(
    scorer: PairScorer, pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setattr(pack_size, "own_memory", lambda: 1e6)
    with caplog.at_level("INFO", logger="mallowspo"):
        assert pack_tokens_of(recipe(), tmp_path, scorer, pairs, ALONE) == 150
    assert "this machine's memory may not suffice" in caplog.text


def test_a_model_whose_memory_cannot_be_foreseen(
    scorer: PairScorer, pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(model):
        raise ModelError("no blocks")

    monkeypatch.setattr(pack_size.ModelShape, "of", unknown)
    assert pack_tokens_of(recipe(), tmp_path, scorer, pairs, ALONE) == OTHERWISE
