"""Write the table of losses in docs/objectives.md from the registered objectives.

    python scripts/write_objectives_table.py
    python scripts/write_objectives_table.py --stdout

A loss's row comes from its class: the first line of its docstring, its knobs with their defaults,
what it reads, and the papers that the docstring names. With --stdout the table is printed, with the
objectives of other installed packages in it; the file holds those of this repository alone.
"""

import argparse
import re
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from mallowspo_cli.files import write_text
from mallowspo_cli.objectives.base import Objective, registered

PAGE = Path(__file__).parent.parent / "docs" / "objectives.md"
BEGIN = "<!-- The table down to END is written by scripts/write_objectives_table.py. -->"
END = "<!-- END -->"
HEAD = (
    "| `objective=` | loss of a pair | knobs | reads | w(x) | papers (arXiv) |",
    "| --- | --- | --- | --- | --- | --- |",
)


def main() -> None:
    """Print the table, or put it between the markers of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stdout", action="store_true", help="print it; leave the page alone")
    objectives = registered()
    if parser.parse_args().stdout:
        print(table(objectives))
        return
    write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8"), objectives))
    print(PAGE)


def with_table(page: str, objectives: dict[str, type[Objective]]) -> str:
    """The page with the table of this repository's objectives between its markers."""
    own = {n: c for n, c in objectives.items() if c.__module__.startswith("mallowspo_cli.")}
    before, begin, rest = page.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not (begin and end):
        raise SystemExit(f"the page has no lines {BEGIN!r} and {END!r}")
    return f"{before}{begin}{table(own)}\n{end}{after}"


def table(objectives: dict[str, type[Objective]]) -> str:
    """The Markdown table, one row an objective."""
    return "\n".join((*HEAD, *(_row(name, cls) for name, cls in objectives.items())))


def _row(name: str, cls: type[Objective]) -> str:
    text = (cls.__doc__ or "").strip()
    papers = re.findall(r"\b\d{4}\.\d{5}\b", text)
    knobs = [f"`{field.name}` {_default(field)}" for field in fields(cls)]
    cells = [
        f"`{name}`",
        text.split("\n", 1)[0].rstrip("."),
        ", ".join(knobs) or "none",
        _reads(cls),
        _plug_in(cls),
        ", ".join(f"[{i}](https://arxiv.org/abs/{i})" for i in dict.fromkeys(papers)),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: "Field[Any]") -> str:
    if field.default is MISSING:
        return "(choose)"
    value = getattr(field.default, "value", field.default)
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _reads(cls: type[Objective]) -> str:
    """What enters the loss beside the policy's log-probs, at the default knobs."""
    if any(field.default is MISSING for field in fields(cls)):
        return "by its knobs"
    loss = cls()
    what = {
        "reference": loss.needs_reference,
        "dispersion": loss.needs_dispersion,
        "token details": loss.needs_details,
    }
    return ", ".join(word for word, needed in what.items() if needed) or "-"


def _plug_in(cls: type[Objective]) -> str:
    """Whether the weight of the dispersion is in the loss: always, on request, or not."""
    if any(field.name == "dispersion" for field in fields(cls)):
        return "`dispersion=true`"
    return "always" if "dispersion" in _reads(cls) else "no"


if __name__ == "__main__":
    main()
