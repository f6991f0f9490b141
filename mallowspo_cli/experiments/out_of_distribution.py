"""Does an objective generalise better than another? Trained on one data set, scored on others.

The paper trains on Anthropic HH and evaluates on Stanford Human Preferences and Stack Exchange
(MallowsPO, arXiv 2405.14953; its numbers are judged win rates). Here the measure is preference
accuracy: how often the implicit reward ranks a pair as the data does.

Entries are compared pair by pair and seed by seed: what varies is the difference of two runs of one
seed on one pair, which leaves out how hard the pair is and what order the seed gave.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from mallowspo_cli.evaluation.claims import Claim
from mallowspo_cli.evaluation.comparing.paired import holm
from mallowspo_cli.evaluation.statistics import RESAMPLES
from mallowspo_cli.evaluation.strata import Estimate
from mallowspo_cli.experiments.ood_samples import (
    ACCURACY,
    MEASURES,
    Sample,
    Scored,
    lost,
    mean_of,
    outcome,
    paired,
    samples_of,
)

OUTSIDE: Final = "out of distribution"
"""Name of the mean over all targets, each counting alike."""

Samples = Mapping[tuple[str, str, str], Sample]
"""By (entry, data set, measure)."""


def analyse(
    runs: Sequence[Scored],
    entries: Sequence[str],
    inside: str,
    targets: Sequence[str],
    controls: Mapping[str, str | None],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[dict[str, Any], list[Claim]]:
    """Means, differences and gaps as plain values, and what they say of the claims.

    Entries without a finished run are left out. With one seed an interval speaks of these models
    and other prompts; with several, of other seeds as well. Margins of two kinds of reward are not
    compared.

    Args:
        entries: in order; the first is the baseline of all others.
        inside: the data set that was trained on (its held-out pairs).
        controls: an entry that is a control, and the entry that it would be without (None: it is
            not among them).
    """
    samples = _samples(runs, [inside, *targets], resamples, seed)
    present = [entry for entry in entries if any(run.entry == entry for run in runs)]
    outside = [*targets, *([OUTSIDE] if len(targets) > 1 else [])]
    compared = _comparisons(present, entries[0], controls)
    rewards = {run.entry: run.reward for run in runs}
    differences = [
        {"entry": entry, "against": against, "data_set": place, "measure": measure}
        | paired(samples[against, place, measure], samples[entry, place, measure])
        for entry, against in compared
        for place in (inside, *outside)
        for measure in MEASURES
        if measure == ACCURACY or rewards[entry] == rewards[against]
    ]
    claimed = [r for r in differences if r["measure"] == ACCURACY and r["entry"] not in controls]
    _correct(claimed)
    results = {
        "outcomes": [
            {"entry": entry, "data_set": place, "measure": measure}
            | outcome(samples[entry, place, measure])
            for entry in present
            for place in (inside, *outside)
            for measure in MEASURES
        ],
        "differences": differences,
        "gaps": _gaps(samples, present, compared, inside, outside),
        "resamples": resamples,
    }
    seeds = len({run.seed for run in runs})
    claims = [
        _claim(row, inside, len(targets), seeds, controls.get(row["against"]) == row["entry"])
        for row in claimed
    ]
    return results, claims


def _samples(runs: Sequence[Scored], places: Sequence[str], resamples: int, seed: int) -> Samples:
    found = {}
    for number, place in enumerate(places):
        # Each data set has resamples of its own: its prompts are no other's.
        samples = samples_of(runs, place, resamples, seed + number)
        found |= {(entry, place, measure): s for (entry, measure), s in samples.items()}
    for entry in {run.entry for run in runs}:
        for measure in MEASURES:
            parts = [found[entry, place, measure] for place in places[1:]]
            found[entry, OUTSIDE, measure] = mean_of(parts)
    return found


def _comparisons(
    present: Sequence[str], baseline: str, controls: Mapping[str, str | None]
) -> list[tuple[str, str]]:
    """(entry, against): all against the baseline, and what has a control against that."""
    known = {
        control: treated
        for control, treated in controls.items()
        if control in present and treated is not None and treated in present
    }
    against = [
        (entry, baseline)
        for entry in present
        if baseline in present and entry != baseline and known.get(entry) != baseline
    ]
    return against + [(treated, c) for c, treated in known.items() if c != baseline]


def _gaps(
    samples: Samples,
    present: Sequence[str],
    compared: Sequence[tuple[str, str]],
    inside: str,
    outside: Sequence[str],
) -> list[dict[str, Any]]:
    """Accuracy in distribution minus out of it: each entry's, and how much more than another's."""
    gap = {
        (entry, place): lost(samples[entry, inside, ACCURACY], samples[entry, place, ACCURACY])
        for entry in present
        for place in outside
    }
    return [
        *(
            {"entry": entry, "against": None, "data_set": place} | outcome(gap[entry, place])
            for place in outside
            for entry in present
        ),
        *(
            {"entry": entry, "against": against, "data_set": place}
            | paired(gap[against, place], gap[entry, place])
            for place in outside
            for entry, against in compared
        ),
    ]


def _claim(
    row: Mapping[str, Any], inside: str, num_targets: int, num_seeds: int, is_control: bool
) -> Claim:
    """That the entry is better than what it was compared with, on one data set."""
    entry, against, place = row["entry"], row["against"], row["data_set"]
    where = f"Out of distribution ({place})"
    if place == inside:
        where = f"In distribution ({place})"
    elif place == OUTSIDE:
        where = f"Out of distribution (mean of {num_targets} data sets)"
    low, high = (np.nan if row[end] is None else row[end] for end in ("low", "high"))
    than = f"its control {against}" if is_control else against
    fewer = f" ({row['seeds']} of {num_seeds} seeds)" if row["seeds"] < num_seeds else ""
    return Claim(
        f"{where}, {entry} is better than {than}",
        f"accuracy, {entry} minus {against}{fewer}",
        Estimate(row["value"], low, high, row["units"]),
    )


def _correct(claimed: Sequence[dict[str, Any]]) -> None:
    """Add Holm's p over the claims."""
    tested = [row for row in claimed if row["p"] is not None]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
