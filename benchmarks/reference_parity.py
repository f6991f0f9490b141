"""Does the store hold what a plain forward pass with all logits gives?

    python benchmarks/reference_parity.py PAIRS.jsonl --pairs 40 --max-length 512

Scores the first pairs of a file with SmolLM2-135M in float32: through the reference store with
several sizes of packs, and one response at a time with transformers and full logits. Prints the
largest relative difference of log-probs and of entropies for each size of pack.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from mallowspo_cli.data.prepare import prepare_split
from mallowspo_cli.data.table import TokenizedPairs
from mallowspo_cli.models.load import load_tokenizer, model_directory
from mallowspo_cli.recipe.choices import Precision
from mallowspo_cli.recipe.load import load_base
from mallowspo_cli.recipe.schema import Recipe, ReferenceConfig
from mallowspo_cli.reference.build import complete_store, open_store

COLUMNS = ("chosen_logp", "rejected_logp", "chosen_entropy_sum", "rejected_entropy_sum")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--pack-tokens", type=int, nargs="+", default=[1, 4096, 16384])
    options = parser.parse_args()
    words = [f"model={options.model}", "objective=dpo", "dataset=local"]
    words += [f"dataset.path={options.data}", "dataset.eval_size=0"]
    recipe = load_base([*words, f"dataset.max_length={options.max_length}"]).recipe
    directory = model_directory(recipe.model)
    split = prepare_split(recipe.dataset, "train", load_tokenizer(directory))
    assert split is not None
    pairs = split.pairs[: options.pairs]
    expected = plain(directory, pairs)
    found = {size: cached(recipe, directory, pairs, size) for size in options.pack_tokens}
    largest = {
        size: {
            name: float(((rows[name] - expected[name]) / expected[name]).abs().max())
            for name in COLUMNS
        }
        for size, rows in found.items()
    }
    print(json.dumps({"pairs": len(pairs), "relative_difference": largest}, indent=2))


def cached(
    recipe: Recipe, directory: Path, pairs: TokenizedPairs, pack_tokens: int
) -> dict[str, torch.Tensor]:
    """The rows of a new store."""
    with tempfile.TemporaryDirectory() as place:
        reference = replace(ReferenceConfig(), store=place)
        store = open_store(directory, recipe.model, reference, Precision.fp32)
        device = torch.device("cpu")
        complete_store(
            *(store, pairs, directory, recipe.model, Precision.fp32, pack_tokens, device)
        )
        rows = store.lookup(pairs.pair_ids)
        return {name: getattr(rows, name).double() for name in COLUMNS}


@torch.inference_mode()
def plain(directory: Path, pairs: TokenizedPairs) -> dict[str, torch.Tensor]:
    """What transformers gives with all logits, a response at a time, in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for pair in pairs:
        for side in ("chosen", "rejected"):
            response = torch.from_numpy(getattr(pair, side).astype("int64"))
            ids = torch.cat([torch.from_numpy(pair.prompt.astype("int64")), response])
            logits = model(ids[None]).logits[0, len(pair.prompt) - 1 : -1].float()
            logps = logits.log_softmax(dim=1)
            chosen = logps.gather(1, response[:, None]).double().sum()
            entropy = -(logps.exp() * logps).sum(dim=1).double().sum()
            columns[f"{side}_logp"].append(float(chosen))
            columns[f"{side}_entropy_sum"].append(float(entropy))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}


if __name__ == "__main__":
    main()
