"""The plan of a recipe as plain values, ready for JSON."""

from dataclasses import asdict

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.packing.layout import Layout
from mallowspo_cli.plan.advice import notes, warnings
from mallowspo_cli.plan.case import Case, Findings
from mallowspo_cli.plan.compute import traffic
from mallowspo_cli.plan.gain import gain_over_padding
from mallowspo_cli.plan.propose import MEMORY_SHARE


def find(case: Case) -> Findings:
    """The whole plan, all of it predicted: bytes, FLOPs, seconds, tokens.

    Raises:
        RecipeError: a batch that cannot be dealt out evenly, or larger than the data.
    """
    _check_batch(case.batch_size, case.hardware.world_size)
    train = case.recipe.train
    proposal = case.proposal()
    written = case.written()
    proposed = proposal and case.option(proposal.pack_tokens, proposal.checkpointing)
    checkpointing = proposal.checkpointing if proposal else train.activation_checkpointing
    gain = None
    if case.layout is Layout.shared:
        gain = asdict(gain_over_padding(case.shape, case.lengths, checkpointing, train.epochs))
    return {
        "recipe": case.recipe.name,
        "hardware": _of_hardware(case),
        "model": _of_model(case),
        "data": _of_data(case),
        "run": {
            "steps": case.steps,
            "pairs_per_step": case.batch_size,
            "epochs": train.epochs,
        },
        "as_written": written,
        "proposed": proposed,
        "gain": gain,
        "notes": notes(case),
        "warnings": warnings(case, written, proposed),
    }


def _check_batch(pairs: int, world_size: int) -> None:
    if pairs % world_size:
        below = pairs // world_size * world_size
        nearest = ", ".join(str(n) for n in (below, below + world_size) if n)
        raise RecipeError(
            f"train.global_batch_size={pairs} is not a multiple of {world_size} processes. "
            f"Nearest: {nearest}."
        )


def _of_hardware(case: Case) -> Findings:
    hardware, precision = case.hardware, case.recipe.train.precision
    return {
        "name": hardware.name,
        "processes": hardware.world_size,
        "precision": precision.value,
        "peak_flops": hardware.peak(precision),
        "assumed_flops": hardware.rate(precision),
        "memory": case.memory,
        "usable_share": MEMORY_SHARE,
        "nodes": hardware.nodes,
        "devices_of_a_node": hardware.devices,
        "bandwidth": hardware.bandwidth if case.setting.sharded else None,
        "bandwidth_is": hardware.link if case.setting.sharded else None,
        "traffic_per_pack": traffic(case.shape, case.setting),
    }


def _of_model(case: Case) -> Findings:
    shape, model = case.shape, case.recipe.model
    return {
        "source": model.source,
        "parameters": shape.parameters,
        "trained": shape.trained,
        "blocks": len(shape.blocks),
        "layout": case.layout.value,
    }


def _of_data(case: Case) -> Findings:
    rows = case.lengths
    return {
        "dataset": case.data or case.recipe.dataset.title,
        "pairs": len(rows),
        "mean_tokens": rows.sum(axis=1).mean(),
        "longest_pair": int(rows.sum(axis=1).max()),
        "prompt_share": rows[:, 0].sum() / rows.sum(),
    }
