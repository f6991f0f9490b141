"""The table of losses in the documentation is what its script writes."""

import runpy
from pathlib import Path

import pytest

from mallowspo_cli.objectives import registered

ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "write_objectives_table.py"))
PAGE = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")


def test_the_committed_table_is_the_scripts() -> None:
    # Write it again with: python scripts/write_objectives_table.py
    assert SCRIPT["with_table"](PAGE, registered()) == PAGE


def test_every_loss_has_a_row_and_all_but_two_name_their_paper() -> None:
    table = PAGE.partition(SCRIPT["BEGIN"])[2].partition(SCRIPT["END"])[0]
    rows = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    own = [n for n, c in registered().items() if c.__module__.startswith("mallowspo_cli.")]
    assert ["objective=", *own] == list(rows)
    # SFT is nobody's in particular; Mallows-IPO comes from the authors' code.
    unnamed = [name for name in own if "arxiv.org" not in rows[name]]
    assert unnamed == ["mallows_ipo", "sft"]


def test_a_page_without_the_markers_is_refused() -> None:
    with pytest.raises(SystemExit, match="no lines"):
        SCRIPT["with_table"]("# Objectives\n", registered())
