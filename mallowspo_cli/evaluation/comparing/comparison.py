"""Two or more models, or configurations with several seeds, compared on the prompts they share."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.comparing.agreement import agreements
from mallowspo_cli.evaluation.comparing.context import (
    AGREE,
    Context,
    calibration_of,
    labels_of,
    read_entropies,
)
from mallowspo_cli.evaluation.comparing.lengths import (
    LengthFiles,
    compared_length_control,
    judged_rows,
)
from mallowspo_cli.evaluation.comparing.matching import (
    JUDGING,
    SAMPLING,
    Match,
    differing,
    matched_evaluations,
    matched_rankings,
    unchecked_judge,
)
from mallowspo_cli.evaluation.comparing.metrics import Resampling, compared_means, terciles
from mallowspo_cli.evaluation.comparing.paired import LEVEL, holm
from mallowspo_cli.evaluation.comparing.sides import Evaluation, Ranked, Side
from mallowspo_cli.evaluation.outputs import (
    BASE_WINS,
    DRAW,
)
from mallowspo_cli.evaluation.win_rates.length_control import UNPENALISED

WIN_RATE, DISCRETE, ACCURACY = "win rate", "discrete win rate", "preference accuracy"
CONTROLLED = "length-controlled win rate"
MINIMAL = f"{CONTROLLED} (minimal, unpenalised)"


def compare(
    sides: Sequence[Side], resampling: Resampling, lengths: LengthFiles | None = None
) -> dict[str, Any]:
    """Every metric that two sides have, for each pair of them, as plain values in percent.

    Differences are the later side's minus the earlier's; Holm's correction is within a metric.

    Raises:
        EvalError: no two sides share anything.
    """
    notes: list[str] = []
    _note_shared_models(sides, notes)
    reference, entropies = read_entropies(sides, notes)
    context = Context(sides, resampling, lengths, entropies, notes)
    metrics: list[dict[str, Any]] = []
    for judge, baseline, match in matched_evaluations(sides, notes):
        about = {"evaluation": match.title, "judge": judge, "baseline": baseline}
        found = _judged(context, match)
        metrics += [{"metric": name, **about, "pairs": pairs} for name, pairs in found.items()]
    for match in matched_rankings(sides, notes):
        about = {"evaluation": match.title, "judge": None, "baseline": None}
        metrics.append({"metric": ACCURACY, **about, "pairs": _ranked(context, match)})
    metrics = [metric for metric in metrics if metric["pairs"]]
    if not metrics:
        raise EvalError(f"nothing can be compared: {' '.join(notes)}")
    if any(metric["metric"] == MINIMAL for metric in metrics):
        notes.append(
            f"Length-controlled win rates (minimal) are fitted without a penalty (C = "
            f"{UNPENALISED:,.0f}), as a penalty pulls both sides to 50 % and hides their "
            "difference."
        )
    for metric in metrics:
        _correct(metric["pairs"])
    return {
        "sides": [
            {"label": s.label, "path": s.word, "seeds": [m.name for m in s.members]} for s in sides
        ],
        "metrics": metrics,
        "agreement": agreements(sides, resampling),
        "dispersion_reference": reference,
        "notes": notes,
        "level": LEVEL,
        "resampling": asdict(resampling),
    }


def _judged(context: Context, match: Match[Evaluation]) -> dict[str, list[dict[str, Any]]]:
    """Comparisons of all pairs of sides, by the name of the win rate."""
    calibration = calibration_of(context, match)
    controlled = CONTROLLED if calibration else MINIMAL
    found: dict[str, list[dict[str, Any]]] = {WIN_RATE: [], controlled: [], DISCRETE: []}
    for pair in combinations(sorted(match.of), 2):
        first, second = (list(match.of[index].values()) for index in pair)
        shared = _shared_instructions(context, match, pair)
        if not shared:
            continue
        rows = [
            [[e.annotations[text] for text in shared] for e in side] for side in (first, second)
        ]
        preferences = [np.array([[r.preference for r in e] for e in side]) for side in rows]
        asked = [(row.instruction, row.output_1) for row in rows[0][0]]
        entropies = np.array([context.entropies.get(key, np.nan) for key in asked])
        results = {
            WIN_RATE: compared_means(
                [each - BASE_WINS for each in preferences],
                shared,
                terciles(-np.log(entropies)),
                context.resampling,
            ),
            DISCRETE: compared_means(
                [(1 + np.sign(each - DRAW)) / 2 for each in preferences],
                shared,
                None,
                context.resampling,
            ),
        }
        judged = [[judged_rows(e, calibration) for e in side] for side in rows]
        try:
            results[controlled] = compared_length_control(judged, context.resampling)
        except EvalError as error:
            context.notes.append(f"{labels_of(context, match, pair)}: no {CONTROLLED}: {error}")
        if calibration and results.get(controlled, {}).get("unpenalised"):
            told = labels_of(context, match, pair)
            context.notes.append(
                f"{told}: the penalty that cross-validation chose left a "
                "model without a coefficient of its own, so all length-controlled win rates are "
                f"fitted without one (C = {UNPENALISED:,.0f}). They differ from those in "
                "summary.json."
            )
        known = [set().union(*(e.annotations for e in side)) for side in (first, second)]
        for name, result in results.items():
            found[name].append(_named(context, match, pair, result, known, len(shared)))
    return found


def _shared_instructions(
    context: Context, match: Match[Evaluation], pair: tuple[int, int]
) -> list[str]:
    """Instructions that all seeds of both sides have judged; none where the rest differs.

    In the order of the files, where all have the same: so a fit is that of `eval alpacaeval`.
    """
    evaluations = [e for index in pair for e in match.of[index].values()]
    told = labels_of(context, match, pair)
    if differ := differing(evaluations, JUDGING, "settings"):
        context.notes.append(f"{told} not compared: judged otherwise ({differ}).")
        return []
    judged = [
        [text for text, row in e.annotations.items() if not np.isnan(row.preference)]
        for e in evaluations
    ]
    shared = set(judged[0]).intersection(*judged[1:])
    if not shared:
        context.notes.append(f"{told} not compared: no instruction is judged on both sides.")
        return []
    baselines = [{e.annotations[text].output_1 for e in evaluations} for text in shared]
    if count := sum(len(outputs) > 1 for outputs in baselines):
        context.notes.append(
            f"{told} not compared: the baseline's answers differ for {count} of {len(shared)} "
            "shared instructions."
        )
        return []
    if differ := differing(evaluations, SAMPLING, "sampling"):
        context.notes.append(f"{told}: answers were sampled otherwise ({differ}).")
    if reason := unchecked_judge(evaluations):
        context.notes.append(
            f"{told}: it was not checked that the judges are the same: {reason}. Compare only "
            "what you know to be judged alike."
        )
    orders = [[text for text in texts if text in shared] for texts in judged]
    return orders[0] if all(order == orders[0] for order in orders) else sorted(shared)


def _ranked(context: Context, match: Match[Ranked]) -> list[dict[str, Any]]:
    """Comparisons of preference accuracy for all pairs of sides."""
    found = []
    for pair in combinations(sorted(match.of), 2):
        sides = [list(match.of[index].values()) for index in pair]
        tables = [one.pairs for side in sides for one in side]
        shared = sorted(set(tables[0]).intersection(*tables[1:]))
        if not shared:
            told = labels_of(context, match, pair)
            context.notes.append(f"{told} not compared: no held-out pair is in both.")
            continue
        wins = [np.array([[one.pairs[key][1] for key in shared] for one in side]) for side in sides]
        weights = [np.array([table[key][2] for key in shared]) for table in tables]
        known = next((w for w in weights if not np.isnan(w).all()), weights[0])
        # NaN differs from nothing.
        apart = np.any([np.abs(w - known) > AGREE * np.abs(known) for w in weights], axis=0)
        if apart.any():
            told = labels_of(context, match, pair)
            context.notes.append(
                f"{told}: w differs for {int(apart.sum())} of {len(shared)} "
                "held-out pairs, so it is of other references. Terciles go by the first table's."
            )
        prompts = [tables[0][key][0] for key in shared]
        result = compared_means(wins, prompts, terciles(known), context.resampling)
        every = [set().union(*(one.pairs for one in side)) for side in sides]
        found.append(_named(context, match, pair, result, every, len(shared)))
    return found


def _named(
    context: Context,
    match: Match[Any],
    pair: tuple[int, int],
    result: dict[str, Any],
    known: Sequence[set[Any]],
    shared: int,
) -> dict[str, Any]:
    """The result with labels, names of seeds, and how much each side has that was left out."""
    for index, side, every in zip(pair, result["sides"], known, strict=True):
        side["label"] = context.sides[index].label
        side["seeds"] = dict(zip(match.of[index], side["seeds"], strict=True))
        side["left_out"] = len(every) - shared
    return {"rows": shared, **result}


def _note_shared_models(sides: Sequence[Side], notes: list[str]) -> None:
    for first, second in combinations(sides, 2):
        places = [{member.place.resolve() for member in side.members} for side in (first, second)]
        if places[0] & places[1]:
            notes.append(
                f"{first.label} and {second.label} have a model in common, so they are not "
                "independent, and seeds that they share do not vary between them."
            )


def _correct(pairs: list[dict[str, Any]]) -> None:
    """Add Holm's p over the pairs of a metric, for both tests."""
    for test in ("difference", "sign_test"):
        tested = [pair[test] for pair in pairs if pair[test] and pair[test]["p"] is not None]
        for each, p in zip(tested, holm([each["p"] for each in tested]), strict=True):
            each["p_holm"] = p
