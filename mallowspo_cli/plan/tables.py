"""A plan, printed."""

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mallowspo_cli.plan.case import Findings
from mallowspo_cli.plan.gain import BATCH
from mallowspo_cli.plan.hardware import GIB

WIDTH = 120
"""Columns of a table that goes to a file."""
NOTHING = "nothing to complain of"
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer's states",
    "copies": "copies of weights in work",
    "activations": "activations",
    "head": "output layer: logits, its gradient",
    "working": "a block's gradients",
}
"""Parts of memory, and what they are called."""

Row = tuple[str, Callable[[Findings], str]]
"""A line of a table: its name, and what it says of an option."""


def print_plan(findings: Findings) -> None:
    """The plan as tables, and what to look at."""
    out = Console(highlight=False, markup=False)
    if not out.is_terminal:
        # A file has no width; in 80 columns a table would lose digits.
        out.width = max(out.width, WIDTH)
    for line in _introduction(findings):
        out.print(line, soft_wrap=True)
    sections = {
        "setting": SETTING,
        "memory of a process at its peak": MEMORY,
        "an optimizer step": STEP,
        "memory of a process in the reference pass": REFERENCE,
        "the run": RUN,
    }
    options = _options(findings)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("predicted", no_wrap=True)
    for name in options:
        table.add_column(name, justify="right", no_wrap=True)
    for title, rows in sections.items():
        table.add_row(title, style="bold")
        for name, tell in rows:
            table.add_row(f"  {name}", *(tell(option) for option in options.values()))
        table.add_section()
    out.print(table)
    if findings["gain"]:
        out.print(_gain_line(findings), soft_wrap=True)
    for line in findings["notes"]:
        out.print(f"note: {line}", style="dim", soft_wrap=True)
    out.print("what to look at:", style="bold")
    for line in findings["warnings"] or [NOTHING]:
        out.print(f"- {line}", soft_wrap=True)


def _options(findings: Findings) -> dict[str, Findings]:
    """A column for what the recipe says, and one for the proposal where it is another."""
    written, proposed = findings["as_written"], findings["proposed"]
    knobs = ("pack_tokens", "activation_checkpointing")
    if proposed is None:
        return {"as written": written}
    if all(written[knob] == proposed[knob] for knob in knobs):
        return {"as written, as proposed": written}
    return {"as written": written, "proposed": proposed}


def _pack_tokens(option: Findings) -> str:
    given = option.get("pack_tokens_given", True)
    return f"{option['pack_tokens']}" if given else f"null: {option['pack_tokens']}"


def _introduction(findings: Findings) -> Sequence[str]:
    model, data, run, hardware = (findings[key] for key in ("model", "data", "run", "hardware"))
    trained = (
        "" if model["trained"] == model["parameters"] else f", {count(model['trained'])} trained"
    )
    nodes = hardware["nodes"]
    where = f" ({nodes} nodes of {hardware['devices_of_a_node']})" if nodes > 1 else ""
    return (
        f"model: {model['source']}, {count(model['parameters'])} parameters{trained}",
        f"data: {data['dataset']}, {data['pairs']:,} pairs of {data['mean_tokens']:,.0f} tokens "
        f"({data['prompt_share']:.0%} prompt), the longest {data['longest_pair']:,}",
        f"run: {run['steps']:,} steps of {run['pairs_per_step']} pairs on {hardware['name']}"
        f"{where}, {hardware['memory'] / GIB:.1f} GiB each, in {hardware['precision']}",
    )


def _bytes(part: str) -> Callable[[Findings], str]:
    return lambda option: size(option["memory"][part])


SETTING: tuple[Row, ...] = (
    ("train.pack_tokens", _pack_tokens),
    ("train.activation_checkpointing", lambda option: option["activation_checkpointing"]),
)
MEMORY: tuple[Row, ...] = (
    *((name, _bytes(part)) for part, name in PARTS.items()),
    ("all", _bytes("peak")),
    ("of the device", lambda option: f"{option['memory']['share']:.0%}"),
    ("when", lambda option: option["memory"]["when"]),
)
STEP: tuple[Row, ...] = (
    ("packs of a process", lambda option: f"{option['step']['packs']:.1f}"),
    ("fill", lambda option: f"{option['step']['fill']:.1%}"),
    ("busiest process over the mean", lambda option: f"{option['step']['imbalance']:.3f}"),
    ("TFLOP, all processes", lambda option: short(option["step"]["flops"] / 1e12)),
    ("computing", lambda option: duration(option["step"]["compute_seconds"])),
    ("sending weights and gradients", lambda option: duration(option["step"]["traffic_seconds"])),
    ("time of a step", lambda option: duration(option["step"]["seconds"])),
    ("the same, were sending not hidden", lambda option: _apart(option["step"])),
    ("tokens of a pack that hide it", lambda option: _hiding(option["step"])),
    ("pairs/s", lambda option: short(option["step"]["pairs_per_second"])),
    ("useful share of the peak (MFU)", lambda option: f"{option['step']['mfu']:.0%}"),
)
REFERENCE: tuple[Row, ...] = (
    ("weights, whole", lambda option: _of_reference(option, "weights")),
    ("all, at its peak", lambda option: _of_reference(option, "peak")),
)
RUN: tuple[Row, ...] = (
    ("reference pass, once", lambda option: duration(option["reference_seconds"])),
    ("training", lambda option: duration(option["training_seconds"])),
    ("together", lambda option: duration(option["seconds"])),
)


def _apart(step: Findings) -> str:
    return duration(step["seconds_apart"]) if step["traffic_seconds"] else "-"


def _hiding(step: Findings) -> str:
    return f"{step['hiding_tokens']:,.0f}" if step["hiding_tokens"] else "-"


def _of_reference(option: Findings, part: str) -> str:
    memory = option["reference_memory"]
    return size(memory[part]) if memory else "-"


def _gain_line(findings: Findings) -> str:
    gain, epochs = findings["gain"], findings["run"]["epochs"]
    over = "one epoch" if epochs == 1 else f"{epochs} epochs"
    return (
        f"against padded random batches of {BATCH} pairs: {gain['tokens']:.2f} times fewer tokens, "
        f"{gain['flops']:.2f} times fewer FLOPs in training; over {over} with the "
        f"reference pass {gain['flops_with_reference']:.2f} times, and "
        f"{gain['flops_live_reference']:.2f} times against a reference that runs in every step. "
        "Tokens and FLOPs are not time."
    )


def count(number: float) -> str:
    """Parameters, shortly: 8.03 B."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {letter}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes in the unit that suits them; a dash for none."""
    if number == 0:
        return "-"
    return f"{number / GIB:,.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:,.2f} MiB"


def duration(seconds: float) -> str:
    """A time in the unit that suits it; a dash for none."""
    if seconds == 0:
        return "-"
    units = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "h"), (120, 60, "min"), (1, 1, "s"))
    for least, unit, name in (*units, (1e-3, 1e-3, "ms")):
        if seconds >= least:
            return f"{short(seconds / unit)} {name}"
    return f"{short(seconds * 1e6)} us"


def short(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
