"""The verbs of `mallowspo experiment`. Imports nothing heavy, as `__main__`."""

from collections.abc import Sequence

import click

from mallowspo_cli.verbs import verb


@click.group()
def experiment() -> None:
    """Experiments on the method itself.

    \b
    Example:
      mallowspo experiment human-dispersion
    """


@experiment.command("human-dispersion")
@click.argument("words", nargs=-1, metavar="[KEY=VALUE ...]")
def human_dispersion(words: Sequence[str]) -> None:
    """Does token entropy measure human disagreement? Rank correlations with raters' dispersion.

    \b
    Example:
      mallowspo experiment human-dispersion
      mallowspo experiment human-dispersion pairs=50 corpora=tweets,movies to=reports/small

    Fetches four corpora of short texts with every rater's score (2.4 MB), draws pairs of like
    length, scores them with the reference model as training would, and correlates normalised token
    entropy with the Mallows phi of the raters, beside length, log-prob margin and a shuffled
    control. Writes results.json, report.md and correlations.png.

    \b
    model=MODEL    a name in recipes/model/, a directory or a hub id (default: smollm2_135m)
    pairs=N        pairs from each corpus (default: 500; about 20 to 35 minutes on 2 cores)
    corpora=NAMES  all, or some of movies,products,tweets,editorials (default: all)
    seed=N         of the draw, the bootstrap and the control (default: 0)
    to=DIR         where the report goes (default: reports/human-dispersion)
    """
    verb("experiment_human_dispersion").run(list(words))


@experiment.command("out-of-distribution")
@click.argument("words", nargs=-1, metavar="targets=A,B [recipe=NAME] [KEY=VALUE ...]")
def out_of_distribution(words: Sequence[str]) -> None:
    """Train on one data set, evaluate on others: which objective generalises better?

    \b
    Example:
      mallowspo experiment out-of-distribution recipe=hh_pythia_dpo targets=shp,stack_exchange \\
        objectives=hh_dpo,hh_theta,hh_phi
      mallowspo experiment out-of-distribution train_on=rated:movies \\
        targets=rated:products,rated:tweets seeds=3 train.max_steps=20

    Trains each objective with each seed in a process of its own, scores every run on its held-out
    pairs and on the targets, and compares all objectives with the first, pair by pair and seed by
    seed. Pairs of training prompts, and target pairs that are held out of the training data, are
    left out and counted. A run that fails is recorded, and the rest goes on; the same command goes
    on where it was stopped, if the training data is still the same. Checkpoints of finished runs
    are removed. Writes report.md, results.json, rows.csv and accuracy.png.

    \b
    targets=A,B        names in recipes/dataset/, files, or texts that people rated, out of the
                       package index: rated:movies, rated:products, rated:tweets, rated:editorials
    train_on=NAME      the same kinds of name (default: the recipe's data set)
    recipe=NAME        what is trained (default: quickstart)
    objectives=A,B     the first is the baseline; NAME+KEY=VALUE sets keys of objective, dispersion
                       or train for one entry, as in mallows_theta+dispersion.mode=shuffled
                       (default: dpo, mallows_theta, and mallows_phi with three times the beta)
    seeds=N            of each objective, from 0 on (default: 3)
    eval.limit=N       most pairs of each data set to evaluate on (default: 500)
    train_pairs=N      pairs of a rated corpus to train on (default: 1000)
    max_chars=N        longest text of a rated corpus (default: any)
    to=DIR             report, logs and runs (default: reports/out-of-distribution)
    KEY=VALUE          any other recipe key, for all runs, but those of objective and
                       dispersion.mode, which are an entry's own
    """
    verb("experiment_ood").run(list(words))


@experiment.command()
@click.argument("words", nargs=-1, metavar="[KEY=VALUE ...]")
def estimator(words: Sequence[str]) -> None:
    """Does the entropy estimate give back a known dispersion? Mallows rankings, exact and learned.

    \b
    Example:
      mallowspo experiment estimator
      mallowspo experiment estimator items=10,100 steps=500 seeds=2 to=reports/small

    Puts the exact next-item entropies of Mallows models into the estimate and compares it with the
    true -log phi; then trains small transformers on sampled rankings and reads the estimate off
    them as training would, from tokens to w. Needs no data and no accelerator. Writes results.json,
    exact.csv, prompts.csv, report.md and two pictures.

    \b
    items=N,N,...    items of a ranking, exact part (default: 5,10,20,50,100)
    prompts=N        prompts of the transformer part, each with a -log phi of its own (default: 12)
    model_items=N    items of its rankings (default: 8)
    steps=N          training steps of each model (default: 1000; half a minute on one core)
    seeds=N          models, one after another (default: 3)
    seed=N           the first seed (default: 0)
    to=DIR           where the report goes (default: reports/estimator)
    """
    verb("experiment_estimator").run(list(words))


@experiment.command()
@click.argument("words", nargs=-1, metavar="[KEY=VALUE ...]")
def bandit(words: Sequence[str]) -> None:
    """Collapse and trade-off where all is known: bandits with raters from exact Mallows models.

    \b
    Example:
      mallowspo experiment bandit
      mallowspo experiment bandit objectives=dpo,mallows_theta dispersions=0.05,0.9 to=reports/two

    Solves DPO, IPO and the Mallows losses, as they train, to convergence for each setting and seed:
    one prompt, and many prompts of low and high dispersion that share parameters, told the true
    phi, a wrong one or another prompt's. Prints the answer for Mallows-theta in five lines; writes
    report.md, claims.csv, results.json, rows.csv (single seeds), summary.csv, prompts.csv and
    pictures.

    \b
    arms=N              arms of a prompt (default: 5; Spearman takes at most 7)
    distances=NAMES     of the raters' model: all, kendall or spearman
    dispersions=A,B     phi of the raters, 1e-12 to 0.9999 (default: 0.05,0.3,0.6065,0.9)
    pairs=N,M           preferences on the one prompt (default: 16,100,1000)
    betas=A,B           of every objective, 1e-4 to 1000; Mallows-phi takes 3 times as much
                        (default: 0.05,0.1,0.5,1)
    objectives=NAMES    all, or some of dpo,ipo,mallows_theta,mallows_phi_exact,
                        mallows_phi_smooth,mallows_ipo
    wrong_phi=A,B       what methods are told in the truth's place, or none (default: 0.05,0.9)
    seeds=N, seed=N     how many, at least 2, and the first (default: 60 from 0; 3 to 4 minutes)
    prompts=N           even: half of the lowest, half of the highest phi (default: 16; 0: none)
    features=N          parameters that the prompts share (default: 8)
    prompt_pairs=N,M    preferences on each prompt (default: 8,64)
    conflicts=A,B       how far the features miss the central rankings (default: 0,1)
    to=DIR              where the report goes (default: reports/bandit)
    """
    verb("experiment_bandit").run(list(words))


@experiment.command("sentiment")
@click.argument("words", nargs=-1, metavar="[KEY=VALUE ...]")
def sentiment(words: Sequence[str]) -> None:
    """Reward against KL on film reviews, for eight losses and controls, betas and seeds.

    \b
    Example:
      mallowspo experiment sentiment
      mallowspo experiment sentiment methods=dpo,mallows_theta seeds=5 to=reports/theta
      mallowspo experiment sentiment recipe=sentiment_gpt2 scale=16 max_tokens=48

    The reference goes on from beginnings of reviews, a classifier ranks its continuations, and each
    loss is trained on all pairs of them; policies are measured by the classifier and by their KL.
    One run after another; what is there is kept, so that the same words go on after a stop, and a
    second process with the same words shares the work (OMP_NUM_THREADS=1 for each on a CPU).
    Writes rows/ (a file each run), results.json, rows.csv, report.md and two pictures.

    \b
    recipe=NAME         model and training (default: sentiment_smollm2)
    methods=NAMES       all (default), or some of dpo,ipo,simpo,mallows_theta,mallows_phi,
                        mallows_ipo,theta_shuffled,phi_constant (the last two are controls);
                        beside them, theta_inverse and phi_smooth
    factors=A,B         each method's beta is multiplied by each (default: 0.3,3)
    seeds=N             each with its own beginnings, pairs and order (default: 3)
    scale=X             multiplies prompts and eval_prompts (default: 1: 48 runs, some 75 minutes
                        in two processes on 2 cores)
    prompts=N           beginnings to train on, for each seed (default: 32)
    samples=N           continuations of each; all pairs of them are trained on (default: 4)
    eval_prompts=N      beginnings to measure on (default: 64)
    max_tokens=N        longest continuation (default: 16)
    points=N            measurements of a run, evenly over its steps (default: 2)
    prompt_words=N, batch_size=N, classifier=NAME, positive=LABEL, reviews=FILE
                        as in `eval sentiment` (beginnings of 5 words, 64 at a time)
    to=DIR              where everything goes (default: reports/sentiment)
    KEY=VALUE           recipe keys, such as train.learning_rate=1e-5
    """
    verb("experiment_sentiment").run(list(words))
