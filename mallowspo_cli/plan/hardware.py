"""What a plan is for: kinds of device, how many of them, and how they are connected."""

import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mallowspo_cli.errors import RecipeError
from mallowspo_cli.recipe.choices import Precision

GIB = 2**30
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
MEASURE_SECONDS = 0.3
"""How long the rate of a CPU is measured."""
MEASURE_SIZE = 1024
"""Rows and columns of the matrices that are multiplied for it."""
FORM = re.compile(r"(?:(?:(\d+)x)?(\d+)x)?([a-z]\w*)")


@dataclass(frozen=True)
class Device:
    """A kind of device. Rates are those of data sheets; the shares of them are assumptions."""

    name: str
    bf16: float
    """FLOP/s at most, in dense matrix products with float32 sums."""
    fp32: float
    """The same in float32 (torch's default, without TF32)."""
    memory: float
    """Bytes, as torch reports them: some fewer than the name says."""
    within: float = 0.0
    """Bytes/s that a device sends, and receives, in collectives within a node: 80 % of NVLink's
    rate in one direction, or PCIe."""
    across: float = 0.0
    """The same between nodes: one network link, 400 Gb/s on an H100's node. Careful: where each
    device of a node has such a link of its own, a collective is split over them, and can come near
    `within`; `bandwidth=` takes what was measured."""
    per_node: int = 1
    """Devices of a node, unless the command line says how many."""
    reached: float = 0.5
    """Share of the peak that training steps are assumed to reach, with what they compute again."""
    pattern: str = ""
    """What torch's name of the device contains."""

    @property
    def is_cpu(self) -> bool:
        """Whether torch's CPU kernels run there."""
        return self.name == "cpu"


TABLE = (
    Device("h100", 989e12, 67e12, 79.1 * GIB, 360e9, 50e9, 8, pattern="H100"),
    Device("h200", 989e12, 67e12, 139.7 * GIB, 360e9, 50e9, 8, pattern="H200"),
    Device("a100", 312e12, 19.5e12, 79.1 * GIB, 240e9, 25e9, 8, pattern="A100-SXM4-80GB"),
    Device("l40s", 362e12, 91.6e12, 44.4 * GIB, 25e9, 12.5e9, 8, pattern="L40S"),
    Device("rtx4090", 165e12, 82.6e12, 23.6 * GIB, 25e9, 3e9, 8, pattern="RTX 4090"),
)
"""SXM modules where there are several forms, with 80 GB and 141 GB."""
NAMES = (*(device.name for device in TABLE), "cpu")


@dataclass(frozen=True)
class Hardware:
    """`devices` of one kind on each of `nodes` nodes, a process for each."""

    device: Device
    nodes: int = 1
    devices: int = 1
    """Of each node."""

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.nodes * self.devices

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        counts = [self.nodes] if self.nodes > 1 else []
        counts += [self.devices] if self.world_size > 1 else []
        return "x".join([*map(str, counts), self.device.name])

    @property
    def bandwidth(self) -> float:
        """Bytes/s of each device in a collective of all of them: a ring is as slow as the slowest
        link that it crosses.
        """
        return self.device.within if self.nodes == 1 else self.device.across

    @property
    def link(self) -> str:
        """Where that link lies."""
        return "within a node" if self.nodes == 1 else "between nodes"

    def peak(self, precision: Precision) -> float:
        """FLOP/s of one device at most."""
        return self.device.bf16 if precision is Precision.bf16 else self.device.fp32

    def rate(self, precision: Precision) -> float:
        """FLOP/s that one device is assumed to reach."""
        return self.peak(precision) * self.device.reached


def read_hardware(
    text: str | None,
    flops: float | None,
    precision: Precision,
    bandwidth: float | None = None,
) -> Hardware:
    """The hardware of `[[NODES x] N x] NAME`, or this machine's where `text` is None.

    Args:
        flops: FLOP/s that a device reaches, in the place of an assumed share of its peak, or of a
            CPU's measured one.
        precision: in which a CPU's rate is measured.
        bandwidth: bytes/s of a device in a collective of all of them, in the place of the table's.

    Raises:
        RecipeError: not of that form, no device of that name, or a GPU that is not in the table.
    """
    found = _this_machine() if text is None else _named(text)
    device = found.device
    if device.is_cpu:
        dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
        rate, reached = (matmul_rate(dtype), device.reached) if flops is None else (flops, 1.0)
        device = replace(device, bf16=rate, fp32=rate, reached=reached)
    elif flops is not None:
        device = replace(device, reached=flops / found.peak(precision))
    if bandwidth is not None:
        device = replace(device, within=bandwidth, across=bandwidth)
    return replace(found, device=device)


def _named(text: str) -> Hardware:
    """From what stands on the command line: 8xh100 are 8 on one node, 2x8xh100 two such nodes, and
    16xh100 as many nodes as it takes, of the table's number each: the same two.
    """
    form = FORM.fullmatch(text.lower())
    nodes, count, name = form.groups() if form else (None, None, "")
    device = next((device for device in (*TABLE, _cpu()) if device.name == name), None)
    if device is None or 0 in (int(nodes or 1), int(count or 1)):
        raise RecipeError(
            f"hardware={text} is not known. Expected one of {', '.join(NAMES)}, or several: "
            "8xh100, and 2x8xh100 for two nodes."
        )
    if device.is_cpu and count is not None:
        raise RecipeError(f"hardware={text}: on a CPU there is one process. Expected hardware=cpu.")
    devices = int(count or 1)
    if nodes is None and devices > device.per_node:
        if devices % device.per_node:
            raise RecipeError(
                f"hardware={text}: a node has {device.per_node} of {name}. Expected at most so "
                f"many, or whole nodes: 2x{device.per_node}x{name}."
            )
        return Hardware(device, devices // device.per_node, device.per_node)
    return Hardware(device, int(nodes or 1), devices)


def _this_machine() -> Hardware:
    """All GPUs of one node, or the CPU where there are none."""
    if not torch.cuda.is_available():
        return Hardware(_cpu())
    name = torch.cuda.get_device_name(0)
    for device in TABLE:
        if device.pattern in name:
            memory = torch.cuda.get_device_properties(0).total_memory
            return Hardware(replace(device, memory=memory), 1, torch.cuda.device_count())
    raise RecipeError(
        f"this machine's GPU, {name}, is not in the table. Name one that is like it "
        f"(hardware={', '.join(NAMES)}), with the FLOP/s that it reaches (flops=1e14)."
    )


def own_memory() -> float:
    """Bytes of this process's device: the first GPU that it sees, or this machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return _physical_memory()


def _cpu() -> Device:
    """This machine's CPU and memory; its rate is not known before it is measured."""
    return Device("cpu", 0.0, 0.0, _physical_memory())


def _physical_memory() -> int:
    """The machine's, or what a container may have of it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    return min(memory, int(limit)) if limit.isdigit() else memory


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of this machine's CPU in a product of square matrices: the fastest of several, since
    other programs run beside this one.
    """
    left = torch.ones(MEASURE_SIZE, MEASURE_SIZE, dtype=dtype)
    torch.mm(left, left)
    fastest, end = float("inf"), time.monotonic() + MEASURE_SECONDS
    while time.monotonic() < end or fastest == float("inf"):
        start = time.monotonic()
        torch.mm(left, left)
        fastest = min(fastest, time.monotonic() - start)
    return 2 * MEASURE_SIZE**3 / fastest
