"""A process of a training run: `python -m tests.training.one_rank PLACE ATTENTION`.

Started once, or by torchrun in several processes; rank 0 writes the metrics of the run's steps to
PLACE/metrics.jsonl.
"""

import json
import os
import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed

from mallowspo_cli.commands.known import known_pairs, pair_order
from mallowspo_cli.commands.prepare import prepare
from mallowspo_cli.models.load import load_policy
from mallowspo_cli.recipe.load import load_recipe
from mallowspo_cli.scoring import PairScorer
from mallowspo_cli.training.checkpoint import TrainState
from mallowspo_cli.training.loop import Run, fit
from mallowspo_cli.training.metrics import MetricsFile
from mallowspo_cli.training.optim import build_optimizer
from tests.conftest import pair_rows

STEPS = 6


def main(place: Path, attention: str) -> None:
    """Train for a few steps."""
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    data = place / "pairs.jsonl"
    if accelerator.is_main_process:
        data.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(24)))
    accelerator.wait_for_everyone()
    words = [
        *("model=tiny_random", f"model.attention={attention}", "dataset=local"),
        *(f"dataset.path={data}", "dataset.eval_size=0", "train.precision=fp32"),
        # Small packs, so that every process has several of unequal numbers of pairs.
        *("train.global_batch_size=8", f"train.max_steps={STEPS}"),
        *("train.epochs=5", "train.learning_rate=3e-3", "checkpoint.every=0"),
        *(f"reference.store={place / 'store'}", f"output_dir={place / 'run'}"),
    ]
    recipe = load_recipe("quickstart", words).recipe
    prepared = prepare(recipe)
    known = known_pairs(recipe, prepared)
    set_seed(recipe.seed)
    scorer = PairScorer(load_policy(recipe.model, prepared.directory, recipe.train, recipe.seed))
    optimizer = build_optimizer(scorer, recipe.train)
    scorer, optimizer = accelerator.prepare(scorer, optimizer)
    run = Run(
        recipe=recipe,
        directory=place,
        accelerator=accelerator,
        scorer=scorer,
        optimizer=optimizer,
        train_pairs=known.train_pairs,
        eval_pairs=(),
        order=pair_order(recipe, known),
        metrics=MetricsFile(place / "metrics.jsonl"),
        total_steps=STEPS,
        pack_tokens=130,
    )
    packs = [len(run.packs(step)) for step in range(STEPS)]
    if accelerator.is_main_process:
        (place / "packs.json").write_text(json.dumps(packs))
    fit(run, recipe.objective, known.reference, TrainState())
    # Not the group before what uses it: a process may hang at its end then.
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    # gloo's threads may hang a process that takes its communicators down in another order.
    os._exit(0)
