"""Tables of the out-of-distribution report, as Markdown lines, from results.json's values."""

from collections.abc import Iterator, Sequence
from typing import Any

from mallowspo_cli.report.estimates import markdown_table

Values = dict[str, Any]

THIRDS = ["low dispersion", "middle", "high", "high minus low"]


def outcomes_table(results: Values) -> list[str]:
    """Accuracy and margin of each entry on each data set."""
    margins = {
        (row["entry"], row["data_set"]): row
        for row in results["outcomes"]
        if row["measure"] == "margin"
    }
    rows = [
        [
            f"{row['data_set']}, {row['entry']}",
            share(row),
            signed(margins[row["entry"], row["data_set"]]),
            " ".join(f"{value:.3f}" for value in row["seeds"].values()),
            f"{row['pairs']:,}",
        ]
        for row in by_place(results["outcomes"])
    ]
    head = ["data set, entry", "accuracy [95%]", "margin, nats [95%]", "accuracy by seed", "pairs"]
    return markdown_table(head, rows)


def differences_table(results: Values) -> list[str]:
    """Entries against the first, and against their controls."""
    margins = {
        (row["entry"], row["against"], row["data_set"]): row
        for row in results["differences"]
        if row["measure"] == "margin"
    }
    rows = [
        [
            _compared(row),
            signed(row),
            str(row["seeds"]),
            _p(row["p"]),
            _p(row.get("p_holm")),
            "-" if row["detectable"] is None else f"{row['detectable']:.3f}",
            "-" if margin is None else signed(margin),
        ]
        for row in by_place(results["differences"])
        for margin in [margins.get((row["entry"], row["against"], row["data_set"]))]
    ]
    if not rows:
        return ["There is nothing to compare."]
    head = [
        *("data set, entries", "accuracy [95%]", "seeds", "p", "Holm", "detectable"),
        "margin, nats [95%]",
    ]
    return [
        *markdown_table(head, rows),
        "",
        "`seeds`: those that both entries have. `detectable`: the smallest true difference of "
        "accuracy that would be found with 80 % power. Margins of different rewards (Objectives) "
        "are not compared.",
    ]


def gaps_table(results: Values) -> list[str]:
    """How much accuracy each entry loses out of distribution, and the differences of that."""
    rows = [
        [_compared(row) if row["against"] else f"{row['data_set']}, {row['entry']}", signed(row)]
        for row in results["gaps"]
    ]
    return [
        *markdown_table(["data set, entry", "loss of accuracy [95%]"], rows),
        "",
        "The generalisation gap: accuracy in distribution minus that on the data set. Below 0 in a "
        "row `A - B`: A loses less than B.",
    ]


def terciles_table(results: Values) -> list[str]:
    """Accuracies, and differences of them, in each third of a data set's pairs."""
    alone = [
        [
            f"{row['data_set']}, {row['entry']}",
            *(share(third) for third in row["by_dispersion"].values()),
            "",
        ]
        for row in by_place(results["outcomes"])
        if row["by_dispersion"]
    ]
    compared = [
        [
            _compared(row),
            *(signed(third) for third in row["by_dispersion"].values()),
            signed(row["interaction"]),
        ]
        for row in by_place(results["differences"])
        if row["by_dispersion"]
    ]
    if not alone:
        return ["No thirds: w is unknown or always the same."]
    return [
        *markdown_table(["data set, entries", *THIRDS], alone + compared),
        "",
        "Thirds of a data set's pairs by w = -ln of the reference's normalised token entropy (high "
        "w: low dispersion), the same for all entries.",
    ]


def objectives_table(results: Values) -> list[str]:
    """What each entry is: its knobs, and the weights that it trained with."""
    first = {run["entry"]: run for run in reversed(results["runs"])}
    rows = []
    for entry in results["setup"]["entries"]:
        if entry not in first:
            continue
        run = first[entry]
        knobs = ", ".join(
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in run["knobs"].items()
        )
        weight, found = "none", run["dispersion"]
        if run["weighted"] and found["weight_mean"] is not None:
            weight = f"{found['source']}, {found['mode']}, mean {found['weight_mean']:.3f}"
        rows.append([entry, run["objective"], knobs, run["reward"], weight])
    return markdown_table(["entry", "objective", "knobs", "reward over beta", "w"], rows)


def data_table(results: Values) -> list[str]:
    """What was evaluated on, and what was left out."""
    rows = []
    for name, about in results["data"].items():
        left_out = "; ".join(f"{count}: {cause}" for cause, count in about["left_out"].items())
        known = "; ".join(f"{count} {cause}" for cause, count in about["known"].items())
        rows.append(
            [
                name,
                f"{about['pairs']:,} of {about['of']:,}",
                f"{about['prompts']:,}",
                _resampled(about),
                f"{about['prompt_tokens']:.0f} + {about['response_tokens']:.0f}",
                known or "none",
                left_out or "none",
            ]
        )
    head = [
        *("data set", "pairs", "prompts", "resampled", "tokens", "not new to the runs"),
        "left out or odd",
    ]
    return [
        *markdown_table(head, rows),
        "",
        "`tokens`: of the prompt + of a response, means. `resampled`: what is drawn together, for "
        "intervals. `not new to the runs`: pairs that are not scored, since the runs were trained "
        "on them, on their prompt or (where all training pairs have one prompt) on their two "
        "responses; target pairs that the training data holds out are not scored either.",
    ]


def _resampled(about: Values) -> str:
    if about["documents"] is not None:
        return f"{about['documents']:,} documents"
    return f"{about['prompts']:,} prompts" if about["prompts"] > 1 else f"{about['pairs']:,} pairs"


def runs_table(results: Values) -> list[str]:
    """What each run was trained with, how long it took, and how fast it was scored."""
    rows = [
        [
            f"{run['entry']}, seed {run['seed']}",
            f"{run['train_pairs']:,}",
            run["precision"],
            f"{run['learning_rate']:g}",
            f"{run['steps']:,} ({run['global_batch_size']})",
            f"{run['pairs_seen']:,}",
            f"{run['training_seconds']:.0f}",
            f"{run['training_pairs_per_second']:.2f}",
            " ".join(f"{rate:.1f}" for rate in run["evaluation_pairs_per_second"].values()),
        ]
        for run in results["runs"]
    ]
    head = [
        *("run", "training pairs", "precision", "learning rate", "steps (pairs)", "pairs seen"),
        *("training, s", "pairs/s", "evaluation, pairs/s"),
    ]
    return markdown_table(head, rows)


def by_place(rows: Sequence[Values]) -> Iterator[Values]:
    """Rows of accuracy, those of a data set together."""
    wanted = [row for row in rows if row["measure"] == "accuracy"]
    for place in dict.fromkeys(row["data_set"] for row in wanted):
        yield from (row for row in wanted if row["data_set"] == place)


def share(row: Values) -> str:
    """A value with its interval."""
    ends = "" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
    return f"{row['value']:.3f}{ends}"


def signed(row: Values) -> str:
    """A difference with its interval."""
    value, low, high = row["value"], row["low"], row["high"]
    if value is None or value != value:
        return "-"
    return f"{value:+.3f}" + ("" if low is None else f" [{low:+.3f}, {high:+.3f}]")


def _compared(row: Values) -> str:
    return f"{row['data_set']}, {row['entry']} - {row['against']}"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
