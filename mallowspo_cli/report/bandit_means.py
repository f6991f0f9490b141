"""The bandits' means as Markdown tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from mallowspo_cli.report.estimates import markdown_table, number, with_interval

Entries = Sequence[Mapping[str, Any]]

TOLD = {
    "": "",
    "true": "told the truth",
    "unit_mean": "w scaled to mean 1",
    "constant": "told one mean",
    "shuffled": "told shuffled",
}
EQUAL_BETA = {
    "max_arm": "Max-arm probability",
    "wrong_collapse": "Share of policies that put over 0.95 on a wrong arm",
    "regret": "Regret",
}
GROUPS = {"all": "all", "low": "agreed", "high": "disputed", "new": "new"}


def one_prompt_tables(results: Mapping[str, Any]) -> list[str]:
    """Peaks and regret at equal beta under each budget, regret and order at equal KL, by phi."""
    grid, at = results["grid"], results["compared_at"]
    phis = [*grid["dispersions"], "all"]
    head = ["", *(f"phi {phi:g}" if phi != "all" else "mean" for phi in phis)]
    pooled, budgets = results["by_dispersion"], results["budgets"]
    lines = []
    # At equal beta a wrong phi is but another beta, at equal KL a scale of w changes little: those
    # rows are in summary.csv.
    right = [e for e in pooled if e["told"] in TOLD]
    for outcome, title in EQUAL_BETA.items():
        lines += [
            f"{title} at equal beta, mean over beta, distances and sizes, budget "
            f"{', '.join(budgets)}:",
            "",
            *markdown_table(head, _phi_rows(results, right, outcome, [*budgets.values()], phis)),
            "",
        ]
    pooled = [e for e in pooled if e["told"] != "unit_mean"]
    lines += [f"Regret at {at}, samples whose loss has a minimum:", ""]
    lines += markdown_table(head, _phi_rows(results, pooled, "regret", [[at]], phis))
    lines += ["", "Pair accuracy (at every KL), the same samples:", ""]
    lines += markdown_table(head, _phi_rows(results, pooled, "accuracy", [[at]], phis))
    if results["missed_kl"]:
        lines += ["", f"Share of those samples on which ties keep a policy from {at}:", ""]
        lines += markdown_table(
            head[:-1],
            [
                [_name(results, e["method"], e["told"]), *(number(s) for s in e["share"])]
                for e in results["missed_kl"]
            ],
        )
    lines += ["", "Share of samples whose loss falls for ever (all but the squared losses):", ""]
    lines += markdown_table(
        ["", *(f"{pairs} pairs" for pairs in grid["pairs"])],
        [
            [f"{row['distance']}, phi {row['phi']:g}", *(number(s, 2) for s in row["share"])]
            for row in results["without_optimum"]
        ],
    )
    return [*lines, ""]


def _phi_rows(
    results: Mapping[str, Any],
    entries: Entries,
    outcome: str,
    kinds: Sequence[Sequence[str]],
    phis: Sequence[Any],
) -> list[list[str]]:
    """A row for each variant, in a cell a number for each kind of places; over several places the
    mean alone, as their intervals differ."""
    found = {(e["method"], e["told"], e["at"], e["phi"]): e[outcome] for e in entries}
    variants = dict.fromkeys((e["method"], e["told"]) for e in entries)
    rows = []
    for method, told in variants:
        cells = []
        for phi in phis:
            of = [[found[method, told, at, phi] for at in places] for places in kinds]
            shown = [with_interval(one[0]) if len(one) == 1 else number(_mean(one)) for one in of]
            cells.append("-" if set(shown) == {"-"} else ", ".join(shown))
        rows.append([_name(results, method, told), *cells])
    return rows


def _mean(entries: Entries) -> float:
    return sum(entry["value"] for entry in entries) / len(entries)


def many_prompts_tables(results: Mapping[str, Any]) -> list[str]:
    """By distance: reward at equal KL by group of prompts, outcomes at a chosen beta; gains."""
    at, head = results["compared_at"], ["", *(f"{name} prompts" for name in GROUPS.values())]
    distances = results["grid"]["distances"]
    lines = []
    for regime, title in (("converged", "Converged"), ("first_step", "First gradient step")):
        for distance in distances:
            entries = _shown(_entries(results, regime=regime, at=at, distance=distance))
            lines += [f"{title}, {distance}: reward at {at} of each group of prompts, and its gain"]
            lines[-1] += " over DPO (over IPO for Mallows-IPO):"
            lines += ["", *markdown_table(head, _group_rows(results, entries)), ""]
    penalty = results["penalties"][len(results["penalties"]) // 2]
    for distance in distances:
        tuned = _shown(_entries(results, at=f"tuned={penalty:g}", distance=distance, group="all"))
        lines += [f"Converged, {distance}, beta chosen by reward - {penalty:g} KL:", ""]
        lines += markdown_table(
            ["", "reward", "KL", "max-arm probability", "pair accuracy"],
            [
                [
                    _name(results, e["method"], e["told"]),
                    *(with_interval(e[name]) for name in ("reward", "kl", "max_arm", "accuracy")),
                ]
                for e in tuned
            ],
        )
        lines += [""]
    lines += [f"Gain in reward at mean {at}, told the truth, setting by setting:", ""]
    methods = list(dict.fromkeys(e["method"] for e in results["prompts_by_setting"]))
    rows: dict[str, list[str]] = {}
    for e in results["prompts_by_setting"]:
        setting = f"{e['regime']}, {e['distance']}, {e['pairs']} pairs, conflict {e['conflict']:g}"
        rows.setdefault(setting, [setting]).append(_signed(e["gain"]))
    names = [results["labels"][method] for method in methods]
    return [*lines, *markdown_table(["", *names], list(rows.values())), ""]


def _shown(entries: Entries) -> Entries:
    """Without a scaled w, which is another beta, and without one w for all, which is DPO or IPO but
    for Mallows-phi: those are in results.json."""
    return [e for e in entries if e["told"] not in ("unit_mean", "constant")]


def _entries(results: Mapping[str, Any], **wanted: str) -> Entries:
    """Means over many prompts of which these are so."""
    return [e for e in results["prompts"] if all(e[key] == wanted[key] for key in wanted)]


def _group_rows(results: Mapping[str, Any], entries: Entries) -> list[list[str]]:
    rows: dict[tuple[str, str], list[str]] = {}
    for e in entries:
        key = e["method"], e["told"]
        row = rows.setdefault(key, [_name(results, *key)])
        gain = f" ({_signed(e['gain'])})" if "gain" in e and e["told"] else ""
        row.append(f"{number(e['reward']['value'])}{gain}")
    return list(rows.values())


def _signed(entry: Mapping[str, Any]) -> str:
    """A gain with its interval, in thousandths; a gain of the solver's own size is 0."""
    value, low, high = (_thousandths(entry[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]e-3"


def _thousandths(value: float | None) -> str:
    """A dash where there is none; what rounds to 0 has no minus."""
    return "-" if value is None or value != value else f"{round(1000 * value, 1) + 0.0:+.1f}"


def _name(results: Mapping[str, Any], method: str, told: str) -> str:
    label = results["labels"][method]
    return label if not told else f"{label}: {TOLD.get(told, f'told phi = {told}')}"
