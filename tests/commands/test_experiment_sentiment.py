"""`mallowspo experiment sentiment` on the tiny model, with reviews of the project's own."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from numpy.typing import NDArray

from mallowspo_cli.commands import experiment_sentiment, sentiment_lab
from mallowspo_cli.commands.experiment_sentiment import Experiment, run
from mallowspo_cli.commands.sentiment_words import read_plan
from mallowspo_cli.errors import EvalError, RecipeError, TrainingError
from mallowspo_cli.experiments.sentiment import Curve, area
from mallowspo_cli.experiments.sentiment_methods import Job
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.ipo import IPO
from mallowspo_cli.recipe.load import load_recipe
from mallowspo_cli.training.loop import optimizer_step
from tests.commands.conftest import Command

GOOD, BAD = ("splendid", "moving", "witty"), ("dreary", "clumsy", "hollow")
SMALL = (
    *("model=tiny_random", "model.chat_template=plain", "train.learning_rate=1e-3"),
    *("train.global_batch_size=2", "train.max_steps=2", "train.warmup_steps=0"),
    *("prompts=2", "samples=3", "eval_prompts=3", "max_tokens=5", "prompt_words=4"),
)


class Letters:
    """A classifier that finds something in the random model's letters."""

    about: ClassVar = {"name": "letters", "kind": "a test's"}

    def log_odds(self, texts: Sequence[str]) -> NDArray[np.float64]:
        return np.asarray([sum(map(ord, text)) % 97 / 30 - 1.5 for text in texts])


@pytest.fixture
def reviews(write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """The word reviews=FILE."""
    rows = [
        {"text": f"Film {i} was a {(GOOD if i % 2 else BAD)[i % 3]} thing", "label": i % 2}
        for i in range(120)
    ]
    # Accelerate keeps the precision of the first Accelerator of a process.
    AcceleratorState._reset_state(reset_partial_state=True)
    path = write_rows(rows, "reviews.jsonl")
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(experiment_sentiment, "chosen_classifier", lambda *_: Letters())
    return f"reviews={path}"


def rows_in(place: str) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text()) for file in Path(place, "rows").glob("*.json")}


def results_in(place: str) -> dict[str, Any]:
    return json.loads(Path(place, "results.json").read_text())


def test_every_run_leaves_a_row_and_the_report_says_what_they_decide(reviews: str) -> None:
    run([*SMALL, reviews, "methods=dpo,mallows_theta", "factors=1,3", "seeds=2", "to=out"])
    rows = rows_in("out")
    assert len(rows) == 2 + 2 * 2 * 2
    assert rows["reference-seed0"]["kl"] == rows["reference-seed1"]["kl"] == 0
    assert rows["reference-seed0"]["rewards"] != rows["reference-seed1"]["rewards"]
    one = rows["dpo-beta0.3-seed1"]
    assert [point["step"] for point in one["points"]] == [1, 2]
    assert len(one["points"][0]["rewards"]) == 3
    assert one["points"][-1]["kl"] != 0
    found = results_in("out")
    assert found["runs"] == {"wanted": 8, "done": 8}
    assert {claim["verdict"] for claim in found["claims"]} <= {"held", "not seen", "opposite"}
    report = Path("out", "report.md").read_text()
    assert "8 of 8 runs are done" in report
    assert "MallowsPO-theta has a better frontier than DPO" in report
    with Path("out", "rows.csv").open() as handle:
        assert len(list(csv.DictReader(handle))) == 2 + 16
    for name in ("frontier.png", "areas.png"):
        assert Path("out", name).read_bytes().startswith(b"\x89PNG")


def test_a_run_does_not_depend_on_those_before_it(reviews: str) -> None:
    run([*SMALL, reviews, "methods=ipo,dpo", "factors=1", "seeds=1", "to=both"])
    run([*SMALL, reviews, "methods=dpo", "factors=1", "seeds=1", "to=alone"])
    both, alone = (rows_in(place)["dpo-beta0.1-seed0"] for place in ("both", "alone"))
    assert both["points"] == alone["points"]
    assert both["points"] != rows_in("both")["ipo-beta0.1-seed0"]["points"]


def test_theta_with_a_constant_weight_is_dpo_to_the_bit(reviews: str) -> None:
    plan = read_plan([*SMALL, reviews, "methods=dpo", "factors=1", "seeds=1", "to=out"])
    reviewed = experiment_sentiment.load_reviews(Path(plan.own["reviews"]))
    classifier = experiment_sentiment.chosen_classifier(plan.own, reviewed)
    found = Experiment(plan, reviewed, classifier)
    pairs = found.lab.pairs(0, found.train_tasks[0], "a test")
    tasks = found.eval_tasks[0]
    words = [*plan.words, "objective.beta=0.1", "dispersion.mode=constant"]
    points = [
        found.lab.train(
            load_recipe(plan.recipe, [*words, f"objective={name}"]).recipe, pairs, tasks
        )
        for name in ("dpo", "mallows_theta")
    ]
    assert points[0][-1]["rewards"] == points[1][-1]["rewards"]
    assert points[0][-1]["kl"] == points[1][-1]["kl"] != 0


def test_what_was_stopped_goes_on_with_the_rows_that_are_there(
    reviews: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL, reviews, "methods=dpo,ipo", "factors=1", "seeds=1"]
    run([*words, "to=whole"])
    steps = []

    def stopping(*args: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return optimizer_step(*args)

    monkeypatch.setattr(sentiment_lab, "optimizer_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run([*words, "to=parts"])
    assert set(rows_in("parts")) == {"reference-seed0", "dpo-beta0.1-seed0"}
    assert results_in("parts")["runs"] == {"wanted": 2, "done": 1}
    steps.clear()
    run([*words, "to=parts"])
    # The first run's two steps are not taken again.
    assert len(steps) == 2
    for name, row in rows_in("whole").items():
        assert rows_in("parts")[name].get("points") == row.get("points")
    assert results_in("parts")["areas"] == results_in("whole")["areas"]


def test_a_run_that_fails_in_the_middle_of_a_step_leaves_nothing_to_the_next(
    reviews: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several packs a step, so that some have their gradient when the loss is looked at.
    words = [*SMALL, reviews, "train.pack_tokens=16", "factors=1", "seeds=1"]
    run([*words, "methods=dpo", "to=alone"])

    def failing(self: IPO, *args: Any) -> Any:
        output = DPO.__call__(self, *args)  # type: ignore[arg-type]
        return replace(output, losses=output.losses * math.inf)

    with monkeypatch.context() as patched:
        patched.setattr(IPO, "__call__", failing)
        patched.setattr(IPO, "label_smoothing", 0.0, raising=False)
        with pytest.raises(TrainingError, match=r"1 of 2 runs failed, .*not finite"):
            run([*words, "methods=ipo,dpo", "to=out"])
    found = results_in("out")
    assert found["runs"]["done"] == 2
    assert list(found["failed"]) == ["ipo beta 0.1 seed 0"]
    assert "not finite" in found["failed"]["ipo beta 0.1 seed 0"]
    assert found["left_out"] == ["ipo seed 0"]
    assert list(found["areas"]) == ["dpo"]
    assert "## Failed runs" in Path("out", "report.md").read_text()
    name = "dpo-beta0.1-seed0"
    assert rows_in("out")[name]["points"] == rows_in("alone")[name]["points"]
    # What failed is tried again, and nothing else is.
    before = Path("out", "rows", f"{name}.json").stat().st_mtime_ns
    run([*words, "methods=ipo,dpo", "to=out"])
    assert results_in("out")["failed"] == {}
    assert Path("out", "rows", f"{name}.json").stat().st_mtime_ns == before


def test_where_every_run_fails_it_is_said_and_each_is_tried_once(
    reviews: str,
    mallowspo: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries = []

    def failing(*_: Any) -> Any:
        tries.append(1)
        raise TrainingError("the loss is not finite.")

    monkeypatch.setattr(sentiment_lab, "optimizer_step", failing)
    words = [*SMALL, reviews, "methods=dpo,ipo", "factors=1", "seeds=1", "to=out"]
    done = mallowspo("experiment", "sentiment", *words)
    assert done.code == 2
    assert "2 of 2 runs failed, the first with: the loss is not finite." in done.err
    assert "dpo-beta0.1-seed0 failed: the loss is not finite." in done.err
    assert "no report" in done.err
    assert not Path("out", "report.md").exists()
    assert len(tries) == 2


def test_what_fails_in_another_process_is_not_tried_again_here(
    reviews: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL, reviews, "methods=dpo,ipo", "factors=1", "seeds=1", "to=out"]
    first = Experiment._train
    trained = []

    def training(self: Experiment, job: Job) -> dict[str, Any]:
        trained.append(job.method.name)
        # While this process trains, another one's next run fails.
        other = self.plan.jobs()[1]
        found = {"seed": 0, "method": "ipo", "beta": 0.1, "points": [], "pairs": 2, "error": "no."}
        self._write(other.name, self._made_from(self.loaded(other)), found)
        return first(self, job)

    monkeypatch.setattr(Experiment, "_train", training)
    with pytest.raises(TrainingError, match=r"1 of 2 runs failed, the first with: no\. "):
        run(words)
    assert trained == ["dpo"]


def test_the_areas_follow_from_the_rows_that_are_published(reviews: str) -> None:
    run([*SMALL, reviews, "methods=dpo", "factors=1,3", "seeds=2", "to=out"])
    found = results_in("out")
    with Path("out", "rows.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    names = ("reward_even", "reward_odd")
    for seed, told in found["areas"]["dpo"]["seeds"].items():
        of_seed = [row for row in rows if row["seed"] == seed]
        (reference,) = (row for row in of_seed if row["method"] == "reference")
        points = [row for row in of_seed if row["method"] == "dpo"]
        gains = [[float(p[n]) - float(reference[n]) for p in points] for n in names]
        curve = Curve(np.asarray([float(p["kl"]) for p in points]), np.asarray(gains))
        assert area(curve, found["kl_until"]) == pytest.approx(told, abs=1e-12)


def test_no_method_is_run_as_its_own_control(reviews: str) -> None:
    plan = read_plan([*SMALL, reviews, "methods=mallows_theta", "dispersion={mode:shuffled}"])
    assert plan.loaded(plan.jobs()[0]).recipe.dispersion.mode == "estimated"


def test_a_policy_that_did_not_move_has_no_divergence_in_bf16_either(reviews: str) -> None:
    words = [word for word in SMALL if "learning_rate" not in word]
    still = ["train.precision=bf16", "train.learning_rate=1e-12", "points=1"]
    run([*words, *still, reviews, "methods=dpo", "factors=1", "seeds=1", "to=out"])
    (point,) = rows_in("out")["dpo-beta0.1-seed0"]["points"]
    assert point["kl"] == 0
    assert point["rewards"] == rows_in("out")["reference-seed0"]["rewards"]


def test_a_policy_that_is_not_finite_is_no_point(
    reviews: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = read_plan([*SMALL, reviews, "methods=dpo", "factors=1", "seeds=1", "to=out"])
    reviewed = experiment_sentiment.load_reviews(Path(plan.own["reviews"]))
    classifier = experiment_sentiment.chosen_classifier(plan.own, reviewed)
    found = Experiment(plan, reviewed, classifier)
    pairs = found.lab.pairs(0, found.train_tasks[0], "a test")
    broken = {"reward": 0.5, "kl": math.nan}
    monkeypatch.setattr(found.lab, "_measure", lambda *_: broken)
    (job,) = plan.jobs()
    with pytest.raises(TrainingError, match="the KL nan"):
        found.lab.train(found.loaded(job).recipe, pairs, found.eval_tasks[0])


def test_a_run_that_another_process_is_at_is_left_to_it(
    reviews: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, reviews, "methods=dpo,ipo", "factors=1", "seeds=1", "to=out"]
    plan = read_plan(words)
    reviewed = experiment_sentiment.load_reviews(Path(plan.own["reviews"]))
    classifier = experiment_sentiment.chosen_classifier(plan.own, reviewed)
    other = Experiment(plan, reviewed, classifier)
    with other._mine("dpo-beta0.1-seed0") as mine:
        assert mine
        run(words)
    assert set(rows_in("out")) == {"reference-seed0", "ipo-beta0.1-seed0"}
    assert "left to other processes: 1 run" in capsys.readouterr().err
    run(words)
    assert "left to other processes" not in capsys.readouterr().err


def test_a_report_that_another_process_writes_is_waited_for_at_the_end_alone(
    reviews: str,
) -> None:
    words = [*SMALL, reviews, "methods=dpo", "factors=1", "seeds=1", "to=out"]
    plan = read_plan(words)
    reviewed = experiment_sentiment.load_reviews(Path(plan.own["reviews"]))
    classifier = experiment_sentiment.chosen_classifier(plan.own, reviewed)
    run(words)
    Path("out", "report.md").unlink()
    this, other = (Experiment(plan, reviewed, classifier) for _ in range(2))
    with other._mine("report"):
        this._report()
    assert not Path("out", "report.md").exists()
    this._report(last=True)
    assert Path("out", "report.md").exists()


def test_rows_of_other_settings_are_refused(reviews: str) -> None:
    words = [*SMALL, reviews, "methods=dpo", "factors=1", "seeds=1", "to=out"]
    run(words)
    with pytest.raises(EvalError, match="was made with other words"):
        run([*words, "train.learning_rate=2e-3"])
    # More seeds and methods go on with what is there.
    run([*SMALL, reviews, "methods=dpo,ipo", "seeds=1", "factors=1", "to=out"])
    assert results_in("out")["runs"] == {"wanted": 2, "done": 2}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("methods=dpo,phi", "no method named 'phi'"),
        ("factors=1,0", "'0' is not a number above 0"),
        ("seeds=0", "seeds=0 is not a whole number of at least 1"),
        ("samples=1", "samples=1 is not a whole number of at least 2"),
        ("objective=ipo", "the experiment sets objective itself"),
        ("seed=3", "the experiment sets seed itself"),
        ("train.learning_rat=1", "train.learning_rat is not a key"),
        ("scale=1,2", "scale=1,2 is not one number"),
        ("factors=1,1.0000001", "two of them give the same beta, to 6 digits"),
    ],
)
def test_a_word_that_cannot_be_used_is_one_line(word: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_plan([word])


def test_too_few_beginnings_say_what_to_lower(mallowspo: Command, reviews: str) -> None:
    done = mallowspo("experiment", "sentiment", *SMALL, reviews, "seeds=30", "methods=dpo")
    assert done.code == 2
    assert "Lower prompts=" in done.err
