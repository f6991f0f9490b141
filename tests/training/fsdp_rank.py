"""A process of a run under torch's fully_shard: `python -m tests.training.fsdp_rank RUN WORDS...`.

accelerate shards on GPUs alone, so this puts together what `mallowspo train` does from where
accelerate would have sharded. It goes on from the newest checkpoint in RUN.
"""

import os
import sys
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

from mallowspo_cli.commands.known import known_pairs, pair_order
from mallowspo_cli.commands.prepare import prepare
from mallowspo_cli.models.load import load_policy
from mallowspo_cli.recipe.load import load_recipe
from mallowspo_cli.scoring import PairScorer
from mallowspo_cli.training.checkpoint import load_checkpoint, whole_checkpoints
from mallowspo_cli.training.engine import Engine
from mallowspo_cli.training.loop import fit
from mallowspo_cli.training.metrics import MetricsFile
from mallowspo_cli.training.optim import build_optimizer
from mallowspo_cli.training.run import Run


def main(directory: Path, words: list[str]) -> None:
    """Shard, load, train to the end, save."""
    recipe = load_recipe("quickstart", words).recipe
    prepared = prepare(recipe)
    known = known_pairs(recipe, prepared)
    accelerator = Accelerator(cpu=True)
    scorer = PairScorer(load_policy(recipe.model, prepared.directory, recipe.train, recipe.seed))
    blocks = set(scorer._no_split_modules)
    for module in [m for m in scorer.modules() if type(m).__name__ in blocks]:
        fully_shard(module)
    fully_shard(scorer)
    engine = Engine(accelerator, scorer, build_optimizer(scorer, recipe.train))
    engine.check(sharded=True)
    description = engine.describe()
    assert description["kind"] == "FSDP2"
    assert 0 < description["weights_of_a_process"] < 0.6 * description["weights"]
    metrics = MetricsFile(directory / "metrics.jsonl")
    state = load_checkpoint(whole_checkpoints(directory)[-1], engine)
    if accelerator.is_main_process:
        metrics.cut_back(state.step)
    run = Run(
        recipe=recipe,
        directory=directory,
        engine=engine,
        train_pairs=known.train_pairs,
        eval_pairs=prepared.held_out or (),
        order=pair_order(recipe, known),
        metrics=metrics,
        total_steps=recipe.train.max_steps or 0,
        pack_tokens=recipe.train.pack_tokens or 0,
    )
    fit(run, recipe.objective, known.reference, state)
    weights = engine.whole_weights(next(scorer.parameters()).dtype)
    assert (weights is not None) == accelerator.is_main_process
    if weights is not None:
        save_file(weights, directory / "whole.safetensors")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    # gloo's threads may hang a process that takes its communicators down in another order.
    os._exit(0)
