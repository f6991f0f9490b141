"""Agreement of judges over the answers that several of them have judged."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from mallowspo_cli.evaluation.comparing.metrics import Resampling
from mallowspo_cli.evaluation.comparing.paired import judges_agreement
from mallowspo_cli.evaluation.comparing.sides import Side
from mallowspo_cli.evaluation.outputs import DRAW


def agreements(sides: Sequence[Side], resampling: Resampling) -> list[dict[str, Any]]:
    """How far any two judges agree on the very same answers, whoever gave them.

    Answers equal to the baseline's are left out: they are draws that no judge was asked about.
    """
    verdicts: dict[str, dict[tuple[str, str, str], int]] = {}
    for evaluation in (e for s in sides for m in s.members for e in m.evaluations):
        of_judge = verdicts.setdefault(evaluation.judge, {})
        for row in evaluation.annotations.values():
            if not np.isnan(row.preference) and row.output_1 != row.output_2:
                answers = (row.instruction, row.output_1, row.output_2)
                of_judge.setdefault(answers, int(np.sign(row.preference - DRAW)) + 1)
    found = []
    for first, second in combinations(sorted(verdicts), 2):
        if shared := sorted(verdicts[first].keys() & verdicts[second].keys()):
            both = [np.array([verdicts[name][key] for key in shared]) for name in (first, second)]
            prompts = [key[0] for key in shared]
            agreement = judges_agreement(
                both[0], both[1], prompts, resampling.means, resampling.seed
            )
            found.append({"first": first, "second": second, **asdict(agreement)})
    return found
