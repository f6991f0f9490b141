"""`mallowspo experiment sentiment`: reward against KL, for several losses, betas and seeds."""

import fcntl
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers.utils.logging

from mallowspo_cli.commands.eval_sentiment import chosen_classifier
from mallowspo_cli.commands.prepare import one_process
from mallowspo_cli.commands.sentiment_lab import Lab
from mallowspo_cli.commands.sentiment_words import Plan, read_plan
from mallowspo_cli.data.table import TokenizedPairs
from mallowspo_cli.distributed import console, log, set_up_logging
from mallowspo_cli.errors import EvalError, TrainingError, first_line
from mallowspo_cli.evaluation.claims import Claim
from mallowspo_cli.evaluation.controlled.classifiers import Classifier
from mallowspo_cli.evaluation.controlled.reviews import (
    Reviews,
    beginnings,
    load_reviews,
    split_reviews,
)
from mallowspo_cli.evaluation.sampling.tasks import Task
from mallowspo_cli.experiments.sentiment import analyse, claims, point_rows
from mallowspo_cli.experiments.sentiment_methods import Job
from mallowspo_cli.files import make_directory, write_json
from mallowspo_cli.models.load import model_directory
from mallowspo_cli.recipe.load import LoadedRecipe
from mallowspo_cli.reference.fingerprint import weights_digest
from mallowspo_cli.report.frontier import print_frontier, write_frontier

DRAW_SEED = 0
"""Of the draw of all seeds' beginnings."""


def run(words: list[str]) -> None:
    """Run what is missing of the grid, and report what there is; see `--help`."""
    set_up_logging()
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    one_process("experiment sentiment")
    plan = read_plan(words)
    make_directory(plan.to / "rows", "the experiment")
    own = plan.own
    reviews = load_reviews(Path(own["reviews"]).expanduser() if "reviews" in own else None)
    experiment = Experiment(plan, reviews, chosen_classifier(own, reviews))
    experiment.run()


def reference_name(seed: int) -> str:
    """Of the row of the model that all begin from."""
    return f"reference-seed{seed}"


class Experiment:
    """The grid's rows: which are there, which are to be run, and what they say together.

    A row is a file of its own. Several processes, given the same words, share the work: each takes
    a row that no other has.
    """

    def __init__(self, plan: Plan, reviews: Reviews, classifier: Classifier):
        self.plan, self.classifier, self.reviews = plan, classifier, reviews
        self.train_tasks, self.eval_tasks = self._tasks(reviews)
        self._common = [
            weights_digest(model_directory(plan.base.recipe.model)),
            *(asdict(plan.sizes), plan.prompt_words, reviews.digest(), classifier.about),
        ]
        self._loaded: dict[Job, LoadedRecipe] = {}
        self._lab: Lab | None = None
        self._pairs: tuple[int, TokenizedPairs] | None = None

    def run(self) -> None:
        """Train what is missing, and report after each row; what failed before is tried again.

        Raises:
            TrainingError: runs failed; all others were made.
        """
        jobs, base = self.plan.jobs(), self._made_from(self.plan.base)
        failed = {job for job in jobs if "error" in self._content(job.name)}
        for seed in range(self.plan.seeds):
            with self._mine(reference_name(seed), wait=True):
                if self._row(reference_name(seed), base) is None:
                    row = self.lab.measure_reference(seed, self.eval_tasks[seed])
                    self._write(reference_name(seed), base, row)
        for number, job in enumerate(jobs):
            made_from = self._made_from(self.loaded(job))
            with self._mine(job.name) as mine:
                row = self._row(job.name, made_from)
                if mine and (row is None or ("error" in row and job in failed)):
                    log.info("run %d of %d: %s", number + 1, len(jobs), job.name)
                    self._write(job.name, made_from, self._train(job))
                    self._report()
        self._report(last=True)
        self._tell_missing(jobs)

    @property
    def lab(self) -> Lab:
        """The models, loaded when the first row is to be made."""
        if self._lab is None:
            plan = self.plan
            self._lab = Lab(plan.base.recipe, self.classifier, plan.sizes, plan.to)
        return self._lab

    def _train(self, job: Job) -> dict[str, Any]:
        start, cpu = time.monotonic(), time.process_time()
        pairs = self._seed_pairs(job.seed)
        row = {
            "method": job.method.name,
            "beta": job.beta,
            "factor": job.factor,
            "seed": job.seed,
            "pairs": len(pairs),
        }
        try:
            recipe = self.loaded(job).recipe
            points = self.lab.train(recipe, pairs, self.eval_tasks[job.seed])
        except TrainingError as error:
            log.info("%s failed: %s", job.name, first_line(error))
            return {**row, "points": [], "error": first_line(error)}
        spent = {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu}
        return {**row, "points": points, **spent}

    def _seed_pairs(self, seed: int) -> TokenizedPairs:
        if self._pairs is None or self._pairs[0] != seed:
            with self._mine(f"data-seed{seed}", wait=True):
                made_from = self._made_from(self.plan.base)
                self._pairs = seed, self.lab.pairs(seed, self.train_tasks[seed], made_from)
        return self._pairs[1]

    def _tasks(self, reviews: Reviews) -> tuple[list[list[Task]], list[list[Task]]]:
        """Each seed's beginnings to train on and to measure on: no two sets share one."""
        plan, sizes = self.plan, self.plan.sizes
        texts = [reviews.texts[index] for index in split_reviews(reviews)[1]]
        each = sizes.prompts + sizes.eval_prompts
        count = plan.seeds * each
        found = [Task.of(text) for text in beginnings(texts, plan.prompt_words, count, DRAW_SEED)]
        if len(found) < count:
            raise EvalError(
                f"{count} different beginnings of {plan.prompt_words} words are needed, and the "
                f"held-out reviews of {reviews.name} have {len(found)}. Lower prompts=, "
                "eval_prompts= or seeds=, or raise prompt_words=."
            )
        parts = [found[start : start + each] for start in range(0, count, each)]
        return [p[: sizes.prompts] for p in parts], [p[sizes.prompts :] for p in parts]

    def _made_from(self, loaded: LoadedRecipe) -> str:
        """Names what a row depends on. The number of seeds and of methods is not of it."""
        text = json.dumps([loaded.to_yaml(), *self._common], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

    def loaded(self, job: Job) -> LoadedRecipe:
        """What a run trains with, composed once."""
        if job not in self._loaded:
            self._loaded[job] = self.plan.loaded(job)
        return self._loaded[job]

    def _file(self, name: str) -> Path:
        return self.plan.to / "rows" / f"{name}.json"

    def _content(self, name: str) -> dict[str, Any]:
        """A row as it lies there; empty without one."""
        file = self._file(name)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def _row(self, name: str, made_from: str) -> dict[str, Any] | None:
        row = self._content(name)
        if row and row["made_from"] != made_from:
            raise EvalError(
                f"{self._file(name)} was made with other words (recipe, sizes or classifier) or "
                "another model. Give the experiment another place: to=DIR."
            )
        return row or None

    def _write(self, name: str, made_from: str, row: Mapping[str, Any]) -> None:
        write_json(self._file(name), {"made_from": made_from, **row})

    def _report(self, last: bool = False) -> None:
        """What the rows that are there say; but for the last, not while another process reports."""
        with self._mine("report", wait=last) as mine:
            found = self._results() if mine else None
            if found is not None:
                write_frontier(self.plan.to, *found)
        if not last:
            return
        if found is None:
            log.info("no report: no method has all runs of a seed")
        else:
            results, _, decided = found
            print_frontier(results, decided, self.plan.to)

    def _tell_missing(self, jobs: Sequence[Job]) -> None:
        """Say which runs are without numbers: those that others are at, and the failed ones."""
        rows = [self._content(job.name) for job in jobs]
        if missing := rows.count({}):
            log.info(
                "left to other processes: %d run%s; what they do not end, the same command does",
                *(missing, "" if missing == 1 else "s"),
            )
        if errors := [row["error"] for row in rows if "error" in row]:
            raise TrainingError(
                f"{len(errors)} of {len(jobs)} runs failed, the first with: {errors[0]} The same "
                "command tries them again."
            )

    def _results(self) -> tuple[dict[str, Any], list[dict[str, Any]], list[Claim]] | None:
        """What the rows say, a row for each point, the claims; None where no method has an area."""
        plan, base = self.plan, self._made_from(self.plan.base)
        references = {seed: self._row(reference_name(seed), base) for seed in range(plan.seeds)}
        there = {seed: row for seed, row in references.items() if row is not None}
        jobs = plan.jobs()
        begun = [job for job in jobs if self._file(job.name).is_file()]
        found = [self._row(job.name, self._made_from(self.loaded(job))) for job in begun]
        rows = [row for row in found if row is not None and row["seed"] in there]
        analysed = analyse(rows, there, len(plan.factors))
        if not analysed["areas"]:
            return None
        decided = claims(analysed)
        results = {
            "recipe": plan.recipe,
            "model": plan.base.recipe.model.source,
            "words": plan.words,
            "sizes": asdict(plan.sizes),
            "epochs": plan.base.recipe.train.epochs,
            "beginnings": f"the first {plan.prompt_words} words of held-out reviews of "
            f"{self.reviews.name}",
            "classifier": self.classifier.about,
            "methods": {m.name: m.what for m in plan.methods},
            "factors": plan.factors,
            "seeds": plan.seeds,
            "runs": {"wanted": len(jobs), "done": len(rows)},
            "references": {str(seed): row["reward"] for seed, row in there.items()},
            "pairs": {str(row["seed"]): row["pairs"] for row in rows},
            "measured": max(len(row["points"]) for row in rows),
            "failed": {
                f"{row['method']} beta {row['beta']:g} seed {row['seed']}": row["error"]
                for row in rows
                if "error" in row
            },
            "cpu_seconds": sum(row.get("cpu_seconds", 0.0) for row in rows),
            **analysed,
            "claims": [claim.row() for claim in decided],
        }
        return results, point_rows(rows, there), decided

    @contextmanager
    def _mine(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Whether this process is the one at work on `name`; the others are kept out."""
        place = make_directory(self.plan.to / "locks", "the experiment")
        with (place / name).open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
