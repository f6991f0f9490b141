"""Every command and every Python block in the README and the docs runs."""

import re
import shlex
from pathlib import Path

import pytest

from mallowspo_cli.commands.sentiment_words import read_plan
from tests.commands.conftest import Command, mallowspo  # noqa: F401 (a fixture)
from tests.conftest import pair_rows

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# They set up an environment of their own; .ci/run runs `make test` and a short quickstart.
NOT_RUN_HERE = {
    *("make quickstart", "make test"),
    # Fetches its corpora; tests/experiments runs it on a small one.
    "mallowspo experiment human-dispersion",
    # Two minutes; the smaller one beside it runs.
    "mallowspo experiment estimator",
    # Nine runs each, on data from the hub or a package; tests/commands has two on small files.
    "mallowspo experiment out-of-distribution recipe=hh_pythia_dpo targets=shp,stack_exchange "
    "objectives=hh_dpo,hh_theta,hh_phi",
    "mallowspo experiment out-of-distribution train_on=rated:movies "
    "targets=rated:products,rated:tweets train.max_steps=20",
    "mallowspo experiment out-of-distribution train_on=rated:movies "
    "targets=rated:products,rated:tweets "
    "objectives=dpo,mallows_theta,mallows_phi+objective.beta=0.3,"
    "mallows_theta+dispersion.mode=shuffled seeds=5 train.max_steps=24 train.global_batch_size=8 "
    "train.learning_rate=5e-5 train_pairs=400 eval.limit=120 max_chars=60 "
    "model.chat_template=dialogue reference.pack_tokens=1024 checkpoint.every=0",
}

SMALL = [
    "train.max_steps=2",
    "train.global_batch_size=2",
    "train.precision=fp32",
    "eval.kl_prompts=0",
    "checkpoint.every=1",
]
"""Makes a documented training run one of seconds; its own words come first."""


def blocks(language: str) -> list[tuple[str, str]]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(path.name, text) for path in DOCS for text in pattern.findall(path.read_text())]


def commands() -> list[str]:
    lines = [line for _, text in blocks("sh") for line in text.splitlines()]
    found = [line.partition(" #")[0].strip() for line in lines]
    return list(dict.fromkeys(line for line in found if line))


def tiny(words: list[str]) -> list[str]:
    """The same command on the tiny model and a small file."""
    data = ["dataset=local", "dataset.path=pairs.jsonl", "dataset.eval_size=4"]
    named = {word.partition("=")[0] for word in words}
    if words[0] in ("train", "cache-ref", "cache", "data", "dispersion", "plan"):
        elsewhere = ("model=", "model.source=", "model.revision=", "dataset")
        kept = [w for w in words if not w.startswith(elsewhere)]
        # Eight processes take at least eight pairs a step.
        small = [*SMALL, "train.global_batch_size=8"] if words[0] == "plan" else SMALL
        return [*kept, "model=tiny_random", *data, *small]
    if words[0] == "sweep":
        # Every choice is composed. tests/commands/test_sweep.py runs some.
        kept = [w for w in words if not w.startswith("seed=")]
        return kept if "--launch" in words else [*kept, "--launch", "print"]
    if words[0] == "eval" and words[1] in ("alpacaeval", "winrate", "generations"):
        here = [w.replace("=docs/data/", f"={ROOT}/docs/data/") for w in words]
        here = [w.replace("smollm2_135m", "tiny_random") for w in here]
        short = [re.sub(r"^generate\.max_tokens=.*", "generate.max_tokens=4", w) for w in here]
        kept = [w for w in short if not w.startswith("dataset")]
        return [*kept, *(data if "dataset" in named else [])]
    if words[:2] == ["eval", "preferences"]:
        kept = [w for w in words if not w.startswith("dataset")]
        small = [w.replace("smollm2_135m", "tiny_random") for w in kept]
        return [*small, *data, "train.precision=fp32"] if "reference" in named else kept
    return words


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_every_documented_command_runs(
    mallowspo: Command,  # noqa: F811
    tmp_path: Path,
    write_rows,
) -> None:
    write_rows(pair_rows(14))
    ran = 0
    for command in commands():
        if command in NOT_RUN_HERE:
            continue
        program, *words = shlex.split(command)
        assert program == "mallowspo", f"what is {command!r}?"
        if words[:2] == ["experiment", "sentiment"]:
            # Runs of the real model; tests/commands runs it on a tiny one.
            read_plan(words[2:])
            continue
        done = mallowspo(*tiny(words))
        assert done.code == 0, f"{command}\n{done.err}"
        ran += 1
    assert ran >= 10
    assert (tmp_path / "runs" / "quickstart" / "evaluations").is_dir()


@pytest.mark.parametrize(("name", "code"), blocks("python"))
def test_documented_python_runs(name: str, code: str) -> None:
    exec(compile(code, name, "exec"), {})


def test_links_between_the_documents_lead_somewhere() -> None:
    for path in DOCS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
