"""How fast data is prepared, and in how much memory.

    python benchmarks/prepare_data.py --pairs 60000

Writes synthetic pairs whose lengths are drawn from a file of benchmarks/lengths/ (so many common
words as the file has tokens), prepares them in a process of its own with an empty cache, then once
more from the warm cache, and prints one JSON object: pairs, tokens, seconds, pairs/s and the peak
resident memory of each process.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
WORDS = """
    the a of to and in is it that was for on are with as they at be this from have or by one had not
    but what all were when we there can an your which their said if do will each about how up out
    them then she many some so these would other into has more her two like him see time could
""".split()  # noqa: SIM905
PREPARE = """
import json, resource, sys, time
from mallowspo_cli.data.prepare import prepare_split
from mallowspo_cli.distributed import set_up_logging
from mallowspo_cli.models.load import load_tokenizer, model_directory
from mallowspo_cli.recipe.load import load_base
set_up_logging()
recipe = load_base([f"model={sys.argv[2]}", "dataset=local", f"dataset.path={sys.argv[1]}",
    "dataset.eval_size=0", "dataset.max_length=4096", "objective=dpo"]).recipe
tokenizer = load_tokenizer(model_directory(recipe.model))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.monotonic()
pairs = prepare_split(recipe.dataset, "train", tokenizer).pairs
seconds = time.monotonic() - start
print(json.dumps({"pairs": len(pairs), "tokens": int(pairs.lengths.sum()), "seconds": seconds,
    "pairs_per_second": len(pairs) / seconds,
    "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    "memory_before_gib": before / 2**20}))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=60_000)
    parser.add_argument("--lengths", default="dpo_en_demo", help="file of benchmarks/lengths/")
    parser.add_argument("--model", default="smollm2_135m", help="a name in recipes/model/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "pairs.jsonl"
        write_pairs(path, options.pairs, HERE / "lengths" / f"lengths_{options.lengths}.json")
        size = path.stat().st_size / 2**20
        cold, warm = (prepare(path, options.model, scratch) for _ in range(2))
    print(
        json.dumps(
            {"file_mib": size, "cores": os.cpu_count(), "cold": cold, "warm": warm}, indent=2
        )
    )


def write_pairs(path: Path, count: int, lengths: Path) -> None:
    """`count` pairs of random words with lengths drawn from a file."""
    draw = random.Random(0)
    known = json.loads(lengths.read_text())["lengths"]
    with path.open("w") as handle:
        for _ in range(count):
            texts = (" ".join(draw.choices(WORDS, k=max(1, n))) for n in draw.choice(known))
            names = ("prompt", "chosen", "rejected")
            handle.write(json.dumps(dict(zip(names, texts, strict=True))) + "\n")


def prepare(path: Path, model: str, scratch: str) -> dict[str, float]:
    """Figures of one process that prepares the file, with its prepared data in `scratch`."""
    from mallowspo_cli.files import cache_directory

    # The model stays where it is: only the data's caches begin empty.
    place = Path(scratch) / "cache"
    place.mkdir(exist_ok=True)
    models = place / "models"
    if not models.exists():
        (cache_directory() / "models").mkdir(parents=True, exist_ok=True)
        models.symlink_to(cache_directory() / "models")
    environment = {
        **os.environ,
        "MALLOWSPO_CACHE": str(place),
        "HF_DATASETS_CACHE": str(place / "datasets"),
    }
    command = [sys.executable, "-c", PREPARE, str(path), model]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
