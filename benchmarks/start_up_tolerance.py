"""How far rounding moves a summed log-prob: the numbers of docs/decisions/0005.

    python benchmarks/start_up_tolerance.py PAIRS.jsonl

Scores 16 pairs of the quickstart and 16 of a file with SmolLM2-135M in float32, under bfloat16
autocast and with bfloat16 weights, and prints the largest differences between them.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from torch import Tensor

from mallowspo_cli.data.prepare import prepare_split
from mallowspo_cli.data.table import TokenizedPair
from mallowspo_cli.models.load import load_model, load_tokenizer, model_directory
from mallowspo_cli.packing.layout import collate
from mallowspo_cli.recipe.load import load_base
from mallowspo_cli.reference.build import score_rows
from mallowspo_cli.scoring import PairScorer
from mallowspo_cli.training.startup import sample

PASSES = {
    "float32": (torch.float32, False, 1),
    "float32, all in one pack": (torch.float32, False, 16),
    "bfloat16 autocast": (torch.float32, True, 1),
    "bfloat16 weights": (torch.bfloat16, False, 1),
}
"""Storage type, autocast, pairs of a pack."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--max-length", type=int, default=512)
    options = parser.parse_args()
    own = ["dataset=local", f"dataset.path={options.data}", "dataset.eval_size=0"]
    own.append(f"dataset.max_length={options.max_length}")
    found = {"quickstart_pairs": measure(["dataset=quickstart_pairs"]), "file": measure(own)}
    print(json.dumps(found, indent=2))


def measure(words: list[str]) -> dict[str, dict[str, float]]:
    """Largest differences between each two of the passes."""
    recipe = load_base(["model=smollm2_135m", "objective=dpo", *words]).recipe
    directory = model_directory(recipe.model)
    split = prepare_split(recipe.dataset, "train", load_tokenizer(directory))
    assert split is not None
    pairs = sample(split.pairs, 16)
    tokens = torch.tensor([[len(p.chosen), len(p.rejected)] for p in pairs]).double()
    logps = {name: score(directory, pairs, *how) for name, how in PASSES.items()}
    return {
        f"{one} / {other}": {
            "nats": float((logps[one] - logps[other]).abs().max()),
            "nats_per_root_token": float(((logps[one] - logps[other]).abs() / tokens.sqrt()).max()),
        }
        for one, other in itertools.combinations(PASSES, 2)
    }


def score(
    directory: Path, pairs: list[TokenizedPair], dtype: torch.dtype, autocast: bool, together: int
) -> Tensor:
    """(N, 2) summed log-probs of chosen and rejected."""
    scorer = PairScorer(load_model(directory, dtype)).eval()
    packs = [pairs[i : i + together] for i in range(0, len(pairs), together)]
    rows = [score_rows(scorer, collate(members), autocast) for members in packs]
    sides = [torch.cat([getattr(r, f"{s}_logp") for r in rows]) for s in ("chosen", "rejected")]
    return torch.stack(sides, dim=1).double()


if __name__ == "__main__":
    main()
