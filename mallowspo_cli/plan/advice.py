"""What a plan leaves out, and what to change where it does not fit or is slower than need be."""

from mallowspo_cli.plan.case import Case, Findings
from mallowspo_cli.plan.hardware import GIB
from mallowspo_cli.plan.memory import state_memory
from mallowspo_cli.plan.propose import MEMORY_SHARE, POLICIES
from mallowspo_cli.recipe.choices import Precision

FEW_TOKENS = {False: 8192, True: 16384}
"""Tokens of a pack under which sending a model's weights, of whatever size, takes more than an
eighth of the time of computing, on a node with NVLink; and (True) half of it, between nodes."""
CLEARLY_FASTER = 0.95
"""Share of a step's time from which another policy is worth a word."""
LAUNCH_SECONDS = 1e-3
"""Of launching a block's kernels on a GPU, forward and backward: some two hundred of 5 us."""
DEVICES = (2, 4, 8)
"""Of a node, which are tried where one device is too small."""


def notes(case: Case) -> list[str]:
    """What the plan takes for granted."""
    hardware, train = case.hardware, case.recipe.train
    found = [
        f"times assume {hardware.rate(train.precision) / 1e12:,.3g} TFLOP/s of each device, "
        "and leave out reading data, the optimizer's own arithmetic, evaluation and saving."
    ]
    if case.setting.sharded:
        found.append(
            "training in several processes comes with a later version; the plan assumes ZeRO-3, "
            f"weights in {train.precision.value}, a process for each device."
        )
    if train.order.by_dispersion:
        found.append(f"train.order={train.order.value} is planned as a shuffled order.")
    if case.recipe.dispersion.keep is not None:
        found.append("dispersion.keep is not applied: it is known after the reference pass.")
    if train.compile or train.liger:
        found.append("train.compile and train.liger take less memory and time than planned here.")
    return found


def warnings(case: Case, written: Findings, proposed: Findings | None) -> list[str]:
    """What to look at, most urgent first."""
    if proposed is None:
        return [_does_not_fit(case)]
    found = []
    if not written["memory"]["fits"]:
        peak, share = written["memory"]["peak"], written["memory"]["share"]
        found.append(
            f"as written it needs {peak / GIB:.1f} GiB, {share:.0%} of a device's memory (at most "
            f"{MEMORY_SHARE:.0%} should be filled): {_words(proposed)} fits."
        )
    found += _of_precision(case)
    found += _of_launches(case, proposed)
    if case.setting.sharded:
        found += _of_packs(case, proposed)
    faster = _faster(case, proposed)
    if faster is not None:
        found.append(
            f"{_words(faster)} takes {faster['step']['seconds']:.2f} s a step where the proposal "
            f"takes {proposed['step']['seconds']:.2f} s: larger packs send weights less often."
        )
    return found


def _words(option: Findings) -> str:
    """An option as it is written on the command line."""
    return (
        f"train.pack_tokens={option['pack_tokens']} "
        f"train.activation_checkpointing={option['activation_checkpointing']}"
    )


def _does_not_fit(case: Case) -> str:
    """Why nothing fits, and what would help."""
    memory = MEMORY_SHARE * case.memory
    states = state_memory(case.shape, case.setting).peak
    cause = (
        f"weights, gradients and optimizer take {states / GIB:.1f} GiB"
        if states > memory
        else f"the longest pair, {case.longest_pair:,} tokens, does not fit beside "
        f"{states / GIB:.1f} GiB of weights, gradients and optimizer"
    )
    ways = [] if case.shape.adapters else ["train adapters (model.lora.rank=16)"]
    if not case.hardware.device.is_cpu:
        more = [n for n in DEVICES if n > case.setting.world_size and not case.batch_size % n]
        enough = next((n for n in more if case.on(n).proposal() is not None), None)
        name = case.hardware.device.name
        ways.append(
            f"take {enough}x{name}, where it fits" if enough else "take more or larger GPUs"
        )
    if states <= memory:
        ways.append("lower dataset.max_length")
    return (
        f"it will not fit: {cause}, and {memory / GIB:.1f} GiB of a device can be filled. "
        f"What helps: {'; '.join(ways) or 'a smaller model'}."
    )


def _of_precision(case: Case) -> list[str]:
    """Whether a GPU is to compute in float32."""
    device = case.hardware.device
    if device.is_cpu or case.recipe.train.precision is Precision.bf16:
        return []
    return [
        f"train.precision=fp32: in bf16 the peak of {device.name} is "
        f"{device.bf16 / device.fp32:.0f} times higher. Where the recipe says auto, this machine "
        "settled it: plan with train.precision=bf16."
    ]


def _of_launches(case: Case, proposed: Findings) -> list[str]:
    """Whether a GPU computes faster than kernels can be launched."""
    step, blocks = proposed["step"], len(case.shape.blocks)
    computing, launching = step["compute_seconds"] / step["packs"], LAUNCH_SECONDS * blocks
    if case.hardware.device.is_cpu or computing >= launching:
        return []
    return [
        f"a pack takes {1e3 * computing:.2g} ms of computing, and launching its kernels about "
        f"{1e3 * launching:.0f} ms: model and packs are too small for this device, and times are "
        "longer than planned."
    ]


def _of_packs(case: Case, proposed: Findings) -> list[str]:
    """Whether packs are large enough for the weights that are sent for each."""
    step, world_size = proposed["step"], case.setting.world_size
    tokens = step["tokens"] / (step["packs"] * world_size)
    few = FEW_TOKENS[case.hardware.nodes > 1]
    if tokens >= few:
        return []
    share = step["traffic_seconds"] / step["compute_seconds"]
    of_batch = step["packs"] == 1
    remedy = (
        "a larger train.global_batch_size, or fewer devices, makes them longer"
        if of_batch
        else "adapters (model.lora) or more memory make them longer"
    )
    return [
        f"packs hold {tokens:,.0f} tokens on average, fewer than {few:,}: sending weights takes "
        f"{share:.0%} of the time of computing; {remedy}."
    ]


def _faster(case: Case, proposed: Findings) -> Findings | None:
    """The option of another policy that is clearly faster than the proposal, if there is one."""
    others = [p for p in POLICIES if p.value != proposed["activation_checkpointing"]]
    sizes = [(policy, case.pack_tokens(policy)) for policy in others]
    options = [case.option(size, policy) for policy, size in sizes if size is not None]
    best = min(options, key=lambda each: each["step"]["seconds"], default=None)
    if best is None:
        return None
    limit = CLEARLY_FASTER * proposed["step"]["seconds"]
    return best if best["step"]["seconds"] < limit else None
