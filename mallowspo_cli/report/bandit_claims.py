"""The bandits' claims: the main ones as lines of text, all of them as tables."""

from collections import Counter
from collections.abc import Mapping, Sequence

from mallowspo_cli.evaluation.claims import Claim
from mallowspo_cli.report.estimates import interval, markdown_table, number


def main_lines(main: Mapping[str, Sequence[Claim]], bold: str = "") -> list[str]:
    """The sentences, each with its numbers and what was found; `bold`: what makes that bold."""
    if not main:
        return ["Mallows-theta and DPO are not both among the objectives: no summary."]
    lines = [
        "Mallows-theta, told the true phi, against DPO. Above 0 speaks for it: held if the whole "
        "95% interval is above 0, opposite if it is below, else not seen.",
        "",
    ]
    for place, (sentence, found) in enumerate(main.items(), start=1):
        cases = "; ".join(f"{_capital(claim.text)}: {_found(claim, bold)}" for claim in found)
        lines.append(f"{place}. {sentence}. {_capital(found[0].measure)}. {cases}.")
    return lines


def claims_tables(claims: Mapping[str, Sequence[Claim]], labels: Mapping[str, str]) -> list[str]:
    """A table for each section: a row for each claim, a column for each method (its label)."""
    total = sum(len(group) for group in claims.values())
    lines = [
        f"The {total} claims of claims.csv, which has each one's measure in full; here it is that "
        "of the first method, and for Mallows-IPO the baseline is IPO where it says DPO. Intervals "
        f"are not corrected for their number: if all were void, {total / 20:.0f} would be expected "
        "to leave out 0.",
        "",
    ]
    for section, group in claims.items():
        lines += [f"### {section}", ""]
        if not group:
            lines += ["No method is here with its baseline.", ""]
            continue
        counts = Counter(claim.verdict for claim in group)
        lines += [", ".join(f"{counts[v]} {v}" for v in ("held", "not seen", "opposite")) + "."]
        lines += ["", *_table(group, labels), ""]
    return lines


def _table(claims: Sequence[Claim], labels: Mapping[str, str]) -> list[str]:
    rows: dict[str, dict[str, Claim]] = {}
    for claim in claims:
        # One label may begin as another does.
        label = max((name for name in labels.values() if claim.text.startswith(name)), key=len)
        text = claim.text.removeprefix(label).lstrip(",: ")
        rows.setdefault(text, {})[label] = claim
    columns = list(dict.fromkeys(label for row in rows.values() for label in row))
    return markdown_table(
        ["", "measure", *columns],
        [
            [
                text,
                next(iter(row.values())).measure,
                *(_found(row[label], "**") for label in columns),
            ]
            for text, row in rows.items()
        ],
    )


def _found(claim: Claim, bold: str) -> str:
    """The number to four digits, its interval, the verdict."""
    value, ends = claim.estimate.value, interval(vars(claim.estimate), 4)
    # What rounds to 0 has no minus.
    shown = number(value) if value != value else f"{round(value, 4) + 0.0:+.4f}"
    told = shown if ends == "-" else f"{shown} {ends}".replace("-0.0000", "0.0000")
    return f"{told} {bold}{claim.verdict}{bold}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
