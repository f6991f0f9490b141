"""The `mallowspo` command. Imports nothing heavy: each verb loads what it needs when it runs."""

import errno
import sys
import time
from collections.abc import Sequence

import click

from mallowspo_cli.errors import MallowsPOError, RecipeError
from mallowspo_cli.experiment_verbs import experiment
from mallowspo_cli.verbs import evaluate, verb

WORDS = click.argument("words", nargs=-1, metavar="recipe=NAME [KEY=VALUE ...]")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mallowspo", prog_name="mallowspo")
def cli() -> None:
    """Preference fine-tuning with a prompt-dependent dispersion index (MallowsPO).

    \b
    Example:
      mallowspo train recipe=quickstart
      mallowspo eval preferences model=runs/quickstart

    A recipe is a YAML file, every key of which can be changed on the command line:

    \b
      mallowspo train recipe=quickstart objective=dpo objective.beta=0.05 name=my_dpo
    """


@cli.command()
@WORDS
@click.option("--resume", is_flag=True, help="Go on from the run's newest whole checkpoint.")
@click.option("--dry-run", is_flag=True, help="Compose, check, tokenise, show a pair; no training.")
def train(words: Sequence[str], resume: bool, dry_run: bool) -> None:
    """Fine-tune a model on preference pairs.

    \b
    Example:
      mallowspo train recipe=quickstart
      mallowspo train recipe=quickstart objective=mallows_theta train.learning_rate=5e-6 name=theta
      mallowspo train recipe=quickstart --resume

    Scores the data with the frozen reference model first where that has not been done (as
    `cache-ref` does), then trains, evaluates and writes runs/NAME: metrics.jsonl, checkpoints/,
    model/, report.html and plots/. `mallowspo recipes keys` explains every KEY.
    """
    name, overrides = split_recipe(words, "train")
    verb("train").run(name, overrides, resume=resume, dry_run=dry_run)


@cli.command()
@WORDS
@click.option(
    "--launch",
    type=click.Choice(["local", "slurm", "print"]),
    default="local",
    show_default=True,
    help="Run the jobs here one after another, write a job array, or print a command a job.",
)
def sweep(words: Sequence[str], launch: str) -> None:
    """Train once for every choice of several values, and collect a table, a report and pictures.

    \b
    Example:
      mallowspo sweep recipe=quickstart objective=dpo,mallows_theta seed=0,1,2
      mallowspo sweep recipe=quickstart objective.beta=0.1,0.3,1 train.learning_rate=5e-6,1e-5
      mallowspo sweep recipe=llama3_dpo,llama3_rainbow --launch slurm

    Takes Hydra's grammar: commas, range(1,4), choice(), objective=glob(llama3_*). Every job is
    composed and checked before the first one runs, and has a run directory of its own,
    runs/NAME/JOB; all share one reference store. Jobs that fail are noted, and the rest goes on.
    Writes sweep.csv, report.md, pictures and JOB.log in runs/NAME.

    The same command again collects what is finished, tries what failed, and goes on where it was
    stopped.

    \b
    name=NAME         of the sweep (default: the recipe and the swept keys)
    accelerate=FILE   start every job by `accelerate launch --config_file FILE`
    KEY=V1,V2,...     any recipe key, the recipe too; those with one value hold for all jobs
    """
    name, overrides = split_recipe(words, "sweep")
    verb("sweep").run(name, overrides, launch=launch)


@cli.command()
@WORDS
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
def plan(words: Sequence[str], as_json: bool) -> None:
    """Predict memory, FLOPs and time of a recipe on given hardware, and propose its memory knobs.

    \b
    Example:
      mallowspo plan recipe=quickstart
      mallowspo plan recipe=quickstart model=llama3_8b_instruct hardware=8xh100

    Packs the recipe's pairs as training would. Weights are neither fetched nor loaded. Nothing is
    measured, but for a CPU's rate.

    \b
    hardware=NAME   h100, h200, a100, l40s, rtx4090 or cpu; 8xh100; 8x8xh100 or 64xh100: 8 nodes of
                    8 (default: this machine)
    flops=N         FLOP/s that a device reaches, in the place of an assumed or measured rate
    bandwidth=N     bytes/s that a device sends in collectives of all, in the place of the table's
    lengths=FILE    plan for pairs of these lengths (JSON), without data and tokenizer
    pairs=N         how many pairs the lengths stand for
    KEY=VALUE       any recipe key
    """
    name, overrides = split_recipe(words, "plan")
    verb("plan").run(name, overrides, as_json=as_json)


@cli.command()
@click.argument("words", nargs=-1, metavar="run=DIR [checkpoint=STEP|best|last] [output=DIR]")
@click.option(
    "--merge-lora/--adapter-only",
    "merge",
    default=True,
    help="Add adapters to the base's weights (default), or write a peft adapter alone.",
)
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    metavar="float32|bfloat16",
    help="Type of the written weights (fp32 and bf16 will do, too).",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier export in the same place.")
def export(words: Sequence[str], merge: bool, dtype: str, overwrite: bool) -> None:
    """Write a run's model as a directory that transformers and vLLM load.

    \b
    Example:
      mallowspo export run=runs/quickstart --dtype bfloat16
      mallowspo export run=runs/quickstart checkpoint=28 output=exports/half_way

    Safetensors, config, tokenizer with the run's chat template, and a model card. Of a finished run
    its final model; of one that was stopped its newest whole checkpoint, put together with the base
    model that its recipe names.

    \b
    run=DIR          the run directory
    checkpoint=STEP  a checkpoint of the run: its step, best (checkpoint.best_by) or last
    output=DIR       where to write (default: export/ in the run directory)
    """
    verb("export").run(list(words), merge=merge, dtype=dtype, overwrite=overwrite)


@cli.command("cache-ref")
@WORDS
def cache_ref(words: Sequence[str]) -> None:
    """Score a recipe's pairs with the frozen reference model, once for every later run.

    \b
    Example:
      mallowspo cache-ref recipe=quickstart

    Stores summed log-probs, token counts and entropies per pair, from which every objective, beta
    and dispersion setting follows. Only pairs that are not there yet are scored, so a pass that was
    stopped goes on where it was.
    """
    name, overrides = split_recipe(words, "cache-ref")
    verb("cache_ref").run(name, overrides)


cli.add_command(evaluate)
cli.add_command(experiment)


@cli.group()
def data() -> None:
    """Look at preference data before training on it.

    \b
    Example:
      mallowspo data check dataset=local dataset.path=pairs.jsonl model=smollm2_135m
    """


DATA_WORDS = click.argument(
    "words", nargs=-1, metavar="[recipe=NAME] [dataset=NAME] [model=NAME] [KEY=VALUE ...]"
)


@data.command("check")
@DATA_WORDS
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON object.")
def data_check(words: Sequence[str], as_json: bool) -> None:
    """Rows and layouts, what is dropped and why, lengths, duplicates, contradictions, overlap.

    \b
    Example:
      mallowspo data check recipe=quickstart
      mallowspo data check dataset=local dataset.path=pairs.jsonl model=smollm2_135m --json

    Nothing stops at a bad row here: every row is read, and causes are counted with examples. The
    model's weights are not loaded.

    \b
    to=DIR      write findings.json and lengths.png there
    KEY=VALUE   any recipe key
    """
    verb("data").check(list(words), as_json=as_json)


@data.command("show")
@DATA_WORDS
def data_show(words: Sequence[str]) -> None:
    """Print a pair as the model sees it: the prompt, and in colour what is trained.

    \b
    Example:
      mallowspo data show recipe=quickstart index=3
      mallowspo data show recipe=quickstart split=eval tokens=true

    \b
    index=N       which pair (default 0)
    split=train   or eval
    tokens=true   one token after another, with their ids
    """
    verb("data").show(list(words))


@cli.group()
def cache() -> None:
    """Look into reference stores, compare, verify, export and clean them.

    \b
    Example:
      mallowspo cache inspect recipe=quickstart

    Every verb takes the words of `cache-ref`.
    """


@cache.command("inspect")
@WORDS
def cache_inspect(words: Sequence[str]) -> None:
    """What built the recipe's store, how many rows it has, and which of the recipe's it lacks.

    \b
    Example:
      mallowspo cache inspect recipe=quickstart
    """
    name, overrides = split_recipe(words, "cache inspect")
    verb("cache").inspect(name, overrides)


@cache.command("verify")
@WORDS
def cache_verify(words: Sequence[str]) -> None:
    """Score some of the recipe's pairs again and report the largest difference.

    \b
    Example:
      mallowspo cache verify recipe=quickstart
      mallowspo cache verify recipe=quickstart rows=64

    \b
    rows=N   how many pairs, drawn with the recipe's seed (default 16)
    """
    name, overrides = split_recipe(words, "cache verify")
    verb("cache_rows").verify(name, overrides)


@cache.command("diff")
@WORDS
def cache_diff(words: Sequence[str]) -> None:
    """Compare the recipe's store with another: what built them, and rows that both have.

    \b
    Example:
      mallowspo cache diff recipe=quickstart
      mallowspo cache diff recipe=quickstart with=./a-store

    \b
    with=DIR   the other store (default: every store in the user's cache)
    """
    name, overrides = split_recipe(words, "cache diff")
    verb("cache").diff(name, overrides)


@cache.command("gc")
@WORDS
def cache_gc(words: Sequence[str]) -> None:
    """Tidy the recipe's store: merge shards, remove damaged and left-over files.

    \b
    Example:
      mallowspo cache gc recipe=quickstart
      mallowspo cache gc recipe=quickstart unused=drop

    \b
    unused=drop   drop rows of pairs that this recipe's data does not hold (default: keep)
    days=N        also remove stores and prepared data in the cache unused for N days
    """
    name, overrides = split_recipe(words, "cache gc")
    verb("cache").gc(name, overrides)


@cache.command("export")
@WORDS
def cache_export(words: Sequence[str]) -> None:
    """Fill what is missing and write the recipe's rows, with their place in the data, to a file.

    \b
    Example:
      mallowspo cache export recipe=quickstart to=rows.parquet

    \b
    to=FILE.parquet   the file to write
    """
    name, overrides = split_recipe(words, "cache export")
    verb("cache_rows").export(name, overrides)


@cli.command()
@WORDS
def dispersion(words: Sequence[str]) -> None:
    """Report what the dispersion index does to a recipe's data, before paying for a run.

    \b
    Example:
      mallowspo dispersion recipe=quickstart
      mallowspo dispersion recipe=quickstart dispersion.pooling=tokens to=reports/tokens

    Writes report.html, dispersion.json and pairs.parquet (w and beta w of each pair). Fills the
    reference store where it lacks rows; otherwise no model is loaded.

    \b
    to=DIR   where to write (default: reports/NAME-dispersion)
    """
    name, overrides = split_recipe(words, "dispersion")
    verb("dispersion").run(name, overrides)


@cli.group()
def recipes() -> None:
    """List, show and find recipes.

    \b
    Example:
      mallowspo recipes list
      mallowspo recipes show quickstart objective=dpo
    """


@recipes.command("list")
def list_() -> None:
    """Names and descriptions of all recipes and of the options they choose from.

    \b
    Example:
      mallowspo recipes list
    """
    verb("recipes").list_recipes()


@recipes.command()
@click.argument("name")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")
def show(name: str, overrides: Sequence[str]) -> None:
    """Print a recipe as it would run: composed, overridden and resolved.

    \b
    Example:
      mallowspo recipes show quickstart objective=dpo train.epochs=2
    """
    verb("recipes").show(name.removeprefix("recipe="), list(overrides))


@recipes.command()
@click.argument("file", metavar="FILE")
def path(file: str) -> None:
    """Print where a recipe or option file lies, to read or copy it.

    \b
    Example:
      mallowspo recipes path quickstart
      mallowspo recipes path model/smollm2_135m.yaml
    """
    verb("recipes").path(file)


@recipes.command()
@click.argument("prefix", default="")
def keys(prefix: str) -> None:
    """Explain every recipe key, or those under PREFIX, with its default; also judge. and generate.

    \b
    Example:
      mallowspo recipes keys train
    """
    verb("recipes").keys(prefix)


@cli.command()
def doctor() -> None:
    """Check versions, devices and caches; name the command that mends what is missing.

    \b
    Example:
      mallowspo doctor
    """
    verb("doctor").run()


def split_recipe(words: Sequence[str], verb: str) -> tuple[str, list[str]]:
    """The recipe's name, and the other words.

    Raises:
        RecipeError: no recipe, two of them, or a word that is no KEY=VALUE.
    """
    names = [word.removeprefix("recipe=") for word in words if word.startswith("recipe=")]
    if len(names) != 1 or not names[0]:
        found = "no recipe" if not names else f"recipe={' recipe='.join(names)}"
        raise RecipeError(
            f"found {found}, expected one. Example: mallowspo {verb} recipe=quickstart"
        )
    return names[0], [word for word in words if not word.startswith("recipe=")]


def main() -> None:
    """Run the command line: what the user can mend becomes one line and exit code 2."""
    try:
        cli(prog_name="mallowspo")
    except MallowsPOError as error:
        from mallowspo_cli.distributed import is_main, rank

        if not is_main() and not error.alone:
            # Where all have this error the main process says it, and the launcher ends the others.
            time.sleep(3)
        who = "mallowspo" if is_main() else f"mallowspo (process {rank()})"
        click.echo(f"{who}: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        click.echo(f"mallowspo: {error.strerror}: {error.filename or 'a file'}.", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
