"""What a plan leaves out, and what to change where it does not fit or is slower than need be."""

from mallowspo_cli.plan.case import Case, Findings
from mallowspo_cli.plan.hardware import GIB
from mallowspo_cli.plan.memory import state_memory
from mallowspo_cli.plan.propose import MEMORY_SHARE, POLICIES
from mallowspo_cli.recipe.choices import Dtype, Precision, Quantization

FEW_TOKENS = {False: 8192, True: 16384}
"""Tokens of a pack under which sending a model's weights, of whatever size, takes more than an
eighth of the time of computing, over links as fast as a node's own; and (True) half of it, over the
slower ones between nodes."""
CLEARLY_FASTER = 0.95
"""Share of a step's time from which another policy is worth a word."""
LAUNCH_SECONDS = 1e-3
"""Of launching a block's kernels on a GPU, forward and backward: some two hundred of 5 us."""
DEVICES = (2, 4, 8, 16, 32, 64)
"""Which are tried where fewer are too small; beyond a node's, in whole nodes."""


def notes(case: Case) -> list[str]:
    """What the plan takes for granted."""
    hardware, train = case.hardware, case.recipe.train
    found = [
        f"times assume {hardware.rate(train.precision) / 1e12:,.3g} TFLOP/s of each device, "
        "and leave out reading data, the optimizer's own arithmetic, evaluation and saving."
    ]
    if case.setting.sharded:
        found += _of_sharding(case)
    if case.data is not None:
        found.append(f"the data was not read, but {case.data}.")
    if train.order.by_dispersion:
        found.append(f"train.order={train.order.value} is planned as a shuffled order.")
    if case.recipe.dispersion.keep is not None:
        found.append("dispersion.keep is not applied: it is known after the reference pass.")
    if case.recipe.model.quantization is not Quantization.none:
        found.append("model.quantization is not planned: frozen weights are counted unquantized.")
    if train.compile or train.liger:
        found.append("train.compile and train.liger take less memory and time than planned here.")
    return found


def _of_sharding(case: Case) -> list[str]:
    """What is assumed of several processes."""
    hardware, precision = case.hardware, case.recipe.train.precision
    gathered = "frozen weights are gathered too, only adapters' gradients are sent. "
    return [
        f"a process for each of {hardware.world_size} devices, ZeRO-3, weights in "
        f"{precision.value}, gradients, masters and optimizer's states in float32, dealt out "
        "evenly. "
        f"{gathered if case.shape.adapters else ''}The reference pass has the whole model in every "
        "process.",
        f"sending is at {hardware.bandwidth / 1e9:,.3g} GB/s of each device ({hardware.link}; "
        "another: bandwidth=BYTES/s) and overlaps with computing, since DeepSpeed's overlap_comm "
        "is on: for each pack the longer of the two counts.",
    ]


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
    found += _of_reference(case)
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
    if states > memory and not case.hardware.device.is_cpu:
        host = states * case.hardware.devices / GIB
        ways.append(
            f"keep states in the host's memory, {host:,.0f} GiB of a node's (recipes/accelerate/"
            "zero3_offload.yaml; slower)"
        )
    if not case.hardware.device.is_cpu:
        more = [n for n in DEVICES if n > case.setting.world_size and not case.batch_size % n]
        enough = next((n for n in more if case.on(n).proposal() is not None), None)
        name = case.on(enough).hardware.name if enough else ""
        ways.append(f"take {name}, where it fits" if enough else "take more or larger GPUs")
    if states <= memory:
        ways.append("lower dataset.max_length")
    return (
        f"it will not fit: {cause}, and {memory / GIB:.1f} GiB of a device can be filled. "
        f"What helps: {'; '.join(ways) or 'a smaller model'}."
    )


def _of_reference(case: Case) -> list[str]:
    """Whether the frozen model, which is whole in every process, fits with the longest pair: packs
    are halved where memory runs out, and weights that do not fit are sent layer by layer.
    """
    least = case.reference_memory(0)
    limit = MEMORY_SHARE * case.memory
    if not case.has_reference_pass or least.peak <= limit:
        return []
    remedy = (
        "model.dtype=bfloat16 halves its weights"
        if case.recipe.model.dtype is Dtype.float32
        else "fill the store where there is more memory (`mallowspo cache-ref`)"
    )
    return [
        f"the reference pass needs {least.peak / GIB:.1f} GiB in every process, the whole model in "
        f"{case.recipe.model.dtype.value}, and {limit / GIB:.1f} GiB of a device can be filled. "
        f"Sending its weights layer by layer is slow: {remedy}."
    ]


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
    hardware = case.hardware
    few = FEW_TOKENS[hardware.bandwidth < hardware.device.within]
    if tokens >= few:
        return []
    share = step["traffic_seconds"] / step["compute_seconds"]
    of_batch = step["packs"] == 1
    of_memory = "more memory makes them longer"
    if not case.shape.adapters:
        of_memory = "adapters (model.lora) or more memory make them longer"
    remedy = (
        "a larger train.global_batch_size, or fewer devices, makes them longer"
        if of_batch
        else of_memory
    )
    return [
        f"packs hold {tokens:,.0f} tokens on average, fewer than {few:,} "
        f"({hardware.link}): sending weights takes {share:.0%} of the time of computing; "
        f"{remedy}."
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
