"""`mallowspo sweep`: every choice of several values as a run of its own, and one table of them."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click

from mallowspo_cli.commands.jobs import Job, check_job, job_state, train_job
from mallowspo_cli.commands.sweep_launch import command_line, write_array
from mallowspo_cli.commands.words import own_words
from mallowspo_cli.distributed import log, set_up_logging, world_size
from mallowspo_cli.errors import RecipeError, TrainingError
from mallowspo_cli.files import make_directory
from mallowspo_cli.recipe.sweep import Sweep, SweptJob, expand
from mallowspo_cli.report.sweep import print_sweep, write_sweep_report
from mallowspo_cli.report.sweep_table import SweepRow, write_csv


def run(recipe: str, words: list[str], launch: str) -> None:
    """Run, print or write down the jobs of a sweep; see `mallowspo sweep --help`."""
    set_up_logging()
    if world_size() > 1:
        raise RecipeError(
            "a sweep starts its jobs itself, so it is not launched. Run it by itself; "
            "accelerate=FILE launches each job."
        )
    own, others = own_words(words, ["accelerate"])
    accelerate = _accelerate_file(own)
    sweep = expand(recipe, others)
    for left_out, same in sweep.joined:
        log.info("%s is the same run as %s; it runs once", left_out, same)
    for job in sweep.jobs:
        check_job(_as_job(job))
    make_directory(sweep.directory, "the sweep")
    if launch == "local":
        _train_all(sweep, accelerate)
    left = [job for job in sweep.jobs if not _as_job(job).finished]
    rows = _rows(sweep)
    write_csv(sweep.directory / "sweep.csv", rows)
    report = write_sweep_report(sweep.directory, sweep.name, sweep.fixed, rows)
    if launch == "print":
        for job in left:
            click.echo(command_line(job.words, accelerate))
    elif launch == "slurm":
        _slurm(sweep, left, accelerate)
    if launch == "local":
        print_sweep(rows, report)
        _check_failed(sweep, rows)
    else:
        # stdout is for the commands alone.
        log.info("%d of %d jobs are finished: %s", len(rows) - len(left), len(rows), report)


def _accelerate_file(own: dict[str, str]) -> str | None:
    file = own.get("accelerate")
    if file is not None and not Path(file).is_file():
        raise RecipeError(
            f"no launcher's file at accelerate={file}. recipes/accelerate/ has some: `mallowspo "
            "recipes path accelerate/ddp.yaml`."
        )
    return file


def _train_all(sweep: Sweep, accelerate: str | None) -> None:
    """One job after another; what fails is left behind, and the table is always up to date."""
    launcher = (
        (sys.executable, "-m", "accelerate.commands.launch", "--config_file", accelerate)
        if accelerate
        else ()
    )
    for number, swept in enumerate(sweep.jobs, 1):
        job, log_file = _as_job(swept), _log_file(sweep, swept)
        if job.finished:
            log.info("job %d of %d, %s: finished before", number, len(sweep.jobs), job.name)
            continue
        log.info("job %d of %d, %s: output in %s", number, len(sweep.jobs), job.name, log_file)
        start = time.monotonic()
        try:
            reason = train_job(job, log_file, launcher)
        finally:
            write_csv(sweep.directory / "sweep.csv", _rows(sweep))
        seconds = time.monotonic() - start
        how = "finished" if reason is None else f"failed: {reason}"
        log.info("job %d of %d, %s: %s (%.0f s)", number, len(sweep.jobs), job.name, how, seconds)


def _slurm(sweep: Sweep, left: list[SweptJob], accelerate: str | None) -> None:
    if not left:
        log.info("every job is finished; there is no array to submit")
        return
    jobs = [(_log_file(sweep, job), job.words) for job in left]
    script = write_array(sweep.directory, sweep.name, jobs, accelerate)
    click.echo(f"sbatch --partition=PARTITION --account=ACCOUNT {shlex.quote(str(script))}")


def _check_failed(sweep: Sweep, rows: list[SweepRow]) -> None:
    failed = [row.job for row in rows if row.status == "failed"]
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(rows)} jobs failed: {', '.join(failed)}. Their output is in "
            f"{sweep.directory}/JOB.log, their reasons in sweep.csv. The same command tries them "
            "again."
        )


def _rows(sweep: Sweep) -> list[SweepRow]:
    """What the files of the jobs say, wherever they ran."""
    rows = []
    for swept in sweep.jobs:
        job = _as_job(swept)
        status, reason = job_state(job, _log_file(sweep, swept))
        rows.append(SweepRow(job.name, swept.values, status, reason, _results(job)))
    return rows


def _results(job: Job) -> dict[str, Any] | None:
    if not job.finished:
        return None
    return json.loads((job.directory / "results.json").read_text(encoding="utf-8"))


def _as_job(swept: SweptJob) -> Job:
    return Job(swept.name, swept.words, swept.directory, swept.loaded)


def _log_file(sweep: Sweep, job: SweptJob) -> Path:
    return sweep.directory / f"{job.name}.log"
