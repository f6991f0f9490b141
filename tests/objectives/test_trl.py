"""Our losses are TRL's on the same log-probs, up to the conversions written here.

The numbers are TRL's own. To make them again, in an environment with the extra `bench`:

    python scripts/record_trl_losses.py tests/golden/trl_losses.json
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mallowspo_cli.objectives import Objective, ReferenceScores
from mallowspo_cli.objectives.apo import APODown, APOZero
from mallowspo_cli.objectives.bco import BCO
from mallowspo_cli.objectives.cpo import CPO
from mallowspo_cli.objectives.details import DetailedScores
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.exo import EXO
from mallowspo_cli.objectives.f_dpo import FDPO, Divergence
from mallowspo_cli.objectives.hinge import Hinge
from mallowspo_cli.objectives.ipo import IPO, Scaling
from mallowspo_cli.objectives.ld_dpo import LDDPO
from mallowspo_cli.objectives.nca import NCA
from mallowspo_cli.objectives.orpo import ORPO
from mallowspo_cli.objectives.robust_dpo import RobustDPO
from mallowspo_cli.objectives.sft import SFT
from mallowspo_cli.objectives.simpo import SimPO
from mallowspo_cli.objectives.sppo import SPPOHard
from mallowspo_cli.objectives.wpo import WPO

RECORDED = json.loads((Path(__file__).parent.parent / "golden" / "trl_losses.json").read_text())

SAME: dict[str, Objective] = {
    "sigmoid": DPO(beta=0.1),
    "sigmoid_norm": DPO(beta=5.0, length_normalised=True),
    # Of one pair at a time the optimal transport is DPO; TRL's `sigmoid` has no label smoothing.
    "aot_smoothed": DPO(beta=0.1, label_smoothing=0.1),
    # TRL divides by the number of tokens, where the paper has sums.
    "ipo": IPO(beta=0.1, scaling=Scaling.target, length_normalised=True),
    "forward_kl": FDPO(beta=0.1, divergence=Divergence.forward_kl),
    "js_divergence": FDPO(beta=0.1, divergence=Divergence.js),
    # TRL's coefficient is 1 - alpha.
    "alpha_divergence": FDPO(beta=0.1, divergence=Divergence.alpha, alpha=1 - 0.7),
    "hinge": Hinge(beta=0.1),
    "exo_pair": EXO(beta=0.1, label_smoothing=0.001),
    "exo_pair_smoother": EXO(beta=0.1, label_smoothing=0.2),
    "nca_pair": NCA(beta=0.1),
    "robust": RobustDPO(beta=0.1, label_smoothing=0.1),
    # BCO before its first step, when its threshold is 0: TRL's has none.
    "bco_pair": BCO(beta=0.1),
    "sppo_hard": SPPOHard(beta=0.1),
    "apo_zero": APOZero(beta=0.1),
    "apo_down": APODown(beta=0.1),
    "sft": SFT(),
    # TRL bounds no weight.
    "wpo": WPO(beta=0.1, largest_weight=math.inf),
    "ld_dpo": LDDPO(beta=0.1, excess_weight=0.4),
    # The loss method of TRL's CPO trainer leaves the likelihood of the chosen response out.
    "cpo_sigmoid": CPO(beta=0.1, sft_coefficient=0.0),
    "cpo_smoothed": CPO(beta=0.1, sft_coefficient=0.0, label_smoothing=0.1),
    # SimPO's gamma is beta times our home advantage.
    "cpo_simpo": SimPO(beta=2.0, home_advantage=0.5 / 2.0),
}
SINGLE = {"alpha_divergence", "orpo_odds_ratio", "exo_pair", "exo_pair_smoother"}
"""Where TRL computes in float32, EXO's epsilon alone."""


def column(name: str) -> Tensor:
    return torch.tensor(RECORDED["inputs"][name], dtype=torch.float64)


def ours(objective: Objective) -> list[float]:
    sides = ("chosen", "rejected")
    names = ("logps", "tokens", "common_logps", "log_collisions")
    policy = DetailedScores(**{f"{s}_{n}": column(f"{s}_{n}") for s in sides for n in names})
    reference = ReferenceScores(
        column("reference_chosen_logps"),
        column("reference_rejected_logps"),
        policy.chosen_tokens,
        policy.rejected_tokens,
        torch.full_like(policy.chosen_logps, 0.5),
    )
    return objective(policy, reference).losses.tolist()


def close_to(values: list[float], case: str) -> object:
    single = case in SINGLE
    return pytest.approx(values, rel=3e-6 if single else 1e-12, abs=1e-7 if single else 1e-12)


def test_every_recorded_loss_is_compared() -> None:
    assert RECORDED["cases"].keys() == SAME.keys() | {"orpo_odds_ratio"}
    assert RECORDED["versions"]["trl"] == "1.16.0"


@pytest.mark.parametrize("case", SAME)
def test_a_loss_is_trls(case: str) -> None:
    objective, recorded = SAME[case], RECORDED["cases"][case]
    assert getattr(objective, "beta", 0.1) == recorded["settings"]["beta"]
    assert ours(objective) == close_to(recorded["losses"], case)


def test_orpo_is_trls_term_subtracted_from_the_likelihood_of_the_chosen_response() -> None:
    likelihood = column("chosen_logps") / column("chosen_tokens")
    term = torch.tensor(RECORDED["cases"]["orpo_odds_ratio"]["losses"]).double()
    found = ours(ORPO(beta=0.1))
    assert found == close_to((-likelihood - term).tolist(), "orpo_odds_ratio")
    assert term.min() < -0.1  # not only the likelihood is compared
