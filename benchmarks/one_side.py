"""What the process of one side of against_trl.py finds: its numbers, its time or its memory."""

import ctypes
import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from numpy.typing import NDArray
from sides import Side, parameters_of

LIMITS = {"logps": 1e-5, "loss": 1e-4, "gradient_norm": 1e-4, "gradient": 1e-4}
"""Largest relative differences between sides, in float32."""
MOST_KEPT = 20_000_000
"""Entries of a gradient that are compared; of a larger one every k-th."""
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment in which freed memory goes back at once: resident memory is memory in use."""
WARM_UP, GPU_STEPS = 10, 50


def parity_of(side: Side, arrays: Path) -> dict[str, str]:
    """Write log-probs, the batches' losses and gradient norms, and the sum of their gradients."""
    parameters, losses, norms = parameters_of(side.model), [], []
    for loss in side.steps():
        losses.append(float(loss))
        norms.append(float(sum(p.grad.double().square().sum() for p in parameters)) ** 0.5)
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    kept = gradient[:: 1 + len(gradient) // MOST_KEPT].float().cpu().numpy()
    logps = side.logps().double().cpu().numpy()
    np.savez(arrays, logps=logps, loss=losses, gradient_norm=norms, gradient=kept)
    return {"arrays": str(arrays)}


def time_of(side: Side) -> dict[str, float]:
    """Seconds of all batches, after a first one that does not count; a GPU does more of both."""
    cuda = side.device.type == "cuda"
    clock = measure.Clock(torch.cuda.synchronize if cuda else lambda: None)
    warm_up, passes = (WARM_UP, GPU_STEPS) if cuda else (1, side.setting.batches)
    loop = endless(side)
    for _ in range(warm_up):
        next(loop)
        side.model.zero_grad()
    loop = loop if cuda else endless(side)
    steps = -(-passes // side.setting.batches) * side.setting.batches
    with clock:
        for _ in range(steps):
            next(loop)
            side.model.zero_grad()
    pairs = steps * side.setting.pairs
    tokens = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in side.pairs)
    seconds = clock.wall_s if cuda else clock.cpu_s
    return {
        "cpu_s": clock.cpu_s / steps,
        "wall_s": clock.wall_s / steps,
        "pairs_per_s": pairs / seconds,
        "useful_tokens_per_s": tokens * steps / side.setting.batches / seconds,
    }


def endless(side: Side) -> Iterator[Any]:
    """Its steps, over and over."""
    while True:
        yield from side.steps()


def memory_of(side: Side) -> dict[str, float]:
    """MiB above weights and gradients at the highest point of all batches."""
    # A first small pass loads what kernels need and makes the gradients.
    some = torch.arange(8, device=side.device)[None]
    side.model(input_ids=some, use_cache=False).logits.sum().backward()
    side.model.zero_grad(set_to_none=False)
    gc.collect()

    def work() -> None:
        for _ in side.steps():
            side.model.zero_grad(set_to_none=False)

    if side.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        work()
        return {"peak_mib": (torch.cuda.max_memory_allocated() - start) / measure.MIB}
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return {"peak_mib": measure.peak_rss(work)}


def differences(
    ours: Mapping[str, NDArray[Any]], theirs: Mapping[str, NDArray[Any]]
) -> dict[str, float]:
    """Relative differences, by name of `LIMITS`: the largest, and of the gradient as a vector."""
    found = {}
    for name in LIMITS:
        one, other = (np.asarray(side[name], dtype=np.float64) for side in (ours, theirs))
        if one.shape != other.shape:
            raise ValueError(f"{name}: {one.shape} and {other.shape}")
        if name == "gradient":
            found[name] = float(np.linalg.norm(one - other) / np.linalg.norm(one))
        else:
            found[name] = float((np.abs(one - other) / np.abs(one)).max())
    return found


def beyond_limits(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for each difference that is too large, or not a number."""
    return [
        f"{side}: {name} differs by {value:.1e} (relative), more than {LIMITS[name]:.0e}"
        for side, row in found.items()
        for name, value in row.items()
        if not value <= LIMITS[name]
    ]
