"""Before the first step the policy has to be the model that the store's numbers are of."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from mallowspo_cli.data.pairs import Message, PreferencePair
from mallowspo_cli.data.table import TokenizedPair
from mallowspo_cli.data.tokenize import tokenize_pairs
from mallowspo_cli.errors import CacheError
from mallowspo_cli.objectives.base import Objective, PairScores, registered
from mallowspo_cli.objectives.details import DetailedScores
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.f_dpo import FDPO, Divergence
from mallowspo_cli.objectives.robust_dpo import RobustDPO
from mallowspo_cli.packing.layout import Layout, PairBatch
from mallowspo_cli.recipe.choices import Dtype, Precision
from mallowspo_cli.recipe.schema import (
    DatasetConfig,
    DispersionConfig,
    ModelConfig,
    ReferenceConfig,
)
from mallowspo_cli.reference import build
from mallowspo_cli.reference.terms import Reference
from mallowspo_cli.scoring import PairScorer, scorer_for
from mallowspo_cli.training.startup import check_start, sample, tolerance
from tests.conftest import pair_rows

CPU = torch.device("cpu")
CONFIG = ModelConfig(source="random:llama")


@dataclass
class Setting:
    """Pairs, their reference in float32 and a policy that is that model."""

    pairs: list[TokenizedPair]
    reference: Reference
    policy: PairScorer

    def check(
        self,
        objective: Objective | None = None,
        compute: str = "float32",
        policy: Callable[..., PairScores] | None = None,
    ) -> float:
        objective = objective or DPO()
        return check_start(
            *(scorer_for(objective, policy or self.policy), self.pairs[:4], objective),
            *(self.reference, compute, CPU, Layout.shared),
        )


def setting(
    tiny_directory: Path, tiny_tokenizer, place: Path, config: ModelConfig = CONFIG
) -> Setting:
    rows = [
        PreferencePair(
            (Message("user", row["prompt"]),),
            Message("assistant", row["chosen"]),
            Message("assistant", row["rejected"]),
            "row",
        )
        for row in pair_rows(8)
    ]
    pairs = list(tokenize_pairs(rows, tiny_tokenizer, DatasetConfig(path="-")))
    precision = Precision.fp32 if config.dtype is Dtype.float32 else Precision.bf16
    store = build.open_store(tiny_directory, config, ReferenceConfig(store=str(place)), precision)
    build.complete_store(store, pairs, tiny_directory, config, precision, 4096, CPU)
    reference = Reference(store, DispersionConfig(), [p.pair_id for p in pairs], seed=0)
    return Setting(pairs, reference, build.load_scorer(tiny_directory, CONFIG, CPU))


@pytest.fixture(scope="module")
def made(tiny_directory: Path, tiny_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Made once, and changed by no test."""
    return setting(tiny_directory, tiny_tokenizer, tmp_path_factory.mktemp("startup") / "store")


@pytest.fixture
def same(made: Setting) -> Setting:
    """Policy and reference are one model; a test may change either."""
    reference = copy.copy(made.reference)
    reference.store = copy.copy(made.reference.store)
    return Setting(made.pairs, reference, copy.deepcopy(made.policy))


@pytest.mark.parametrize("name", sorted(registered()))
def test_the_reference_itself_passes_with_every_objective(same: Setting, name: str) -> None:
    assert same.check(registered()[name]()) < 1e-4


@pytest.mark.parametrize("size", [1e-2, 1e-3])
def test_other_weights_are_refused_with_the_pair_and_both_values(
    same: Setting, size: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in same.policy.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    with pytest.raises(CacheError) as caught:
        same.check()
    text = str(caught.value)
    assert same.pairs[0].pair_id in text
    assert "cache verify" in text
    assert "\n" not in text


def test_another_compute_type_is_named_as_the_cause(same: Setting) -> None:
    with torch.no_grad():
        for parameter in same.policy.parameters():
            parameter *= 1.2
    with pytest.raises(CacheError, match="computed in float32, the policy in bfloat16 autocast"):
        same.check(compute="bfloat16 autocast over float32")


def test_rounding_to_bfloat16_is_not_taken_for_another_model(
    tiny_directory: Path, tiny_tokenizer, tmp_path: Path
) -> None:
    half = ModelConfig(source="random:llama", dtype=Dtype.bfloat16)
    found = setting(tiny_directory, tiny_tokenizer, tmp_path / "store", half)
    worst = found.check()
    assert worst > 1e-3
    # The same difference between two float32 passes would be refused.
    store = found.reference.store
    store.fingerprint = replace(store.fingerprint, compute="float32")
    with pytest.raises(CacheError):
        found.check()


STEEP: dict[str, Objective] = {
    "robust_dpo, 0.3": RobustDPO(label_smoothing=0.3),
    "robust_dpo, 0.4": RobustDPO(label_smoothing=0.4),
    "f_dpo, forward_kl": FDPO(divergence=Divergence.forward_kl),
    "f_dpo, alpha": FDPO(divergence=Divergence.alpha),
}
SOUND = {name: cls() for name, cls in registered().items()} | STEEP


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("signs", [(-1, -1), (-1, 1), (1, -1), (1, 1)])
def test_the_loss_of_a_pair_that_rounding_moved_is_no_fault_of_the_objective(
    same: Setting, name: str, signs: tuple[int, int]
) -> None:
    def rounded(batch: PairBatch, **asked: bool) -> PairScores:
        scores = same.policy(batch, **asked)
        chosen, rejected = (
            0.39 * sign * tokens.sqrt()
            for sign, tokens in zip(
                signs, (scores.chosen_tokens, scores.rejected_tokens), strict=True
            )
        )
        if isinstance(scores, DetailedScores):
            # WPO's weights are on their bound at the reference, and here below it.
            scores = replace(
                scores,
                chosen_log_collisions=scores.chosen_logps - 1e-3 * scores.chosen_tokens,
                rejected_log_collisions=scores.rejected_logps - 1e-3 * scores.rejected_tokens,
            )
        return replace(
            scores,
            chosen_logps=scores.chosen_logps + chosen,
            rejected_logps=scores.rejected_logps + rejected,
        )

    store = same.reference.store
    store.fingerprint = replace(store.fingerprint, compute="bfloat16")
    assert same.check(SOUND[name], "bfloat16", rounded) > 1


def test_a_loss_that_is_not_log_two_where_it_should_be_is_refused(
    same: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    honest = DPO.__call__

    def second_is_wrong(self, policy, reference):
        calls.append(1)
        output = honest(self, policy, reference)
        if len(calls) == 2:
            output.losses.add_(0.1)
        return output

    monkeypatch.setattr(DPO, "__call__", second_is_wrong)
    with pytest.raises(
        CacheError, match=f"first loss is 0.79.* expected log 2 = {math.log(2):.4f}"
    ):
        same.check()


def test_the_sample_spans_the_data_and_takes_no_pair_twice(same: Setting) -> None:
    pairs = same.pairs
    assert [p.pair_id for p in sample(pairs, 3)] == [pairs[i].pair_id for i in (0, 4, 7)]
    assert len(sample(pairs, 100)) == len(pairs)
    assert sample(pairs, 0) == []


def test_the_tolerance_grows_with_length_and_with_bfloat16() -> None:
    logps, tokens = torch.tensor([-10.0, -1000.0]), torch.tensor([4.0, 400.0])
    exact = tolerance(logps, tokens, ("float32", "float32"))
    mixed = tolerance(logps, tokens, ("float32", "bfloat16"))
    torch.testing.assert_close(exact, torch.tensor([0.002, 0.101]))
    torch.testing.assert_close(mixed, torch.tensor([0.81, 9.0]))
