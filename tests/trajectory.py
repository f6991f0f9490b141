"""Twenty optimizer steps of a tiny model: what the golden files record."""

import json
import tempfile
from pathlib import Path

import torch

OBJECTIVES = ("mallows_phi", "mallows_theta", "dpo")
KEYS = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "dispersion/weight_mean")


def trajectory(objective: str) -> dict[str, list[float]]:
    """The metrics of 20 float32 steps of `recipe=quickstart` on the tiny model and 24 pairs."""
    from mallowspo_cli.commands import train
    from tests.conftest import pair_rows

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            rows = "".join(json.dumps(row) + "\n" for row in pair_rows(24))
            (place / "pairs.jsonl").write_text(rows)
            words = [
                f"objective={objective}",
                "model=tiny_random",
                "dataset=local",
                f"dataset.path={place / 'pairs.jsonl'}",
                "dataset.eval_size=4",
                "train.precision=fp32",
                "train.global_batch_size=5",
                "train.epochs=5",
                "train.max_steps=20",
                "train.learning_rate=3e-3",
                "eval.kl_prompts=0",
                "checkpoint.every=0",
                f"output_dir={place / 'run'}",
                f"reference.store={place / 'store'}",
            ]
            train.run("quickstart", words, resume=False, dry_run=False)
            text = (place / "run" / "metrics.jsonl").read_text()
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in text.splitlines()]
    steps = [line for line in lines if "loss" in line]
    found = {key: [line[key] for line in steps] for key in KEYS if steps[0][key] is not None}
    last = [line for line in lines if "eval/loss" in line][-1]
    return {**found, "eval/loss": [last["eval/loss"]]}
