"""Record the golden trajectories that tests/test_golden.py holds new code against.

    python scripts/record_golden.py tests/golden

Run it only where a change is meant to move the numbers, and say in the commit why they moved.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mallowspo_cli.files import write_json
from tests.trajectory import OBJECTIVES, trajectory


def main() -> None:
    """Write one file an objective."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="directory of the golden files")
    target = parser.parse_args().target
    target.mkdir(parents=True, exist_ok=True)
    for objective in OBJECTIVES:
        write_json(target / f"{objective}.json", trajectory(objective))
        print(target / f"{objective}.json")


if __name__ == "__main__":
    main()
