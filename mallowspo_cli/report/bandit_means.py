"""The bandits' means as Markdown tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from mallowspo_cli.report.estimates import interval, markdown_table, number

Entries = Sequence[Mapping[str, Any]]

TOLD = {
    "": "",
    "true": "told the truth",
    "unit_mean": "w scaled to mean 1",
    "constant": "told one mean",
    "shuffled": "told shuffled",
}
GROUPS = {"all": "all", "low": "agreed", "high": "disputed", "new": "new"}


def one_prompt_tables(results: Mapping[str, Any]) -> list[str]:
    """Max-arm probability at equal beta, regret and order at equal KL, by phi."""
    grid, at = results["grid"], results["compared_at"]
    phis = [*grid["dispersions"], "all"]
    head = ["", *(f"phi {phi:g}" if phi != "all" else "mean" for phi in phis)]
    betas = [f"beta={beta:g}" for beta in grid["betas"]]
    middle = betas[len(betas) // 2]
    pooled, largest = results["by_dispersion"], results["largest_sample"]
    lines = ["Max-arm probability at equal beta, mean over beta, distances and sizes:", ""]
    lines += markdown_table(head, _phi_rows(results, pooled, "max_arm", betas, phis))
    sample = f"{grid['distances'][0]}, {max(grid['pairs'])} pairs, {middle}"
    lines += ["", f"The same of one case: {sample}:", ""]
    lines += markdown_table(head, _phi_rows(results, largest, "max_arm", [middle], phis))
    lines += ["", "Share of policies that put over 0.95 on a wrong arm, mean as above:", ""]
    lines += markdown_table(head, _phi_rows(results, pooled, "wrong_collapse", betas, phis))
    # At equal KL a scale of w changes little: those rows are in summary.csv.
    pooled = [e for e in pooled if e["told"] != "unit_mean"]
    lines += ["", f"Regret at {at}:", ""]
    lines += markdown_table(head, _phi_rows(results, pooled, "regret", [at], phis))
    lines += ["", "Pair accuracy (at every KL):", ""]
    lines += markdown_table(head, _phi_rows(results, pooled, "accuracy", [at], phis))
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
    places: Sequence[str],
    phis: Sequence[Any],
) -> list[list[str]]:
    """A row for each variant; over several places the mean alone, as their intervals differ."""
    found = {(e["method"], e["told"], e["at"], e["phi"]): e[outcome] for e in entries}
    variants = dict.fromkeys((e["method"], e["told"]) for e in entries)
    rows = []
    for method, told in variants:
        cells = []
        for phi in phis:
            cell = [found[method, told, at, phi] for at in places]
            if len(cell) == 1:
                cells.append(_cell(cell[0]))
            else:
                cells.append(number(sum(one["value"] for one in cell) / len(cell)))
        rows.append([_name(results, method, told), *cells])
    return rows


def many_prompts_tables(results: Mapping[str, Any]) -> list[str]:
    """Reward at equal KL by group of prompts, outcomes at the chosen beta, gains by setting."""
    at, head = results["compared_at"], ["", *(f"{name} prompts" for name in GROUPS.values())]
    lines = []
    for regime, title in (("converged", "Converged"), ("first_step", "First gradient step")):
        entries = [e for e in results["prompts"] if e["regime"] == regime and e["at"] == at]
        lines += [
            f"{title}: reward at mean {at}, and its gain over DPO (over IPO for Mallows-IPO):"
        ]
        lines += ["", *markdown_table(head, _group_rows(results, entries)), ""]
    tuned = [e for e in results["prompts"] if e["at"] == "tuned"]
    lines += ["Converged, at the chosen beta:", ""]
    lines += markdown_table(
        ["", "reward", "KL", "max-arm probability", "pair accuracy"],
        [
            [
                _name(results, e["method"], e["told"]),
                *(_cell(e[name]) for name in ("reward", "kl", "max_arm", "accuracy")),
            ]
            for e in tuned
            if e["group"] == "all"
        ],
    )
    lines += ["", f"Gain in reward at mean {at}, told the truth, setting by setting:", ""]
    methods = list(dict.fromkeys(e["method"] for e in results["prompts_by_setting"]))
    rows: dict[str, list[str]] = {}
    for e in results["prompts_by_setting"]:
        setting = f"{e['regime']}, {e['distance']}, {e['pairs']} pairs, conflict {e['conflict']:g}"
        rows.setdefault(setting, [setting]).append(_signed(e["gain"]))
    names = [results["labels"][method] for method in methods]
    return [*lines, *markdown_table(["", *names], list(rows.values())), ""]


def _group_rows(results: Mapping[str, Any], entries: Entries) -> list[list[str]]:
    rows: dict[tuple[str, str], list[str]] = {}
    for e in entries:
        key = e["method"], e["told"]
        row = rows.setdefault(key, [_name(results, *key)])
        gain = f" ({_signed(e['gain'])})" if "gain" in e and e["told"] else ""
        row.append(f"{number(e['reward']['value'])}{gain}")
    return list(rows.values())


def _cell(entry: Mapping[str, Any]) -> str:
    """A mean with its interval, or a dash."""
    value = number(entry["value"])
    return value if value == "-" else f"{value} {interval(entry)}"


def _signed(entry: Mapping[str, Any]) -> str:
    """A gain with its interval, in thousandths; a gain of the solver's own size is 0."""
    value, low, high = (
        "-" if entry[key] is None or entry[key] != entry[key] else f"{1000 * entry[key] + 0.0:+.1f}"
        for key in ("value", "low", "high")
    )
    return f"{value} [{low}, {high}]e-3"


def _name(results: Mapping[str, Any], method: str, told: str) -> str:
    label = results["labels"][method]
    return label if not told else f"{label}: {TOLD.get(told, f'told phi = {told}')}"
