"""Record TRL's own losses of made-up pairs.

    pip install 'trl==1.16.0' && python scripts/record_trl_losses.py tests/golden/trl_losses.json

tests/objectives/test_trl.py holds ours against them. TRL's loss code runs as it is installed: the
method of its trainer is called with a stand-in for the trainer, whose "model" gives back the
log-probs that were drawn here. One pair a call, so that the mean that TRL takes is the pair's own.
"""

import argparse
import importlib.metadata
import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from mallowspo_cli.files import write_text

COMMAND = "python scripts/record_trl_losses.py tests/golden/trl_losses.json"
PACKAGES = ("trl", "torch", "transformers")
NUM_PAIRS = 12
Pair = dict[str, float]

# What each case calls, and what it sets; `dtype` where TRL's own code takes no float64.
DPO_CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": "sigmoid"},
    "sigmoid_norm": {"loss_type": "sigmoid_norm", "beta": 5.0},
    "forward_kl": {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"},
    "js_divergence": {"loss_type": "sigmoid", "f_divergence_type": "js_divergence"},
    "alpha_divergence": {
        "loss_type": "sigmoid",
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.7,
        "dtype": "float32",
    },
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 0.001},
    "exo_pair_smoother": {"loss_type": "exo_pair", "label_smoothing": 0.2},
    "nca_pair": {"loss_type": "nca_pair"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "bco_pair": {"loss_type": "bco_pair"},
    "sppo_hard": {"loss_type": "sppo_hard"},
    "apo_zero": {"loss_type": "apo_zero"},
    "apo_down": {"loss_type": "apo_down"},
    "aot_smoothed": {"loss_type": "aot", "label_smoothing": 0.1},
    "sft": {"loss_type": "sft"},
    "wpo": {"loss_type": "sigmoid", "use_weighting": True},
    "ld_dpo": {"loss_type": "sigmoid", "ld_alpha": 0.4},
}
CPO_CASES: dict[str, dict[str, Any]] = {
    "cpo_sigmoid": {"loss_type": "sigmoid", "label_smoothing": 0.0},
    "cpo_smoothed": {"loss_type": "sigmoid", "label_smoothing": 0.1},
    "cpo_simpo": {"loss_type": "simpo", "label_smoothing": 0.0, "simpo_gamma": 0.5, "beta": 2.0},
}
ORPO_CASES: dict[str, dict[str, Any]] = {"orpo_odds_ratio": {}}


def main() -> None:
    """Draw the pairs, ask TRL, write the file with one line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="the JSON file to write")
    target = parser.parse_args().target
    inputs = pairs()
    cases: dict[str, dict[str, Any]] = {}
    families = ((DPO_CASES, dpo_loss), (CPO_CASES, cpo_loss), (ORPO_CASES, orpo_term))
    for family, loss in families:
        for name, own in family.items():
            settings = {"beta": 0.1, "dtype": "float64", **own}
            found = [loss(pair, settings) for pair in inputs]
            cases[name] = {"settings": settings, "losses": found}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    columns = {key: [pair[key] for pair in inputs] for key in inputs[0]}
    write_text(target, _lines(versions, columns, cases))
    print(target)


def pairs() -> list[Pair]:
    """Lengths, summed log-probs and what WPO and LD-DPO read of the policy besides.

    Every fourth pair lies at the reference, every fourth far from it, the rest near.
    """
    generator = random.Random(20240514)
    found = []
    for index in range(NUM_PAIRS):
        spread = (0.0, 2.0, 2.0, 15.0)[index % 4]
        pair: Pair = {}
        for side in ("chosen", "rejected"):
            pair[f"{side}_tokens"] = generator.randint(2, 30)
            reference = round(-generator.uniform(16, 70), 4)
            pair[f"reference_{side}_logps"] = reference
            pair[f"{side}_logps"] = round(reference + generator.uniform(-spread, spread), 4)
            surprise = generator.uniform(-1, 0.5) * pair[f"{side}_tokens"]
            pair[f"{side}_log_collisions"] = round(pair[f"{side}_logps"] - surprise, 4)
        shorter = min(pair["chosen_tokens"], pair["rejected_tokens"])
        for side in ("chosen", "rejected"):
            share = generator.uniform(0.3, 0.9) if pair[f"{side}_tokens"] > shorter else 1.0
            pair[f"{side}_common_logps"] = round(share * pair[f"{side}_logps"], 4)
        found.append(pair)
    return found


def dpo_loss(pair: Pair, settings: dict[str, Any]) -> float:
    """DPOTrainer._compute_loss of one pair."""
    from trl.trainer.dpo_trainer import DPOTrainer

    dtype = getattr(torch, settings["dtype"])
    lengths = [int(pair["chosen_tokens"]), int(pair["rejected_tokens"])]
    # A prompt of one token; a response's log-prob lies on its first token, and that of what it is
    # longer by than the other on its last.
    completion = torch.zeros(2, 1 + max(lengths), dtype=torch.long)
    log_probs = torch.zeros(2, max(lengths), dtype=dtype)
    log_collisions = torch.zeros_like(log_probs)
    for row, (side, length) in enumerate(zip(("chosen", "rejected"), lengths, strict=True)):
        completion[row, 1 : 1 + length] = 1
        log_probs[row, 0] = pair[f"{side}_common_logps"]
        log_probs[row, length - 1] += pair[f"{side}_logps"] - pair[f"{side}_common_logps"]
        log_collisions[row, 0] = pair[f"{side}_log_collisions"]
    model: Any = _Model(log_probs, log_collisions)
    ld_alpha = settings.get("ld_alpha")
    references = [_reference(pair, side, ld_alpha) for side in ("chosen", "rejected")]
    trainer: Any = SimpleNamespace(
        model=model,
        accelerator=_accelerator(),
        beta=settings["beta"],
        loss_types=[settings["loss_type"]],
        loss_weights=[1.0],
        label_smoothing=settings.get("label_smoothing", 0.0),
        f_divergence_type=settings.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=settings.get("f_alpha_divergence_coef", 0.5),
        ld_alpha=ld_alpha,
        use_weighting=settings.get("use_weighting", False),
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": torch.tensor(references[:1], dtype=dtype),
        "ref_rejected_logps": torch.tensor(references[1:], dtype=dtype),
    }
    return DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False).item()


def _reference(pair: Pair, side: str, ld_alpha: float | None) -> float:
    """What TRL precomputes of a response: its log-prob, for LD-DPO with the excess weighed.

    The reference is one that divides its log-prob as the policy does, as our LD-DPO assumes.
    """
    share = pair[f"{side}_common_logps"] / pair[f"{side}_logps"]
    weight = 1.0 if ld_alpha is None else share + ld_alpha * (1 - share)
    return weight * pair[f"reference_{side}_logps"]


def cpo_loss(pair: Pair, settings: dict[str, Any]) -> float:
    """CPOTrainer.cpo_loss: the loss of one pair without the likelihood term.

    Its trainer gives it mean log-probs for `simpo`, and sums otherwise.
    """
    from trl.experimental.cpo import CPOTrainer

    trainer: Any = SimpleNamespace(
        accelerator=_accelerator(),
        alpha=0.0,
        beta=settings["beta"],
        loss_type=settings["loss_type"],
        label_smoothing=settings["label_smoothing"],
        simpo_gamma=settings.get("simpo_gamma"),
    )
    losses, _, _ = CPOTrainer.cpo_loss(trainer, *_logps(pair, settings["loss_type"] == "simpo"))
    return losses.item()


def orpo_term(pair: Pair, settings: dict[str, Any]) -> float:
    """ORPOTrainer.odds_ratio_loss, which its trainer subtracts from the likelihood term.

    It computes in float32 whatever it is given, and is given mean log-probs.
    """
    from trl.experimental.orpo import ORPOTrainer

    trainer: Any = SimpleNamespace(accelerator=_accelerator(), beta=settings["beta"])
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer, *_logps(pair, mean=True))
    return losses.item()


def _logps(pair: Pair, mean: bool) -> tuple[Any, Any]:
    chosen, rejected = (
        pair[f"{side}_logps"] / (pair[f"{side}_tokens"] if mean else 1)
        for side in ("chosen", "rejected")
    )
    sides = torch.tensor([[chosen], [rejected]], dtype=torch.float64)
    return sides[0], sides[1]


class _Model:
    """Gives back log-probs; what else TRL reads of a model only enters its metrics."""

    training = True

    def __init__(self, log_probs: torch.Tensor, log_collisions: torch.Tensor) -> None:
        self.log_probs, self.log_collisions = log_probs, log_collisions

    def __call__(self, **_: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(self.log_probs)
        return SimpleNamespace(
            log_probs=self.log_probs,
            log_sum_sq_probs=self.log_collisions,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )


def _accelerator() -> SimpleNamespace:
    def same(values: torch.Tensor) -> torch.Tensor:
        return values

    return SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)


def _lines(
    versions: dict[str, str], columns: dict[str, list[float]], cases: dict[str, dict[str, Any]]
) -> str:
    """The file, with one line a column and a case."""
    parts = []
    for key, entries in (("inputs", columns), ("cases", cases)):
        rows = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
        parts.append(f'"{key}": {{\n' + ",\n".join(rows) + "\n}")
    head = f'"command": {json.dumps(COMMAND)},\n"versions": {json.dumps(versions)}'
    return "{\n" + ",\n".join([head, *parts]) + "\n}\n"


if __name__ == "__main__":
    main()
