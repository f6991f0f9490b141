"""`mallowspo doctor`: is this machine ready, and what mends it if not."""

import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mallowspo_cli.errors import MallowsPOError
from mallowspo_cli.files import cache_directory, make_directory

OPTIONAL = {
    "peft": ("LoRA adapters", "lora"),
    "bitsandbytes": ("QLoRA, adamw_8bit", "quantized"),
    "deepspeed": ("ZeRO training on several GPUs", "deepspeed"),
    "wandb": ("log.wandb", "wandb"),
    "tensorboard": ("log.tensorboard", "tensorboard"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: str
    """ok, note (works without), or fail."""
    text: str


def run() -> None:
    """Print the findings; see `mallowspo doctor --help`.

    Raises:
        MallowsPOError: something that every run needs is missing.
    """
    out = Console(highlight=False, soft_wrap=True)
    styles = {"ok": "green", "note": "yellow", "fail": "red"}
    findings = [*_versions(), *_devices(), *_places()]
    for finding in findings:
        out.print(f"{finding.level:5}", style=styles[finding.level], end="")
        out.print(finding.text, markup=False)
    failed = sum(finding.level == "fail" for finding in findings)
    if failed:
        raise MallowsPOError(f"doctor found {failed} problems, marked 'fail' above.")


def _versions() -> Iterator[Finding]:
    yield Finding("ok", f"mallowspo {_version('mallowspo') or '(not installed)'}")
    level = "ok" if sys.version_info >= (3, 11) else "fail"
    yield Finding(level, f"Python {platform.python_version()} on {platform.platform()}")
    for package in _required():
        version = _version(package)
        if version is None:
            yield Finding("fail", f"{package} is missing: {_install('')}")
        else:
            yield Finding("ok", f"{package} {version}")
    for package, (use, extra) in OPTIONAL.items():
        version = _version(package)
        if version is None:
            hint = f"{package} is missing ({use} only): {_install(f'[{extra}]')}"
            yield Finding("note", hint)
        else:
            yield Finding("ok", f"{package} {version}")


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except ImportError:
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use train.precision=fp32"
        yield Finding("ok", f"cuda:{index} {properties.name}, {memory:.0f} GiB, {bf16}")
    if not torch.cuda.is_available():
        threads = torch.get_num_threads()
        yield Finding("note", f"no GPU; training runs on the CPU with {threads} threads")


def _places() -> Iterator[Finding]:
    try:
        place = make_directory(cache_directory(), "the cache")
        yield Finding("ok", f"cache {place} is writable (MALLOWSPO_CACHE moves it)")
        models = sorted(p.name for p in (place / "models").glob("*") if not p.name.startswith("."))
        stores = list((place / "reference").glob("*/manifest.json"))
        yield Finding(
            "ok", f"cached: {len(models)} converted models, {len(stores)} reference stores"
        )
    except MallowsPOError as error:
        yield Finding("fail", f"{error} Set MALLOWSPO_CACHE to a writable directory.")
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return
    hub = Path(constants.HF_HUB_CACHE).expanduser()
    offline = " (HF_HUB_OFFLINE is set)" if constants.is_offline_mode() else ""
    try:
        make_directory(hub, "the hub cache")
        yield Finding("ok", f"hub cache {hub} is writable{offline}")
    except MallowsPOError as error:
        yield Finding("fail", f"{error} Set HF_HOME to a writable directory.")
    if get_token() is None:
        yield Finding("note", "no hub token (gated models only): hf auth login, or set HF_TOKEN")
    else:
        yield Finding("ok", "a hub token is set")


def _required() -> list[str]:
    """Names of the packages that every run needs."""
    wanted = importlib.metadata.requires("mallowspo") or []
    return [
        re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0] for line in wanted if "extra" not in line
    ]


def _install(extra: str) -> str:
    """The command that installs what is missing, in a checkout or out of one."""
    checkout = Path(__file__).parent.parent.parent
    if (checkout / "constraints.txt").is_file():
        return f"pip install -c constraints.txt -e '.{extra}'  (in {checkout})"
    return f"pip install 'mallowspo{extra}'"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
