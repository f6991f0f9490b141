"""Tokens/s of the generate stage against a bare `model.generate` on the same batches.

    python benchmarks/generation.py [model=smollm2_135m] [batch=8] [tokens=32] [rounds=3]

Both sample at temperature 0.7 and top_p 0.9 from the same left-padded prompts, with no end token,
so that both compute the same number of tokens. Rounds are interleaved; the ratio of medians counts.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from mallowspo_cli.commands.subject import find_model
from mallowspo_cli.evaluation.generate import generation_config
from mallowspo_cli.evaluation.journal import Journal
from mallowspo_cli.evaluation.sampling.stage import generate, render_prompts
from mallowspo_cli.evaluation.sampling.tasks import GenerateOptions, Task
from mallowspo_cli.evaluation.sampling.transformers_engine import TransformersEngine
from mallowspo_cli.models.load import load_model, load_tokenizer, model_directory

NEVER = [2**31 - 1]
"""An end token that no model writes."""


def main() -> None:
    words = dict(word.split("=") for word in sys.argv[1:])
    batch, tokens = int(words.get("batch", 8)), int(words.get("tokens", 32))
    subject = find_model(words.get("model", "smollm2_135m"))
    place = model_directory(subject.model)
    tokenizer = load_tokenizer(place, subject.model.chat_template)
    model: Any = load_model(place, torch.float32, "sdpa").eval()
    options = GenerateOptions(max_tokens=tokens, batch_size=batch)
    rows = json.loads(Path("docs/data/twenty_instructions.json").read_text())
    tasks = [Task.of(row["instruction"]) for row in rows][: 2 * batch]
    prompts = render_prompts(tasks, tokenizer, None, options)
    engine = TransformersEngine(model, tokenizer, options)
    engine.ends = NEVER

    def ours() -> None:
        with tempfile.TemporaryDirectory() as scratch, Journal(Path(scratch) / "g", {}) as journal:
            generate(prompts, lambda: engine, tokenizer, "m", journal)

    order = sorted(prompts, key=lambda p: -len(p.ids))
    batches = []
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        padded = tokenizer.pad(
            {"input_ids": [p.ids.tolist() for p in group]}, padding_side="left", return_tensors="pt"
        )
        batches.append(dict(padded))
    config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.9, top_k=0, max_new_tokens=tokens, pad_token_id=0
    )

    @torch.inference_mode()
    def bare() -> None:
        with generation_config(model, config):
            for inputs in batches:
                model.generate(**inputs)

    times: dict[str, list[float]] = {"mallowspo": [], "bare generate": []}
    cpu: dict[str, list[float]] = {name: [] for name in times}
    for round_ in range(int(words.get("rounds", 3)) + 1):
        for name, run in (("mallowspo", ours), ("bare generate", bare)):
            start, busy = time.perf_counter(), time.process_time()
            run()
            if round_:
                times[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - busy)
    count = len(prompts) * tokens
    for name in times:
        wall, busy = statistics.median(times[name]), statistics.median(cpu[name])
        print(f"{name:14} {count / wall:6.1f} tokens/s, {busy:.1f} s of CPU for {count} tokens")
    for what, found in (("wall", times), ("CPU", cpu)):
        both = [statistics.median(found[name]) for name in ("bare generate", "mallowspo")]
        print(f"ratio by {what}: {both[0] / both[1]:.3f}")


if __name__ == "__main__":
    main()
