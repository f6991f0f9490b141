"""What the plan says of published models on 1, 8 and 64 H100s. All of it on paper.

    python benchmarks/cluster_paper.py --json docs/results/cluster/paper.json

Makes configurations with the published dimensions (no weights, no tokenizer, no hub), takes the
lengths of benchmarks/lengths/ for the data, and asks the functions behind `mallowspo plan`. Prints
the tables of docs/cluster.md. Nothing is measured: rates are half of a card's peak, links those of
mallowspo_cli/plan/hardware.py.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measure
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig

from mallowspo_cli.files import write_json
from mallowspo_cli.models.attention import resolve_attention
from mallowspo_cli.packing.layout import Layout
from mallowspo_cli.plan.case import Case, Findings
from mallowspo_cli.plan.findings import find
from mallowspo_cli.plan.hardware import GIB, TABLE, read_hardware
from mallowspo_cli.plan.lengths import read_lengths
from mallowspo_cli.plan.shapes import read_shape
from mallowspo_cli.recipe.choices import Precision
from mallowspo_cli.recipe.load import load_recipe

LENGTHS = Path(__file__).parent / "lengths"
FAST = 360e9
"""Bytes/s between nodes where each card has a link of its own: as much as within a node."""


@dataclass(frozen=True)
class Data:
    """A data set of which lengths of some pairs are known."""

    file: str
    max_length: int
    pairs: int
    batch: int
    """Pairs of an optimizer step."""


@dataclass(frozen=True)
class Task:
    """A recipe on hardware."""

    recipe: str
    model: str
    data: str
    hardware: str
    bandwidth: float | None = None


DATA = {
    "UltraFeedback": Data("lengths_dpo_en_demo.json", 2048, 59_876, 256),
    "HH": Data("lengths_hh_harmless_test.json", 512, 160_800, 64),
}
MODELS = {
    "llama3_8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ),
    "pythia_2_8b": GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
        architectures=["GPTNeoXForCausalLM"],
    ),
    "gpt2_large": GPT2Config(
        n_embd=1280, n_layer=36, n_head=20, vocab_size=50257, architectures=["GPT2LMHeadModel"]
    ),
}
"""By the published dimensions."""
RECIPES = {
    "llama3_phi": ("llama3_8b", ("h100", "8xh100", "64xh100")),
    "llama3_lora_phi": ("llama3_8b", ("h100", "8xh100")),
    "hh_pythia_phi": ("pythia_2_8b", ("h100", "8xh100", "64xh100")),
    "imdb_gpt2_phi": ("gpt2_large", ("h100", "8xh100")),
}


def main() -> None:
    """Plan and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in MODELS.items():
            config.save_pretrained(Path(scratch) / name)
        found = [row for task in tasks() for row in rows_of(task, Path(scratch))]
    for data in DATA:
        show(data, [row for row in found if row["data"] == data])
    if options.json:
        h100 = {k: v for k, v in asdict(TABLE[0]).items() if k != "pattern"}
        about = {name: asdict(data) for name, data in DATA.items()}
        machine = {k: v for k, v in measure.machine().items() if "commit" in k}
        write_json(
            options.json,
            {
                "on_paper": True,
                "rows": found,
                "data": about,
                "h100": h100,
                "versions": measure.versions(),
                **machine,
            },
        )


def tasks() -> Iterator[Task]:
    """Every recipe on every data set; sixty-four cards with faster links between nodes, too."""
    for data in DATA:
        for recipe, (model, places) in RECIPES.items():
            for hardware in places:
                yield Task(recipe, model, data, hardware)
                if hardware == "64xh100":
                    yield Task(recipe, model, data, hardware, FAST)


def case_of(task: Task, models: Path) -> Case:
    """What `mallowspo plan` makes of the task's words."""
    data, directory = DATA[task.data], models / task.model
    words = [
        f"model.source={directory}",
        f"dataset.max_length={data.max_length}",
        "dataset.max_prompt_length=null",
        f"train.global_batch_size={data.batch}",
        "train.precision=bf16",
        "train.epochs=1",
    ]
    recipe = load_recipe(task.recipe, words).recipe
    known = read_lengths(LENGTHS / data.file, recipe.dataset, data.pairs)
    return Case(
        recipe=recipe,
        shape=read_shape(directory, recipe.model.lora),
        hardware=read_hardware(task.hardware, None, Precision.bf16, task.bandwidth),
        lengths=known.rows,
        layout=Layout.of(resolve_attention(directory, recipe.model.attention)),
        data=known.about,
    )


def rows_of(task: Task, models: Path) -> Iterator[dict[str, Any]]:
    """A row for the recipe as it is, and one for what the plan proposes where that is another."""
    case = case_of(task, models)
    plan = find(case)
    written, proposed = plan["as_written"], plan["proposed"]
    about = {**asdict(task), "parameters": case.shape.parameters, "trained": case.shape.trained}
    knobs = ("pack_tokens", "activation_checkpointing")
    yield {**about, **plain(written, case), "option": "recipe", "warnings": plan["warnings"]}
    if proposed is not None and any(proposed[knob] != written[knob] for knob in knobs):
        yield {**about, **plain(proposed, case), "option": "proposed", "warnings": []}


def plain(option: Findings, case: Case) -> dict[str, Any]:
    """The figures of a row: GiB, seconds, hours."""
    memory, step, reference = option["memory"], option["step"], option["reference_memory"]
    parts = ("weights", "gradients", "optimizer", "copies", "activations", "head", "working")
    packs = step["packs"] * case.setting.world_size
    return {
        "pack_tokens": option["pack_tokens"],
        "checkpointing": option["activation_checkpointing"],
        "fits": memory["fits"],
        "memory_gib": {part: memory[part] / GIB for part in (*parts, "peak")},
        "packs": step["packs"],
        "tokens_a_pack": step["tokens"] / packs,
        "hiding_tokens": step["hiding_tokens"],
        "imbalance": step["imbalance"],
        "compute_s": step["compute_seconds"],
        "traffic_s": step["traffic_seconds"],
        "step_s": step["seconds"],
        "step_apart_s": step["seconds_apart"],
        "pairs_per_s": step["pairs_per_second"],
        "mfu": step["mfu"],
        "training_h": option["training_seconds"] / 3600,
        "reference_min": option["reference_seconds"] / 60,
        "reference_gib": reference["peak"] / GIB if reference else None,
    }


def show(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """The two tables of a data set, as Markdown."""
    data = DATA[name]
    print(f"\n{name}: {data.pairs:,} pairs, {data.batch} a step, at most {data.max_length} tokens")
    print("\nmemory of a GPU, GiB")
    memory_head = (
        *("recipe", "hardware", "checkpointing", "weights", "gradients", "optimizer", "gathered"),
        *("activations", "head", "all", "reference pass"),
    )
    print(markdown(memory_head, [memory_line(row) for row in rows if row["bandwidth"] is None]))
    print("\ntime")
    time_head = (
        *("recipe", "hardware", "checkpointing", "packs", "tokens", "compute s", "send s"),
        *("step s", "sum s", "pairs/s", "hours", "reference min"),
    )
    print(markdown(time_head, [time_line(row) for row in rows if row["fits"]]))


def memory_line(row: dict[str, Any]) -> list[str]:
    """A line of the first table."""
    memory = row["memory_gib"]
    parts = ("weights", "gradients", "optimizer", "copies", "activations")
    last = memory["head"] + memory["working"]
    whole = f"{memory['peak']:.1f}" + ("" if row["fits"] else ", does not fit")
    cells = [*(f"{memory[part]:.1f}" for part in parts), f"{last:.1f}", whole]
    return [row["recipe"], place(row), policy(row), *cells, f"{row['reference_gib']:.1f}"]


def time_line(row: dict[str, Any]) -> list[str]:
    """A line of the second table."""
    sent = row["traffic_s"]
    return [
        *(row["recipe"], place(row), policy(row), f"{row['packs']:.1f}"),
        f"{row['tokens_a_pack']:,.0f}",
        f"{row['compute_s']:.2f}",
        f"{sent:.2f}" if sent else "-",
        f"{row['step_s']:.2f}",
        f"{row['step_apart_s']:.2f}" if sent else "-",
        f"{row['pairs_per_s']:,.0f}" if row["pairs_per_s"] > 20 else f"{row['pairs_per_s']:.1f}",
        f"{row['training_h']:.2f}",
        f"{row['reference_min']:.1f}",
    ]


def place(row: dict[str, Any]) -> str:
    """The hardware; fast: with links between nodes that are as fast as those within one."""
    return row["hardware"] + (", fast" if row["bandwidth"] else "")


def policy(row: dict[str, Any]) -> str:
    """Checkpointing and the size of packs."""
    return f"{row['checkpointing']}, {row['pack_tokens']:,}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    rule = ["---", "---", "---", *["---:"] * (len(head) - 3)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


if __name__ == "__main__":
    main()
