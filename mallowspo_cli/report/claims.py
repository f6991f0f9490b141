"""Claims and what was found of them, as a table."""

from collections.abc import Sequence

from mallowspo_cli.evaluation.claims import Claim
from mallowspo_cli.report.estimates import interval, markdown_table, number


def claims_table(claims: Sequence[Claim], digits: int = 3) -> list[str]:
    """Lines of a Markdown table: the claim, the number that decides it, and the verdict."""
    return markdown_table(
        ["claim", "measure (above 0 speaks for it)", "mean", "95% interval", "found"],
        [
            [
                claim.text,
                claim.measure,
                number(claim.estimate.value, digits),
                interval(vars(claim.estimate), digits),
                f"**{claim.verdict}**",
            ]
            for claim in claims
        ],
    )
