"""The verbs of `mallowspo eval`. Imports nothing heavy, as `__main__`."""

import importlib
from collections.abc import Sequence
from typing import Any

import click


def verb(name: str) -> Any:
    """The module of a command, which is loaded when the command runs."""
    return importlib.import_module(f"mallowspo_cli.commands.{name}")


@click.group("eval")
def evaluate() -> None:
    """Evaluate a trained model.

    \b
    Example:
      mallowspo eval preferences model=runs/quickstart
    """


@evaluate.command()
@click.argument("words", nargs=-1, metavar="model=RUN_OR_MODEL [dataset=NAME] [KEY=VALUE ...]")
def preferences(words: Sequence[str]) -> None:
    """Held-out loss, implicit-reward accuracy and margin, displacement, by dispersion tercile too.

    \b
    Example:
      mallowspo eval preferences model=runs/quickstart
      mallowspo eval preferences model=runs/quickstart dataset=local dataset.path=mine.jsonl
      mallowspo eval preferences model=./a-model reference=smollm2_135m dataset=quickstart_pairs

    model= is a run directory, a model directory, a name in recipes/model/ or a hub id, tried in
    that order. A run brings its dataset, objective, reference and dispersion scale; a bare model
    takes dataset=, objective= (default: dpo) and, where the objective needs one, reference=.

    \b
    eval.limit=N      evaluate on the first N held-out pairs
    eval.output=FILE  write the numbers as JSON, single pairs as .parquet beside it (for a run:
                      runs/NAME/evaluations/ as well)
    KEY=VALUE         any other recipe key; for a run, its own dataset, objective and scale stay
    """
    verb("eval_preferences").run(list(words))


@evaluate.command()
@click.argument("words", nargs=-1, metavar="model=RUN_OR_MODEL [judge=NAME] [KEY=VALUE ...]")
@click.option("--dry-run", is_flag=True, help="Say what judging would take and cost; ask nothing.")
def alpacaeval(words: Sequence[str], dry_run: bool) -> None:
    """AlpacaEval 2: sample answers, have them judged, and score them with length control.

    \b
    Example:
      mallowspo eval alpacaeval model=runs/llama3_phi
      mallowspo eval alpacaeval model=runs/quickstart instructions=mine.json baseline=theirs.json
      mallowspo eval alpacaeval stage=score annotations=annotations.json

    Each stage goes on where it was stopped. Files as AlpacaEval's: model_outputs.json,
    annotations.json, summary.json, and report.md with a picture.

    \b
    stage=STAGE         all (default), generate, judge or score
    judge=NAME          annotator: ours (pairwise_choice, pairwise_ranking, dialogue), alpaca-eval's
                        (default weighted_alpaca_eval_gpt4_turbo), or a YAML file
    judge.KEY=VALUE     base_url, model, api_key_env, engine, swap, max_cost, ...; `mallowspo
                        recipes keys judge` explains all
    generate.KEY=VALUE  temperature, top_p, max_tokens, batch_size, seed, ...; `mallowspo recipes
                        keys generate` explains all
    baseline=FILE|RUN   whose answers to compare with (default: those in instructions=FILE, else
                        GPT-4's from the hub)
    instructions=FILE   others than AlpacaEval's own, or these as a local file
    outputs=FILE        judge these answers (a model_outputs.json); nothing is sampled
    annotations=FILE    score these judgements (JSON or .json.gz); no model, no network
    gamed=FILE          AlpacaEval's df_gamed.csv, for length control without the hub
    difficulty=FILE     its instruction_difficulty.csv
    reference=MODEL     measures the prompts' dispersion (a run has its own)
    eval.limit=N        N instructions, the same ones for every model
    output_dir=DIR      default: RUN/evaluations/alpacaeval, or reports/alpacaeval-MODEL
    model.KEY=VALUE     recipe keys of a bare model, such as model.chat_template=plain
    """
    verb("eval_alpacaeval").run(list(words), dry_run=dry_run)


@evaluate.command()
@click.argument("words", nargs=-1, metavar="model=RUN_OR_MODEL dataset=NAME [KEY=VALUE ...]")
@click.option("--dry-run", is_flag=True, help="Say what judging would take and cost; ask nothing.")
def winrate(words: Sequence[str], dry_run: bool) -> None:
    """Sample answers to held-out prompts of a dataset and have them judged against others.

    \b
    Example:
      mallowspo eval winrate model=runs/hh_pythia_phi dataset=hh_rlhf temperatures=0.25,0.7,1
      mallowspo eval winrate model=runs/quickstart against=smollm2_135m dataset=quickstart_pairs

    The protocol of the HH, SHP and Stack Exchange experiments. Stages, judges and files are those
    of `eval alpacaeval`.

    \b
    against=chosen      the data's preferred answers (default), or a run or model that answers too
    temperatures=A,B    sample and judge at each; a table and a curve over them
    dataset.KEY=VALUE   recipe keys of the dataset
    eval.limit=N        prompts, the same ones for every model (default 256)
    judge=NAME          annotator (default dialogue)
    stage=, judge.KEY=, generate.KEY=, reference=, output_dir=, model.KEY=   as in `eval alpacaeval`
    """
    verb("eval_winrate").run(list(words), dry_run=dry_run)


@evaluate.command()
@click.argument("words", nargs=-1, metavar="A B [C ...] [KEY=VALUE ...]")
def compare(words: Sequence[str]) -> None:
    """Which of several models is better, and how sure that is: paired intervals and tests.

    \b
    Example:
      mallowspo eval compare runs/dpo runs/phi
      mallowspo eval compare 'runs/dpo/seed*' 'runs/phi/seed*' to=reports/phi_against_dpo

    A, B, C are each a run, an evaluation's directory, an annotations.json, a preferences_*.parquet,
    or a pattern in quotes that stands for the seeds of one configuration. Win rates (plain,
    length-controlled, discrete) and preference accuracy are compared on the prompts that both
    sides share: bootstrap interval and p, sign test, Holm's correction, by dispersion tercile; and
    the judges with one another. Writes comparison.json, report.md and comparison.png; no model is
    loaded.

    \b
    to=DIR             where to write (default: reports/compare-A-B)
    seed=N             of the resamples (default 0)
    bootstrap=N        resamples of the prompts (default 2000)
    bootstrap_lc=N     resamples that refit the length-controlled win rates (default 300)
    gamed=FILE         AlpacaEval's df_gamed.csv, for its full length control (default: the hub's,
                       for its own instructions; else the minimal fit, without a penalty)
    difficulty=FILE    its instruction_difficulty.csv (default: the difficulties in gamed=)
    instructions=FILE  the instructions in the order of those files, where they are not AlpacaEval's
    """
    verb("eval_compare").run(list(words))


@evaluate.command()
@click.argument("words", nargs=-1, metavar="model=RUN_OR_MODEL [from=DIR] [KEY=VALUE ...]")
def generations(words: Sequence[str]) -> None:
    """Diversity of sampled answers: distinct-n, repetition, self-BLEU, by dispersion tercile too.

    \b
    Example:
      mallowspo eval generations from=runs/quickstart/evaluations/alpacaeval
      mallowspo eval generations model=runs/quickstart dataset=quickstart_pairs eval.limit=20

    Reads the generations of `eval alpacaeval` or `eval winrate`; with instructions= or dataset= it
    samples first, four answers to each prompt. Writes generations_report.md, diversity.json and
    diversity.png beside the generations.

    \b
    from=DIR            an evaluation's directory (default: the model's only one)
    instructions=FILE   sample answers to these (JSON or JSONL with a column instruction)
    dataset=NAME        sample answers to its held-out prompts; dataset.KEY=VALUE as in a recipe
    reference=MODEL     whose entropies make the terciles of dataset= (default: the run's own)
    eval.limit=N        most prompts (default: 256 of a data set, all of a file)
    output_dir=DIR      where sampled answers go (default: RUN/evaluations/ or reports/)
    generate.KEY=VALUE  samples (4), temperature, max_tokens, ...: `mallowspo recipes keys generate`
    model.KEY=VALUE     for a bare model, such as model.chat_template=plain
    """
    verb("eval_generations").run(list(words))


@evaluate.command()
@click.argument("words", nargs=-1, metavar="model=RUN_OR_MODEL [reference=MODEL] [KEY=VALUE ...]")
def sentiment(words: Sequence[str]) -> None:
    """Controlled sentiment on film reviews: a classifier's reward, and the KL to the reference.

    \b
    Example:
      mallowspo eval sentiment model=runs/imdb_gpt2_dpo
      mallowspo eval sentiment model=./a-model reference=gpt2_large model.chat_template=plain
      mallowspo eval sentiment model=runs/imdb_gpt2_dpo dataset=imdb \\
        classifier=siebert/sentiment-roberta-large-english

    Samples continuations of review beginnings and scores them with a stated classifier. The default
    one is fitted once on 20,000 IMDB reviews (a 13 MB package), its accuracy measured on the rest
    and reported. Writes sentiment.json, samples.jsonl, report.md and rewards.png.

    \b
    reference=MODEL        for the KL (default: the model that a run began from)
    reference_reward=true  sample from the reference too, and report the gain
    prompts=FILE           beginnings: .txt, or JSON(L) with a column prompt (default: reviews)
    prompt_words=N         words of a review's beginning (default: 5)
    dataset=NAME           beginnings are a data set's held-out prompts, such as dataset=imdb
    classifier=NAME        tfidf (default), or a directory or hub id of a sequence classifier
    positive=LABEL         its positive label, where no label's name begins with "pos"
    reviews=FILE           labelled reviews (CSV or JSON(L): text, label) in the package's place
    eval.limit=N           beginnings (default: 64)
    output_dir=DIR         default: RUN/evaluations/sentiment, or reports/sentiment-MODEL
    generate.KEY=VALUE     max_tokens (48), samples (2), temperature (1: the KL needs it), ...
    model.KEY=VALUE        for a bare model, such as model.chat_template=plain
    """
    verb("eval_sentiment").run(list(words))
