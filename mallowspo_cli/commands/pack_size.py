"""The size of a run's packs, where the recipe leaves it to the machine."""

import json
from pathlib import Path

from mallowspo_cli.commands.launch import Launch
from mallowspo_cli.data.table import TokenizedPairs
from mallowspo_cli.distributed import log
from mallowspo_cli.errors import ModelError
from mallowspo_cli.packing.packer import lengths_of
from mallowspo_cli.plan.hardware import own_memory
from mallowspo_cli.plan.propose import proposed_pack_tokens, smallest_budget
from mallowspo_cli.plan.setting import Setting
from mallowspo_cli.plan.shapes import ModelShape
from mallowspo_cli.recipe.schema import Recipe
from mallowspo_cli.scoring import PairScorer

OTHERWISE = 4096
"""Tokens of a pack where the memory of a model cannot be foreseen."""


def pack_tokens_of(
    recipe: Recipe, run_directory: Path, scorer: PairScorer, pairs: TokenizedPairs, launch: Launch
) -> int:
    """The recipe's `train.pack_tokens`; what the run began with; or what this machine has room for.

    A resumed run goes on with the packs that it had, so that its numbers are the same. The longest
    pair's tokens, and a word in the log, where nothing seems to fit.
    """
    train = recipe.train
    if train.pack_tokens is not None:
        return train.pack_tokens
    file = run_directory / "environment.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    # Over other processes the numbers are not the same to the bit, and the room is another.
    if before.get("pack_tokens") and before.get("processes") == launch.processes:
        return before["pack_tokens"]
    try:
        shape = ModelShape.of(scorer.model)
    except ModelError:
        return OTHERWISE
    lengths = lengths_of(pairs)
    # What is not sharded is planned for as if it were alone, which ZeRO-2 only gains from.
    world = launch.processes if launch.sharded else 1
    setting = Setting(train.precision, world, not launch.cuda, train.optimizer)
    # Processes of a CPU share its memory.
    memory = own_memory() if launch.cuda else own_memory() / launch.processes
    proposed = proposed_pack_tokens(
        *(shape, setting, memory, lengths, train.global_batch_size),
        *(train.activation_checkpointing, scorer.layout),
    )
    if proposed is None:
        log.info(
            "this machine's memory may not suffice: `mallowspo plan` says for what. Trying with "
            "packs no larger than the longest pair."
        )
        return smallest_budget(lengths, scorer.layout)
    log.info("packs of up to %d tokens (train.pack_tokens)", proposed)
    return proposed
