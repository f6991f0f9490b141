"""The reference pass against a raw forward pass of the same packs.

    python benchmarks/cache_pass.py --lengths dpo --json cache_pass.json

Raw is the backbone over the same packs with the same attention and a bare product of the response
tokens' hidden states with the output layer: no log-softmax, no entropy, nothing is kept. Both run
in one process, on one thread of one core, in turn; the figure is the median of the rounds' ratios
of CPU time (raw over ours: 1 is as fast as the raw pass). With --vocab 2560 the head is 11 % of the
matrix parameters, near Llama-3-8B's 7 %; with 32768 it is 62 %.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import measure
import torch
from sides import SHAPES, Setting, build_model
from torch import Tensor

from mallowspo_cli.files import write_json
from mallowspo_cli.models.attention import NAME, scoring
from mallowspo_cli.packing.layout import PairBatch, collate
from mallowspo_cli.packing.packer import lengths_of, pack
from mallowspo_cli.reference.build import score_rows
from mallowspo_cli.scoring import PairScorer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", choices=measure.LENGTHS, default="dpo")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--pack-tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=SHAPES["cpu_small"][0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    scorer, batches = prepared(options)
    # Round 0 is not counted.
    rounds = [one_round(scorer, batches) for _ in range(options.rounds + 1)][1:]
    ratios = [row["raw_s"] / row["pass_s"] for row in rounds]
    result = {
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "pairs_per_s": options.pairs / statistics.median(row["pass_s"] for row in rounds),
        "rounds": rounds,
        "setting": {k: v for k, v in vars(options).items() if k != "json"},
        "machine": measure.machine(),
        "versions": measure.versions(),
    }
    low, high = result["range"]
    print(f"raw / pass: {result['ratio']:.3f} (from {low:.3f} to {high:.3f})")
    if options.json:
        write_json(options.json, result)


def prepared(options: argparse.Namespace) -> tuple[PairScorer, list[PairBatch]]:
    """The frozen model and the packs."""
    setting = Setting(
        lengths=options.lengths,
        max_length=options.max_length,
        too_long="cut",
        pairs=options.pairs,
        batches=1,
        device_batch=1,
        tuned_batch=1,
        pack_tokens=options.pack_tokens,
        model="cpu_small",
        vocab=options.vocab,
        checkpointing="none",
        device="cpu",
        precision="fp32",
    )
    pairs = measure.random_pairs(setting.drawn(), setting.vocab)
    (packs,) = pack(lengths_of(pairs), options.pack_tokens)
    scorer = PairScorer(build_model(setting, NAME)).eval().requires_grad_(False)
    return scorer, [collate([pairs[i] for i in members]) for members in packs]


def one_round(scorer: PairScorer, batches: list[PairBatch]) -> dict[str, float]:
    """CPU seconds of both, pack by pack in turn."""
    times = {"raw_s": 0.0, "pass_s": 0.0}
    for batch in batches:
        for name, run in (("raw_s", raw), ("pass_s", ours)):
            start = time.process_time()
            run(scorer, batch)
            times[name] += time.process_time() - start
    return times


def ours(scorer: PairScorer, batch: PairBatch) -> None:
    """What the reference pass does with a pack."""
    score_rows(scorer, batch, autocast=False)


@torch.inference_mode()
def raw(scorer: PairScorer, batch: PairBatch) -> Tensor:
    """Backbone and one product."""
    causal = scorer.causal_model
    with scoring():
        hidden = causal.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            segments=batch.segments,
            use_cache=False,
        ).last_hidden_state[0]
    return hidden[batch.source_index] @ causal.lm_head.weight.T


if __name__ == "__main__":
    main()
