"""`mallowspo experiment out-of-distribution`: its words, its stages, what it leaves behind."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState

from mallowspo_cli.commands import experiment_ood, finish, ood_evaluation, train
from mallowspo_cli.commands.experiment_ood import controls_of, run
from mallowspo_cli.commands.jobs import Job
from mallowspo_cli.commands.ood_evaluation import reward_of
from mallowspo_cli.commands.ood_words import experiment_words
from mallowspo_cli.errors import (
    CheckpointError,
    EvalError,
    MallowsPOError,
    RecipeError,
    first_line,
)
from mallowspo_cli.experiments import rated_texts
from mallowspo_cli.experiments.rated_texts import CORPORA
from mallowspo_cli.files import sha256
from mallowspo_cli.models.sources import resolve_model
from mallowspo_cli.objectives.base import Objective
from mallowspo_cli.objectives.cpo import CPO
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.mallows import MallowsPhi
from mallowspo_cli.objectives.orpo import ORPO
from mallowspo_cli.objectives.rainbow import RainbowPO
from mallowspo_cli.objectives.simpo import SimPO
from mallowspo_cli.recipe.schema import ModelConfig, Recipe
from mallowspo_cli.reference.store import ReferenceStore
from tests.commands.conftest import Command
from tests.conftest import pair_rows
from tests.experiments.test_human_dispersion import made_up, write_archive

TINY = [
    *("model=tiny_random", "train.precision=fp32", "train.global_batch_size=4"),
    *("train.max_steps=2", "train.learning_rate=1e-3", "checkpoint.every=0", "to=out"),
]
LOCAL = ["train_on=train.jsonl", "dataset.eval_size=6"]
OBJECTIVES = "objectives=dpo,mallows_phi+objective.beta=0.3"


def margins(file: Path) -> dict[str, float]:
    columns = pq.read_table(file).to_pydict()
    return dict(zip(columns["pair_id"], columns["margin"], strict=True))


class Trainer:
    """Trains jobs in this process, as `train_job` does in one of its own, and counts them."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.failing: str | None = None
        self.stop_at: str | None = None
        self.before: Callable[[str], object] = lambda _name: None

    def __call__(self, job: Job, log_file: Path) -> str | None:
        if job.finished:
            return None
        if job.name == self.stop_at:
            raise KeyboardInterrupt
        if job.name == self.failing:
            return "found no memory, expected some."
        self.trained.append(job.name)
        self.before(job.name)
        AcceleratorState._reset_state(reset_partial_state=True)
        name, *overrides = job.words
        try:
            train.run(name.removeprefix("recipe="), overrides, resume=True, dry_run=False)
        except MallowsPOError as error:
            return first_line(error)
        return None


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """In an empty directory, with jobs trained in this process."""
    monkeypatch.chdir(tmp_path)
    found = Trainer()
    monkeypatch.setattr(experiment_ood, "train_job", found)
    # Its pictures take longer than such a run.
    monkeypatch.setattr(finish, "write_report", lambda *_: None)
    return found


@pytest.fixture
def files(write_rows: Callable[..., Path]) -> None:
    """One file to train on and two others."""
    rows = pair_rows(40)
    write_rows(rows[:18], "train.jsonl")
    write_rows(rows[20:30], "near.jsonl")
    write_rows([{**row, "prompt": f"Tell {row['prompt']}"} for row in rows[28:]], "far.jsonl")


@pytest.mark.usefixtures("files")
def test_every_objective_is_trained_and_scored_on_every_data_set(
    trainer: Trainer, tmp_path: Path, mallowspo: Command
) -> None:
    words = [*LOCAL, "targets=near.jsonl,far.jsonl", OBJECTIVES, "seeds=1", *TINY]
    # What checkpoints a run has, it needs until it is finished.
    words += ["checkpoint.every=1"]
    done = mallowspo("experiment", "out-of-distribution", *words)
    assert done.code == 0, done.err
    assert "report: out/report.md" in done.out
    out = tmp_path / "out"
    assert trainer.trained == ["dpo-seed0", "mallows_phi_objective.beta_0.3-seed0"]
    assert not list(out.glob("runs/*/*/checkpoints"))
    results = json.loads((out / "results.json").read_text())
    assert results["failed"] == []
    assert [each["verdict"] for each in results["claims"]] == ["not seen"] * 4
    assert results["data"]["train.jsonl"]["pairs"] == 6
    assert results["data"]["far.jsonl"]["pairs"] == 12
    assert results["setup"]["train_pairs"] == 12
    phi = next(each for each in results["runs"] if each["objective"] == "mallows_phi")
    assert phi["knobs"]["beta"] == 0.3
    assert phi["dispersion"]["weight_mean"] == pytest.approx(1, abs=1e-5)
    rows = list(csv.DictReader(io.StringIO((out / "rows.csv").read_text())))
    assert len(rows) == 2 * 3
    assert {each["data_set"] for each in rows if each["in_distribution"] == "true"} == {
        "train.jsonl"
    }
    report = (out / "report.md").read_text()
    assert "# Out of distribution: trained on train.jsonl, evaluated on near.jsonl" in report
    assert "mallowspo experiment out-of-distribution recipe=quickstart train_on=train" in report
    assert (out / "accuracy.png").read_bytes()[:4] == b"\x89PNG"

    # As `eval preferences` has it: all held-out pairs, and 11 of the 12 of a target.
    run_directory = out / "runs" / "dpo" / "seed0"
    elsewhere = ["dataset=local", "dataset.path=far.jsonl", "dataset.eval_size=11"]
    for data, name in (([], "train.jsonl"), (elsewhere, "far.jsonl")):
        done = mallowspo(
            *("eval", "preferences", "model=out/runs/dpo/seed0", *data, "eval.output=own.json")
        )
        assert done.code == 0, done.err
        own = margins(tmp_path / "own.parquet")
        mine = margins(run_directory / "evaluations" / f"preferences_ood_{name}.parquet")
        assert set(own) <= set(mine)
        assert len(own) == len(mine) - bool(data)
        assert own == pytest.approx({pair: mine[pair] for pair in own}, abs=1e-4)
        (row,) = [e for e in rows if (e["entry"], e["seed"], e["data_set"]) == ("dpo", "0", name)]
        assert np.mean(list(mine.values())) == pytest.approx(float(row["reward_margin"]))
        assert float(row["reward_margin"]) == pytest.approx(0.1 * float(row["margin_nats"]))


@pytest.mark.usefixtures("files")
def test_what_was_stopped_goes_on_without_training_or_scoring_again(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*LOCAL, "targets=near.jsonl", "objectives=dpo,mallows_theta", "seeds=2", *TINY]
    trainer.stop_at = "dpo-seed1"
    with pytest.raises(KeyboardInterrupt):
        run(words)
    assert trainer.trained == ["dpo-seed0", "mallows_theta-seed0"]
    assert not (tmp_path / "out" / "report.md").exists()
    trainer.stop_at, trainer.trained = None, []
    loaded: list[str] = []
    load = ood_evaluation.policy_scorer

    def counted(recipe: Recipe, policy: ModelConfig, *rest: object) -> object:
        loaded.append(policy.source)
        return load(recipe, policy, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ood_evaluation, "policy_scorer", counted)
    run(words)
    assert trainer.trained == ["dpo-seed1", "mallows_theta-seed1"]
    assert [Path(source).parent.name for source in loaded] == ["seed1", "seed1"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {(each["entry"], each["seed"]) for each in results["runs"]} == {
        (entry, seed) for entry in ("dpo", "mallows_theta") for seed in (0, 1)
    }
    assert {each["seeds"] for each in results["differences"]} == {2}


@pytest.mark.usefixtures("files")
def test_a_failed_run_is_recorded_and_the_others_go_on(trainer: Trainer, tmp_path: Path) -> None:
    words = [*LOCAL, "targets=near.jsonl", "objectives=mallows_theta,dpo", "seeds=1", *TINY]
    trainer.failing = "mallows_theta-seed0"
    with pytest.raises(EvalError, match=r"1 of 2 runs failed, first mallows_theta-seed0: found no"):
        run(words)
    assert trainer.trained == ["dpo-seed0"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    reason = "found no memory, expected some."
    assert results["failed"] == [{"run": "mallows_theta-seed0", "reason": reason}]
    assert {each["entry"] for each in results["outcomes"]} == {"dpo"}
    assert results["claims"] == []
    assert f"- mallows_theta-seed0: {reason}" in (tmp_path / "out" / "report.md").read_text()
    # Again, now with fewer pairs: what was finished is scored again, not trained again.
    trainer.failing, trainer.trained = None, []
    run([*words, "eval.limit=5"])
    assert trainer.trained == ["mallows_theta-seed0"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["failed"] == []
    assert {each["pairs"] for each in results["outcomes"]} == {5}
    assert results["data"]["near.jsonl"]["of"] == 10


@pytest.mark.usefixtures("files")
def test_where_no_run_is_finished_there_is_no_report(trainer: Trainer, tmp_path: Path) -> None:
    trainer.failing = "dpo-seed0"
    with pytest.raises(EvalError, match=r"no run was finished; dpo-seed0: found no memory"):
        run([*LOCAL, "targets=near.jsonl", "objectives=dpo", "seeds=1", *TINY])
    assert not (tmp_path / "out" / "report.md").exists()


@pytest.mark.usefixtures("files")
def test_target_pairs_that_the_runs_know_are_not_scored(
    trainer: Trainer, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    # The training file's 18 pairs, four others, and other answers to a prompt of each row.
    rows = pair_rows(22)
    other = [{**row, "chosen": f"{row['chosen']} indeed"} for row in rows]
    write_rows([*rows, *other], "mixed.jsonl")
    words = [*LOCAL, "objectives=dpo", "seeds=1", *TINY]
    run([*words, "targets=mixed.jsonl"])
    about = json.loads((tmp_path / "out" / "results.json").read_text())["data"]["mixed.jsonl"]
    assert about["known"] == {
        "training pairs": 12,
        "of training prompts": 12,
        "held-out pairs of the training data": 6,
    }
    assert about["pairs"] == 44 - 12 - 12 - 6
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| 6 held-out pairs of the training data; 12 of training prompts; 12 tr" in report
    again = tmp_path / "again.jsonl"
    again.symlink_to("train.jsonl")
    with pytest.raises(RecipeError, match=r"again.jsonl is what is trained on"):
        run([*words, "targets=again.jsonl"])


def test_held_out_pairs_of_training_prompts_are_not_scored(
    trainer: Trainer, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    rows = pair_rows(30)
    (tmp_path / "both").mkdir()
    write_rows(rows[:12], "both/train.jsonl")
    other = [{**row, "chosen": f"{row['chosen']} indeed"} for row in rows[:3]]
    write_rows([*rows[:2], *other, *rows[12:17]], "both/eval.jsonl")
    write_rows(rows[20:], "far.jsonl")
    words = ["train_on=both", "targets=far.jsonl", "objectives=dpo", "seeds=1", *TINY]
    run(words)
    about = json.loads((tmp_path / "out" / "results.json").read_text())["data"]["both"]
    assert about["known"] == {"training pairs": 2, "of training prompts": 3}
    assert about["pairs"] == 5


def test_where_all_training_pairs_share_a_prompt_responses_tell_them(
    trainer: Trainer, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    rows = [{**row, "prompt": "Say it"} for row in pair_rows(30)]
    (tmp_path / "one").mkdir()
    write_rows(rows[:12], "one/train.jsonl")
    write_rows(rows[12:18], "one/eval.jsonl")
    turned = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows[:4]]
    elsewhere = [{**row, "prompt": "Say it again"} for row in rows[4:7]]
    write_rows([*turned, *elsewhere, *rows[20:]], "mixed.jsonl")
    run(["train_on=one", "targets=mixed.jsonl", "objectives=dpo", "seeds=1", *TINY])
    about = json.loads((tmp_path / "out" / "results.json").read_text())["data"]
    assert about["one"]["pairs"] == 6
    assert about["mixed.jsonl"]["known"] == {"the responses of training pairs": 7}
    assert about["mixed.jsonl"]["pairs"] == 10


@pytest.mark.usefixtures("files")
def test_finished_runs_are_not_used_after_the_training_data_changed(
    trainer: Trainer, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    words = [*LOCAL, "targets=near.jsonl", "objectives=dpo", "seeds=1", *TINY]
    run(words)
    trainer.trained = []
    # What the finished run has seen would be out of distribution now.
    rows = pair_rows(60)
    write_rows(rows[40:58], "train.jsonl")
    write_rows(rows[:10], "near.jsonl")
    told = r"^out/runs/dpo/seed0 was trained on other data: held_out_digest, train_digest changed"
    with pytest.raises(CheckpointError, match=told):
        run(words)
    assert trainer.trained == []
    write_rows(rows[:18], "train.jsonl")
    write_rows(rows[20:32], "near.jsonl")
    run(words)
    assert trainer.trained == []
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["data"]["near.jsonl"]["pairs"] == 12


@pytest.mark.usefixtures("files")
def test_a_run_on_data_that_changed_meanwhile_is_a_failed_one(
    trainer: Trainer, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    rows = pair_rows(60)
    trainer.before = lambda name: write_rows(rows[30:48], "train.jsonl") if "ipo" in name else None
    words = [*LOCAL, "targets=far.jsonl", "objectives=dpo,ipo", "seeds=1", *TINY]
    with pytest.raises(
        EvalError, match=r"1 of 2 runs failed, first ipo-seed0: out/runs/ipo/seed0 w"
    ):
        run(words)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {each["entry"] for each in results["outcomes"]} == {"dpo"}


@pytest.mark.usefixtures("files")
def test_data_that_was_mended_before_a_run_was_finished_is_taken(
    trainer: Trainer, write_rows: Callable[..., Path]
) -> None:
    words = [*LOCAL, "targets=far.jsonl", "objectives=dpo", "seeds=1", *TINY]
    trainer.failing = "dpo-seed0"
    with pytest.raises(EvalError, match=r"no run was finished"):
        run(words)
    trainer.failing = None
    write_rows(pair_rows(60)[30:48], "train.jsonl")
    run(words)
    assert trainer.trained == ["dpo-seed0"]


@pytest.mark.usefixtures("files")
def test_targets_that_hold_the_same_pairs_do_not_count_twice(
    trainer: Trainer, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    words = [*LOCAL, "objectives=dpo", "seeds=1", *TINY]
    (tmp_path / "link.jsonl").symlink_to("near.jsonl")
    with pytest.raises(RecipeError, match=r"near.jsonl and link.jsonl are the same data, or one"):
        run([*words, "targets=near.jsonl,link.jsonl"])
    assert trainer.trained == []
    write_rows(pair_rows(40)[22:34], "copy.jsonl")
    run([*words, "targets=near.jsonl,copy.jsonl"])
    data = json.loads((tmp_path / "out" / "results.json").read_text())["data"]
    assert data["near.jsonl"]["pairs"] == 10
    assert data["copy.jsonl"]["known"] == {"pairs that an earlier target has": 8}
    assert data["copy.jsonl"]["pairs"] == 4


@pytest.mark.usefixtures("files")
def test_entries_of_different_rewards_are_compared_by_accuracy_alone(
    trainer: Trainer, tmp_path: Path
) -> None:
    run([*LOCAL, "targets=near.jsonl", "objectives=dpo,simpo", "seeds=1", *TINY])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {each["measure"] for each in results["differences"]} == {"accuracy"}
    assert "of 1 entries with a reward" in (tmp_path / "out" / "report.md").read_text()


def test_a_run_keeps_the_checkpoints_that_were_asked_for_and_evaluates_nothing_itself(
    tmp_path: Path,
) -> None:
    for words, kept in (
        ([], False),
        (["checkpoint.best_by=accuracy", "eval.every=2", "checkpoint.every=2"], True),
    ):
        wanted = experiment_words(["targets=shp", "seeds=1", f"to={tmp_path / str(kept)}", *words])
        ((_, _, job), *_) = experiment_ood.jobs_of(wanted)
        assert job.loaded is not None
        assert job.loaded.recipe.eval.every == (2 if kept else 0)
        (job.directory / "checkpoints").mkdir(parents=True)
        experiment_ood._tidy(job)
        assert (job.directory / "checkpoints").is_dir() == kept


@pytest.mark.usefixtures("files")
def test_two_data_sets_never_share_a_file(trainer: Trainer, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "near.jsonl").symlink_to("../far.jsonl")
    (tmp_path / "below_near.jsonl").symlink_to("far.jsonl")
    words = [*LOCAL, "objectives=dpo", "seeds=1", *TINY]
    pair = "below/near.jsonl,below_near.jsonl"
    with pytest.raises(RecipeError, match=r"below/near.jsonl and below_near.jsonl would "):
        run([*words, f"targets={pair}"])
    with pytest.raises(RecipeError, match=r"train.jsonl and ./train.jsonl would have the same"):
        run([*words, "targets=./train.jsonl"])
    # Where the recipe names the training data, that is a name, too.
    recipe = ["dataset=local", "dataset.path=below/near.jsonl", "dataset.eval_size=4"]
    with pytest.raises(RecipeError, match=r"below/near.jsonl and below_near.jsonl would "):
        run([*recipe, *words[2:], "targets=below_near.jsonl"])
    assert trainer.trained == []


@pytest.mark.usefixtures("files")
def test_references_score_all_data_before_the_first_training(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    complete = ood_evaluation.complete_store

    def counted(store: ReferenceStore, *rest: object) -> int:
        found = complete(store, *rest)  # type: ignore[arg-type]
        scored.append(found)
        return found

    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path / "cache"))
    resolve_model("random:llama")
    monkeypatch.setattr(ood_evaluation, "complete_store", counted)
    run([*LOCAL, "targets=near.jsonl", "objectives=dpo,ipo", "seeds=1", *TINY])
    # Held-out pairs, and the target's: once, and nothing at either evaluation.
    assert scored == [6, 10, 0, 0, 0, 0]
    scored.clear()
    entries = "objectives=dpo,ipo+train.precision=bf16"
    run([*LOCAL, "targets=far.jsonl", entries, "seeds=1", *TINY[:-1], "to=two"])
    # The first precision has the held-out pairs already.
    assert scored == [0, 12, 6, 12, 0, 0, 0, 0]


@pytest.mark.usefixtures("files")
def test_an_evaluation_out_of_memory_is_a_failed_run_that_says_what_to_lower(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*LOCAL, "targets=near.jsonl", "objectives=dpo,ipo", "seeds=1", *TINY]
    load = ood_evaluation.policy_scorer
    asked: list[int] = []

    def too_large(recipe: Recipe, policy: ModelConfig, *rest: object) -> object:
        asked.append(recipe.reference.pack_tokens)
        if "ipo" in policy.source and recipe.reference.pack_tokens > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return load(recipe, policy, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ood_evaluation, "policy_scorer", too_large)
    with pytest.raises(EvalError, match=r"1 of 2 runs .* ipo-seed0: out of memory while"):
        run(words)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Lower reference.pack_tokens (now 4096)" in report
    trainer.trained = []
    run([*words, "reference.pack_tokens=100"])
    assert trainer.trained == []
    assert asked == [4096, 4096, 100]


def test_rated_texts_are_data_sets_of_their_own(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOWSPO_CACHE", str(tmp_path / "cache"))
    resolve_model("random:llama")
    place = tmp_path / "cache" / "corpora" / "vaderSentiment-3.3.2.tar.gz"
    corpora = {corpus.stem: made_up(120, seed) for seed, corpus in enumerate(CORPORA.values())}
    archive = write_archive(place, corpora, sentences=12)
    monkeypatch.setattr(rated_texts, "SHA256", sha256(archive))
    entries = "mallows_theta,mallows_theta+dispersion.source=raters"
    words = [
        *("train_on=rated:movies", "targets=rated:tweets", f"objectives={entries}", "seeds=1"),
        *("train_pairs=9", "max_chars=60", *TINY),
    ]
    run(words)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [each["dispersion"]["source"] for each in results["runs"]] == ["entropy", "raters"]
    about = results["data"]["rated:tweets"]
    assert about["prompts"] == 1
    (corpus,) = (tmp_path / "cache" / "corpora" / "rated_pairs").glob("tweets-*")
    rows = [json.loads(line) for line in (corpus / "eval.jsonl").read_text().splitlines()]
    # Documents are resampled, of which some have several pairs.
    assert about["documents"] == len({row["document"] for row in rows})
    assert about["documents"] < about["pairs"] == len(rows)
    for outcome in results["outcomes"]:
        if outcome["data_set"] == "rated:tweets":
            assert outcome["units"] == about["documents"]
    accuracy = results["outcomes"][0]
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    assert results["setup"]["prompts"]["rated:movies"].startswith(
        "Write one sentence from a review"
    )
    report = (tmp_path / "out" / "report.md").read_text()
    assert "asks for a text that is as positive as can be" in report
    # How many are scored changes nothing of what is trained.
    trained, trainer.trained = trainer.trained, []
    run([*words, "eval.limit=2"])
    assert (len(trained), trainer.trained) == (2, [])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {each["pairs"] for each in results["outcomes"]} == {2}


def test_a_control_is_what_its_recipe_makes_one_and_of_the_same_recipe_but_for_that() -> None:
    phi = "mallows_phi+objective.beta=0.3"
    entries = [
        *("dpo", phi, f"{phi}+dispersion.mode=shuffled", "mallows_phi+dispersion.mode=constant"),
        *(
            "mallows_theta",
            'mallows_theta+dispersion.mode="inverse"',
            "dpo+dispersion.mode=constant",
        ),
        "mallows_theta+dispersion.mode=constant+train.learning_rate=2e-6",
    ]
    wanted = experiment_words(["targets=shp", f"objectives={','.join(entries)}", "seeds=2"])
    assert wanted.entries[2].words == ("objective.beta=0.3", "dispersion.mode=shuffled")
    found = controls_of(experiment_ood.jobs_of(wanted))
    assert found == {
        entries[2]: phi,
        # Of another beta, or another learning rate.
        entries[3]: None,
        entries[5]: "mallows_theta",
        entries[7]: None,
    }


@pytest.mark.parametrize(
    ("objective", "reward", "begins_at_chance"),
    [
        (DPO(), "log-ratio, summed", True),
        (MallowsPhi(length_normalised=True), "log-ratio, per token", True),
        (CPO(), "log-prob, summed", False),
        (SimPO(), "log-prob, per token", False),
        (ORPO(), "log-prob, per token", False),
        (RainbowPO(mixing=0.25), "log-prob less 0.25 of the reference's, per token", False),
        (RainbowPO(mixing=1.0), "log-ratio, per token", True),
        (RainbowPO(mixing=0.0), "log-prob, per token", False),
    ],
)
def test_a_reward_is_named_by_what_its_margin_is(
    objective: Objective, reward: str, begins_at_chance: bool
) -> None:
    assert reward_of(objective) == (reward, begins_at_chance)


def test_what_is_not_said_has_defaults() -> None:
    wanted = experiment_words(["targets=shp"])
    assert wanted.recipe == "quickstart"
    assert wanted.seeds == (0, 1, 2)
    default = experiment_words(["targets=shp,stack_exchange"]).entries
    assert [entry.objective for entry in default] == ["dpo", "mallows_theta", "mallows_phi"]
    assert default[2].words == ("objective.beta=0.3",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "found no targets=. Example: mallowspo experiment out-of-distribution"),
        (["target=shp"], "Did you mean 'targets'?"),
        (["targets="], "targets is empty"),
        (["targets=shp,shp"], "expected different names"),
        (["targets=spp"], "no data set 'spp'. Did you mean 'shp'?"),
        (["targets=rated:movie"], "Did you mean 'rated:movies'?"),
        (["targets=none.jsonl"], "no data set 'none.jsonl'"),
        (["targets=shp", "train_on=shp"], "targets holds shp, which is what is trained on"),
        (["targets=shp", "train_on=hh_rlhf", "dataset=imdb"], "name two data sets"),
        (["targets=shp", "seeds=a"], "seeds=a is not a whole number of at least 1"),
        (["targets=shp", "seeds=0,1,2"], "seeds=0,1,2 is not a whole number of at least 1"),
        (["targets=shp", "objective.beta=1"], "'objective.beta=1' would hold for every objective."),
        (["targets=shp", "dispersion.mode=shuffled"], "objectives=dpo,mallows_theta+dispersion.mo"),
        (["targets=shp", "++dispersion.mode=constant"], "dpo,mallows_theta+dispersion.mode=consta"),
        (["targets=shp", "dispersion={mode:constant}"], "has dispersion.mode=constant for every"),
        (["targets=shp", "objectives=dpo,dpo"], "expected different names"),
        (["targets=shp", "objectives=dpo+model=x"], "'model=x' in 'dpo+model=x' is not one of"),
        (["targets=shp", "objectives=dpo+objective.beta"], "is not one of objective.KEY=VALUE"),
        (["targets=shp", "eval.limit=0"], "eval.limit=0 is not a whole number of at least 2"),
        (["targets=shp", "seed=1"], "'seed=1' is no word of this command. seeds=N trains"),
        (["targets=shp", "objective=dpo"], "Name them in objectives=A,B."),
        (["targets=shp", "objectives=dop"], "Did you mean 'dpo'?"),
        (["targets=shp", "objectives=dpo+objective.betta=1"], "Did you mean objective.beta?"),
        (["targets=shp", "train.epoch=1"], "Did you mean train.epochs?"),
        (["targets=shp", "recipe=quickstrat"], "Did you mean 'quickstart'?"),
    ],
)
def test_wrong_words_are_told_in_a_line(
    trainer: Trainer, tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(MallowsPOError) as error:
        run(words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert trainer.trained == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("files")
def test_data_without_held_out_pairs_is_refused_before_training(trainer: Trainer) -> None:
    words = ["train_on=train.jsonl", "targets=near.jsonl", "objectives=dpo", "seeds=1", *TINY]
    with pytest.raises(MallowsPOError, match=r"no held-out pairs. Name a split"):
        run([*words, "dataset.eval_size=0"])
    assert trainer.trained == []
