"""The pairs that ship with the package: as many, as apart and as separated as `about.json` says."""

import json
from pathlib import Path

import pytest

import mallowspo_cli.data
from mallowspo_cli.data.dataset import load_pairs
from mallowspo_cli.data.pairs import PreferencePair
from mallowspo_cli.data.tokenize import tokenize_pairs
from mallowspo_cli.recipe.schema import DatasetConfig

PLACE = Path(mallowspo_cli.data.__file__).parent / "quickstart_pairs"
ABOUT = json.loads((PLACE / "about.json").read_text())
CONFIG = DatasetConfig(path="package:quickstart_pairs", max_length=1024)


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[PreferencePair]]:
    """Both splits, as recipes load them."""
    return {split: load_pairs(CONFIG, split) for split in ("train", "eval")}


def test_there_are_enough_pairs_and_as_many_as_about_says(
    pairs: dict[str, list[PreferencePair]],
) -> None:
    counts = {split: len(found) for split, found in pairs.items()}
    assert counts == ABOUT["pairs"]
    assert counts["train"] >= 500
    assert counts["eval"] >= 200


def test_no_prompt_lies_in_both_splits(pairs: dict[str, list[PreferencePair]]) -> None:
    train, held_out = ({pair.prompt for pair in pairs[split]} for split in ("train", "eval"))
    assert not train & held_out
    assert len(train) + len(held_out) <= ABOUT["prompts"]
    assert len(train) > 100


def test_no_pair_is_there_twice(pairs: dict[str, list[PreferencePair]]) -> None:
    every = [(p.prompt, p.chosen, p.rejected) for found in pairs.values() for p in found]
    assert len(set(every)) == len(every)


def test_the_chosen_response_scores_higher_by_the_smallest_gap_at_least() -> None:
    assert ABOUT["pairing"]["smallest_gap"] >= 0.5
    for split in ("train", "eval"):
        rows = [json.loads(line) for line in (PLACE / f"{split}.jsonl").read_text().splitlines()]
        gaps = [row["chosen_score"] - row["rejected_score"] for row in rows]
        assert min(gaps) >= ABOUT["pairing"]["smallest_gap"] - 1e-9


def test_every_pair_is_tokenised_and_none_is_lost(
    pairs: dict[str, list[PreferencePair]], tiny_tokenizer
) -> None:
    for found in pairs.values():
        tokenized = tokenize_pairs(found, tiny_tokenizer, CONFIG)
        assert len(tokenized) == len(found)
        assert tokenized.losses == {}
        assert len(set(tokenized.pair_ids)) == len(found)
