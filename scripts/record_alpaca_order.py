"""Record the order of AlpacaEval's instructions as digests, from a model_outputs.json of that set.

    python scripts/record_alpaca_order.py FILE

Take one of the published results that has all 805 instructions in their own order, such as the
baseline's. Further files are compared with the first and their differences printed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mallowspo_cli.evaluation.outputs import read_rows
from mallowspo_cli.evaluation.win_rates.difficulty import OFFICIAL_ORDER, digest
from mallowspo_cli.files import write_text


def main() -> None:
    """Write one digest a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="model_outputs.json")
    first, *others = parser.parse_args().files
    order = digests(first)
    if len(set(order)) < len(order):
        sys.exit(f"{first}: two instructions have one digest")
    for file in others:
        if (found := digests(file)) != order:
            print(f"{file}: {len(found)} instructions, in another order or not all the same")
    write_text(OFFICIAL_ORDER, "\n".join(order) + "\n")
    print(f"{OFFICIAL_ORDER}: {len(order)} instructions")


def digests(file: Path) -> list[str]:
    """Those of a file's instructions, in its order."""
    return [digest(row["instruction"]) for row in read_rows(file)]


if __name__ == "__main__":
    main()
