"""Tokenised pairs and a scorer of the tiny model, for the tests of the reference pass."""

import pytest

from mallowspo_cli.data.pairs import Message, PreferencePair
from mallowspo_cli.data.tokenize import TokenizedPair, tokenize_pairs
from mallowspo_cli.recipe.schema import DatasetConfig
from tests.conftest import pair_rows


@pytest.fixture(scope="session")
def tokenized(tiny_tokenizer) -> list[TokenizedPair]:
    """Twelve pairs of different lengths."""
    pairs = [
        PreferencePair(
            (Message("user", row["prompt"]),),
            Message("assistant", row["chosen"]),
            Message("assistant", row["rejected"]),
            f"row {index}",
        )
        for index, row in enumerate(pair_rows(12))
    ]
    return list(tokenize_pairs(pairs, tiny_tokenizer, DatasetConfig(path="-")))
