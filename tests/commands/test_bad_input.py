"""What a user can get wrong: one line on stderr, exit code 2, nothing half-written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.commands.conftest import Command, Outcome
from tests.conftest import pair_rows


def complaint(done: Outcome) -> str:
    """The error line, checked to be the only one."""
    assert done.code == 2, done.err
    lines = [line for line in done.err.splitlines() if line.startswith("mallowspo: ")]
    assert len(lines) == 1, done.err
    assert "Traceback" not in done.err
    # The error is the last thing said.
    assert done.err.rstrip().endswith(lines[0])
    return lines[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["objective.betta=1"], "objective.betta is not a key of MallowsPhi"),
        (["objective.betta=1"], "Did you mean objective.beta?"),
        (["train.learning_rat=1"], "Did you mean train.learning_rate?"),
        (["+foo=1"], "foo is not a key"),
        (["train.epochs=many"], "train.epochs=many"),
        (["train.scheduler=cosin"], "nearest: cosine"),
        (["dataset.format=tlr"], "Did you mean 'trl'?"),
        (["train.epochs=0"], "train.epochs=0 is out of range"),
        (["objective=dop"], "Did you mean 'dpo'?"),
        (["objective.beta=-1"], "objective.beta=-1"),
        (["dispersion.scale=automatic"], "dispersion.scale=automatic"),
        (["objective=dpo,ipo"], "names several values"),
        (["nonsense"], "nonsense"),
        (["dataset.path=missing.jsonl"], "no data at missing.jsonl"),
        (["dataset.path=somebody/pairs"], "somebody/pairs"),
        (["model.source=./no_model"], "no model directory at ./no_model"),
        (["model.source=somebody/model"], "model.source=DIR"),
        (["train.global_batch_size=1000"], "train.global_batch_size=1000"),
        (["dataset.eval_size=16"], "dataset.eval_size=16"),
        (["output_dir=pairs.jsonl/run"], "cannot write"),
    ],
)
def test_a_wrong_word_is_named_with_the_way_out(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path, words: list[str], expected: str
) -> None:
    before = sorted(tmp_path.iterdir())
    assert expected in complaint(mallowspo("train", *tiny_words, *words))
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p not in before]
    assert left == []


@pytest.mark.parametrize("words", [[], ["recipe="], ["recipe=quickstart", "recipe=quickstart"]])
def test_a_recipe_is_asked_for(mallowspo: Command, words: list[str]) -> None:
    assert "mallowspo train recipe=quickstart" in complaint(mallowspo("train", *words))


def test_an_unknown_recipe_names_the_nearest(mallowspo: Command) -> None:
    line = complaint(mallowspo("train", "recipe=quickstrat"))
    assert "no recipe named 'quickstrat'. Did you mean 'quickstart'?" in line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "pairs.jsonl is empty"),
        ('{"prompt": "a", "chosen": "b"', "pairs.jsonl cannot be read as json"),
        (json.dumps({"question": "a", "answer": "b"}), "answer, question"),
        (json.dumps({"prompt": "a", "chosen": "b", "rejected": None}), "no rejected response"),
        (json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}), "responses are equal"),
    ],
)
def test_data_that_cannot_be_trained_on_is_named_by_file_and_row(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path, content: str, expected: str
) -> None:
    (tmp_path / "pairs.jsonl").write_text(content)
    line = complaint(mallowspo("train", *tiny_words))
    assert expected in line
    assert "pairs.jsonl" in line


def test_another_runs_directory_is_never_overwritten(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    assert mallowspo("train", *tiny_words, "train.max_steps=1").code == 0
    recipe = (tmp_path / "runs" / "tiny" / "recipe.yaml").read_bytes()
    assert "holds a run already" in complaint(mallowspo("train", *tiny_words))
    line = complaint(mallowspo("train", *tiny_words, "--resume", "seed=9"))
    assert "seed was 0, is 9" in line
    assert (tmp_path / "runs" / "tiny" / "recipe.yaml").read_bytes() == recipe


def test_a_failed_start_does_not_stand_in_the_way_of_the_mended_command(
    mallowspo: Command, tiny_words: list[str]
) -> None:
    complaint(mallowspo("train", *tiny_words, "dataset.path=missing.jsonl"))
    complaint(mallowspo("train", *tiny_words, "train.global_batch_size=1000"))
    assert mallowspo("train", *tiny_words, "train.max_steps=1").code == 0


def test_a_directory_that_is_no_run_is_left_alone(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    for words in ([], ["--resume"]):
        line = complaint(mallowspo("train", *tiny_words, "output_dir=thesis", *words))
        assert "holds files but no run" in line
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def test_a_run_is_not_resumed_on_other_data(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    assert mallowspo("train", *tiny_words).code == 0
    run = tmp_path / "runs" / "tiny"
    (run / "results.json").unlink()
    rows = (tmp_path / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text(rows.replace("Good 3", "Great 3"))
    line = complaint(mallowspo("train", *tiny_words, "--resume"))
    assert "began with other data" in line
    assert "_digest" in line
    (tmp_path / "pairs.jsonl").write_text(rows)
    assert mallowspo("train", *tiny_words, "--resume").code == 0


def test_two_processes_do_not_train_in_one_directory(
    mallowspo: Command, tiny_words: list[str]
) -> None:
    from mallowspo_cli.training.run_directory import locked

    with locked(Path("runs/tiny")):
        line = complaint(mallowspo("train", *tiny_words))
    assert "another process trains in runs/tiny" in line
    assert mallowspo("train", *tiny_words, "train.max_steps=1").code == 0


def test_a_corrupt_checkpoint_is_refused_by_name(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    assert mallowspo("train", *tiny_words).code == 0
    run = tmp_path / "runs" / "tiny"
    (run / "results.json").unlink()
    weights = run / "checkpoints" / "step_000006" / "rank_00000_of_00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\xff" * 8)
    metrics = (run / "metrics.jsonl").read_bytes()
    line = complaint(mallowspo("train", *tiny_words, "--resume"))
    assert "step_000006 is damaged: rank_00000_of_00001.safetensors" in line
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_a_cache_of_another_model_is_refused_with_what_differs(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    words = [*tiny_words, "reference.store=mine"]
    assert mallowspo("cache-ref", *words).code == 0
    line = complaint(mallowspo("train", *words, "train.precision=bf16"))
    assert "compute: float32, now bfloat16 autocast over float32" in line


def test_a_loss_that_is_not_finite_stops_before_the_update(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mallowspo_cli.objectives.dpo import DPO

    def broken(self, policy, reference):
        output = honest(self, policy, reference)
        return type(output)(
            output.losses / 0, output.chosen_rewards, output.rejected_rewards, output.metrics
        )

    honest = DPO.__call__
    monkeypatch.setattr(DPO, "__call__", broken)
    line = complaint(mallowspo("train", *tiny_words, "objective=dpo", "eval.at_start=false"))
    assert "the loss of step 1 is not finite for" in line
    assert "Nothing was updated" in line
    assert not (tmp_path / "runs" / "tiny" / "model").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "found no model="),
        (["model=runs/none"], "no run directory at runs/none"),
        (["model=tiny_random"], "Add dataset=NAME"),
        (["model=tiny_random", "dataset=quickstart_pairs"], "Add reference=MODEL"),
        (["model=tiny_random", "eval.limit=0"], "eval.limit=0"),
        (["recipe=quickstart", "model=tiny_random"], "not recipe="),
    ],
)
def test_eval_says_what_is_missing(mallowspo: Command, words: list[str], expected: str) -> None:
    assert expected in complaint(mallowspo("eval", "preferences", *words))


def test_an_unfinished_run_is_not_evaluated(
    mallowspo: Command, tiny_words: list[str], tmp_path: Path
) -> None:
    assert mallowspo("train", *tiny_words).code == 0
    (tmp_path / "runs" / "tiny" / "results.json").unlink()
    line = complaint(mallowspo("eval", "preferences", "model=runs/tiny"))
    assert "not finished" in line


def test_several_processes_are_refused_rather_than_trained_apart(
    mallowspo: Command, tiny_words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "KMP_AFFINITY"):
        # accelerate sets them; they are taken back at the end.
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes were launched" in complaint(mallowspo("train", *tiny_words))
    assert "2 processes were launched" in complaint(mallowspo("plan", *tiny_words))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_metric_that_no_evaluation_has_is_refused_before_anything_is_done(
    mallowspo: Command, tiny_words: list[str]
) -> None:
    line = complaint(mallowspo("train", *tiny_words, "checkpoint.best_by=eval/accuracy"))
    assert "eval/rewards/accuracies" in line
    assert not Path("runs/tiny/recipe.yaml").exists()


@pytest.mark.parametrize("name", ["bco", "beta_dpo"])
def test_the_best_by_a_loss_that_changes_with_the_steps_is_refused_before_anything_is_done(
    name: str, mallowspo: Command, tiny_words: list[str]
) -> None:
    words = [*tiny_words, f"objective={name}", "checkpoint.best_by=eval/loss"]
    line = complaint(mallowspo("train", *words))
    assert "checkpoint.best_by=eval/loss does not suit B" in line
    assert "eval/rewards/accuracies" in line
    assert not Path("runs/tiny/recipe.yaml").exists()


def test_a_gated_model_says_how_to_get_in(
    mallowspo: Command, write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx2
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise GatedRepoError(
            "gated", response=httpx2.Response(403, request=httpx2.Request("GET", "https://x"))
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    words = [
        "model=llama3_8b_instruct",
        "dataset=local",
        f"dataset.path={write_rows(pair_rows(9))}",
    ]
    line = complaint(mallowspo("train", "recipe=quickstart", *words))
    assert "meta-llama/Meta-Llama-3-8B-Instruct is gated" in line
    assert "HF_TOKEN" in line
