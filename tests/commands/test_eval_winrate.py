"""`mallowspo eval winrate`: a dataset's prompts, against its chosen answers or another model."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mallowspo_cli.commands.prompt_sources import as_instruction
from mallowspo_cli.data.pairs import Message
from mallowspo_cli.evaluation.outputs import read_annotations
from tests.commands.conftest import Command
from tests.conftest import pair_rows
from tests.evaluation.judges.judge_server import JudgeServer, completion, serving


@pytest.fixture
def judge() -> Iterator[JudgeServer]:
    def answer_a(request: dict, number: int):
        return completion("A", top={"A": math.log(0.8), "B": math.log(0.2)})

    with serving(answer_a) as server:
        yield server


@pytest.fixture
def words(write_rows: Callable[..., Path], judge: JudgeServer) -> list[str]:
    file = write_rows(pair_rows(12))
    return [
        *("eval", "winrate", "model=tiny_random", "dataset=local", f"dataset.path={file}"),
        *("dataset.eval_size=5", "generate.max_tokens=5", "generate.dtype=float32"),
        *("judge=pairwise_choice", f"judge.base_url={judge.url}", "judge.model=scripted"),
        "output_dir=out",
    ]


def test_against_the_chosen_answers_of_held_out_prompts(
    mallowspo: Command, words: list[str], tmp_path: Path
) -> None:
    done = mallowspo(*words, "judge.swap=both")
    assert done.code == 0, done.err
    rows = read_annotations(tmp_path / "out" / "annotations.json")
    chosen = {row["prompt"]: row["chosen"] for row in pair_rows(12)}
    assert len(rows) == 5
    for row in rows:
        assert row.output_1 == chosen[row.instruction]
        assert row.generator_1 == "chosen"
        # A judge that takes the first place whatever stands there says nothing in both orders.
        assert row.preference == pytest.approx(1.5)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["judge"]["order_agreement"] == 0
    assert summary["judge"]["first_shown_wins"] == 1
    assert "same verdict in both orders" in done.out


def test_against_another_model_at_several_temperatures(
    mallowspo: Command, words: list[str], tmp_path: Path
) -> None:
    done = mallowspo(*words, "against=tiny_random", "temperatures=0,1", "eval.limit=3")
    assert done.code == 0, done.err
    sweep = json.loads((tmp_path / "out" / "temperatures.json").read_text())
    assert list(sweep) == ["0", "1"]
    for name, summary in sweep.items():
        place = tmp_path / "out" / f"temperature-{name}"
        assert summary["n_total"] == len(read_annotations(place / "annotations.json")) == 3
        assert (place / "against" / "model_outputs.json").is_file()
    # The same model and the same random streams: each answer is its own rival's.
    assert sweep["1"]["win_rate"] == sweep["0"]["win_rate"] == 50
    assert "| 1 | 50.00 |" in (tmp_path / "out" / "temperatures.md").read_text()
    assert (tmp_path / "out" / "temperatures.png").is_file()


def test_the_limit_takes_the_same_prompts_for_every_model(
    mallowspo: Command, words: list[str], tmp_path: Path
) -> None:
    found = []
    for seed in ("0", "1"):
        place = f"output_dir=limit{seed}"
        done = mallowspo(
            *words[:-1], place, "eval.limit=2", "stage=generate", f"generate.seed={seed}"
        )
        assert done.code == 0, done.err
        rows = json.loads((tmp_path / f"limit{seed}" / "model_outputs.json").read_text())
        found.append([row["instruction"] for row in rows])
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_a_dry_run_takes_the_datas_answers_for_those_not_sampled(
    mallowspo: Command, words: list[str], judge: JudgeServer, tmp_path: Path
) -> None:
    done = mallowspo(*words, "--dry-run")
    assert done.code == 0, done.err
    assert "5 questions to scripted" in done.err
    assert judge.seen == []
    assert not (tmp_path / "out").exists()


def test_a_rescored_evaluation_keeps_the_temperature_it_was_sampled_at(
    mallowspo: Command, words: list[str], tmp_path: Path
) -> None:
    assert mallowspo(*words, "generate.temperature=1.3").code == 0
    assert mallowspo(*words, "stage=score").code == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["temperature"] == 1.3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["temperatures=warm"], "expected numbers"),
        (["temperatures=-1"], "generate.temperature=-1.0 is out of range"),
        (["temperatures=0,1", "generate.temperature=1"], "exclude each other"),
        (["dataset.eval_size=0"], "no held-out pairs"),
        (["against=runs/none"], "no run directory at runs/none"),
    ],
)
def test_words_that_cannot_be_used_get_one_line(
    mallowspo: Command, words: list[str], change: list[str], said: str
) -> None:
    named = {word.partition("=")[0] for word in change}
    kept = [word for word in words if word.partition("=")[0] not in named]
    done = mallowspo(*kept, *change)
    assert done.code == 2
    assert said in done.err


def test_without_a_dataset_the_example_is_shown(mallowspo: Command) -> None:
    done = mallowspo("eval", "winrate", "model=tiny_random")
    assert done.code == 2
    assert "found no dataset=" in done.err


def test_a_dialogue_is_told_with_its_speakers_and_a_question_as_it_is() -> None:
    assert as_instruction([Message("user", "Why?")]) == "Why?"
    turns = [Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Why?")]
    assert as_instruction(turns) == "Human: Hi\n\nAssistant: Hello\n\nHuman: Why?"
