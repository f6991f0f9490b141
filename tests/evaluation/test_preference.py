"""The report on held-out pairs is the arithmetic that its fields say."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mallowspo_cli.data.tokenize import TokenizedPair
from mallowspo_cli.errors import EvalError
from mallowspo_cli.evaluation.preference import (
    PreferenceReport,
    score_pairs,
    win_indicator,
)
from mallowspo_cli.objectives import Objective, PairScores
from mallowspo_cli.objectives.dpo import DPO
from mallowspo_cli.objectives.mallows import MallowsTheta
from mallowspo_cli.objectives.simpo import SimPO
from mallowspo_cli.packing.layout import Layout, PairBatch
from mallowspo_cli.recipe.choices import DispersionMode
from mallowspo_cli.recipe.schema import DispersionConfig
from mallowspo_cli.reference.fingerprint import Fingerprint
from mallowspo_cli.reference.store import COLUMNS, ReferenceRows, ReferenceStore
from mallowspo_cli.reference.terms import Reference

CPU = torch.device("cpu")
BETA = 0.5
# Policy and reference log-probs, and entropy per token, of six pairs; the third pair is a tie.
CHOSEN = [-10.0, -12.0, -9.0, -20.0, -5.0, -8.0]
REJECTED = [-14.0, -11.0, -9.0, -26.0, -9.0, -7.0]
REFERENCE_CHOSEN = [-11.0, -11.0, -10.0, -19.0, -6.0, -8.0]
REFERENCE_REJECTED = [-12.0, -12.0, -10.0, -22.0, -9.0, -8.0]
ENTROPY = [1.0, 3.0, 0.5, 4.0, 0.25, 2.0]
MARGINS = [
    BETA * (c - rc - r + rr)
    for c, r, rc, rr in zip(CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED, strict=True)
]


def evaluate_preferences(*arguments: Any) -> PreferenceReport:
    """What training logs of held-out pairs."""
    return score_pairs(*arguments).summary()


def token_pairs(prompts: Sequence[int]) -> list[TokenizedPair]:
    """Pairs of different lengths, whose number is their first response token."""
    return [
        TokenizedPair(
            f"pair-{index}",
            np.full(3, prompt, dtype=np.int32),
            np.array([index, *[1] * (index % 4)], dtype=np.int32),
            np.array([index, *[2] * (7 * index % 5)], dtype=np.int32),
        )
        for index, prompt in enumerate(prompts)
    ]


PAIRS = token_pairs(range(6))


def scorer(
    chosen: Sequence[float] = CHOSEN, rejected: Sequence[float] = REJECTED
) -> Callable[[PairBatch], PairScores]:
    """A stand-in for the policy: looks the log-probs of each pair up."""

    def score(batch: PairBatch) -> PairScores:
        numbers = [int(pair_id.removeprefix("pair-")) for pair_id in batch.pair_ids]
        counts = torch.bincount(batch.response_index, minlength=2 * len(numbers))
        return PairScores(
            torch.tensor(chosen)[numbers],
            torch.tensor(rejected)[numbers],
            counts[0::2],
            counts[1::2],
        )

    return score


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    """The reference's side of the six pairs, with the entropies above and scale 1."""
    marks = Fingerprint("w", "none", "c", "t", "float32", "sdpa", "2.6.0", "5.0.0")
    store = ReferenceStore.create(tmp_path, marks, 200)
    ones = torch.ones(6)
    columns = dict.fromkeys(COLUMNS, ones)
    columns |= dict.fromkeys(("chosen_tokens", "rejected_tokens"), 2 * ones.int())
    columns |= dict.fromkeys(
        ("chosen_entropy_sum", "rejected_entropy_sum"), 2 * torch.tensor(ENTROPY)
    )
    columns["chosen_logp"] = torch.tensor(REFERENCE_CHOSEN)
    columns["rejected_logp"] = torch.tensor(REFERENCE_REJECTED)
    store.append([pair.pair_id for pair in PAIRS], ReferenceRows(**columns))
    return Reference(store, DispersionConfig(scale=1.0), [p.pair_id for p in PAIRS], seed=0)


def report(
    reference: Reference | None,
    objective: Objective,
    pairs: Sequence[TokenizedPair] = PAIRS,
    pack_tokens: int = 4096,
    score: Callable[[PairBatch], PairScores] | None = None,
) -> PreferenceReport:
    return evaluate_preferences(
        *(score or scorer(), pairs, objective, reference, pack_tokens, CPU, Layout.shared)
    )


def test_every_field_is_the_arithmetic_by_hand(reference: Reference) -> None:
    found = report(reference, DPO(beta=BETA))
    assert MARGINS == [1.5, -1.0, 0.0, 1.5, 0.5, -0.5]
    assert found.pairs == 6
    # Three won, two lost, one tie.
    assert found.accuracy == pytest.approx(3.5 / 6)
    assert found.margin == pytest.approx(2.0 / 6)
    assert found.loss == pytest.approx(sum(math.log1p(math.exp(-margin)) for margin in MARGINS) / 6)
    assert found.chosen_reward == pytest.approx(BETA * (1 - 1 + 1 - 1 + 1 + 0) / 6)
    assert found.rejected_reward == pytest.approx(BETA * (-2 + 1 + 1 - 4 + 0 + 1) / 6)
    assert found.chosen_logp == pytest.approx(-64 / 6)
    assert found.rejected_logp == pytest.approx(-76 / 6)
    # The second and the fourth; an equal log-prob is not displaced.
    assert found.displacement == pytest.approx(2 / 6)
    assert found.accuracy_low <= found.accuracy <= found.accuracy_high


def test_terciles_go_by_weight_and_a_high_weight_is_a_low_dispersion(
    reference: Reference,
) -> None:
    found = report(reference, MallowsTheta(beta=BETA)).by_dispersion
    assert list(found) == ["low_dispersion", "middle_dispersion", "high_dispersion"]
    members = {"low_dispersion": (4, 2), "middle_dispersion": (0, 5), "high_dispersion": (1, 3)}
    for name, (first, second) in members.items():
        assert found[name]["pairs"] == 2
        assert found[name]["margin"] == pytest.approx((MARGINS[first] + MARGINS[second]) / 2)
        weights = [-math.log(ENTROPY[i] / math.log(200)) for i in (first, second)]
        assert found[name]["weight_mean"] == pytest.approx(sum(weights) / 2)
    assert found["low_dispersion"]["accuracy"] == 0.75
    assert found["middle_dispersion"]["accuracy"] == 0.5
    assert found["high_dispersion"]["accuracy"] == 0.5


def test_rewards_and_terciles_do_not_depend_on_the_weight_in_the_loss(
    reference: Reference,
) -> None:
    plain, weighted = report(reference, DPO(beta=BETA)), report(reference, MallowsTheta(beta=BETA))
    assert (plain.accuracy, plain.margin) == (weighted.accuracy, weighted.margin)
    for tercile, values in plain.by_dispersion.items():
        other = weighted.by_dispersion[tercile]
        assert values.pop("loss") != pytest.approx(other.pop("loss"))
        assert values == other
    assert plain.loss != pytest.approx(weighted.loss)


@pytest.mark.parametrize("pack_tokens", [1, 24, 40, 4096])
def test_the_report_does_not_depend_on_the_packs(reference: Reference, pack_tokens: int) -> None:
    assert report(reference, DPO(beta=BETA), pack_tokens=pack_tokens) == report(
        reference, DPO(beta=BETA)
    )


@pytest.mark.parametrize("processes", [2, 3, 5, 7])
def test_the_report_does_not_depend_on_the_processes(reference: Reference, processes: int) -> None:
    """Each takes as many passes, and the report of all is that of one."""
    arguments = (PAIRS, MallowsTheta(beta=BETA), reference, 12, CPU, Layout.shared)
    alone = evaluate_preferences(scorer(), *arguments)
    passes = [0] * processes

    def counting(process: int) -> Callable[[PairBatch], PairScores]:
        score = scorer()

        def count(batch: PairBatch) -> PairScores:
            passes[process] += 1
            return score(batch)

        return count

    def collected(process: int) -> list[list[Any]]:
        """What a process hands over."""
        given: list[list[Any]] = []

        def keep(values: list[Any]) -> list[Any]:
            given.append(values)
            if len(given) == 2:
                raise InterruptedError
            return values

        with pytest.raises(InterruptedError):
            evaluate_preferences(counting(process), *arguments, (process, processes), keep)
        return given

    parts = [collected(process) for process in range(processes)]
    assert len(set(passes)) == 1

    calls = iter(range(2))

    def all_of_them(_: list[Any]) -> list[Any]:
        call = next(calls)
        return [value for part in parts for value in part[call]]

    assert evaluate_preferences(scorer(), *arguments, (0, processes), all_of_them) == alone


def test_the_means_do_not_depend_on_the_order_of_the_pairs(reference: Reference) -> None:
    forwards, backwards = (
        report(reference, DPO(beta=BETA), pairs).as_dict() for pairs in (PAIRS, PAIRS[::-1])
    )
    terciles, others = forwards.pop("by_dispersion"), backwards.pop("by_dispersion")
    assert forwards == pytest.approx(backwards)
    assert terciles.keys() == others.keys()
    for name, values in terciles.items():
        assert values == pytest.approx(others[name])


def test_without_a_reference_there_is_no_displacement_and_no_tercile() -> None:
    found = report(None, SimPO())
    assert found.displacement is None
    assert found.by_dispersion == {}
    assert found.metrics()["eval/displacement"] is None


@pytest.mark.parametrize("mode", [DispersionMode.constant, DispersionMode.shuffled])
def test_controls_are_cut_into_the_same_terciles(
    reference: Reference, mode: DispersionMode
) -> None:
    ids = [p.pair_id for p in PAIRS]
    config = DispersionConfig(mode=mode)
    control = Reference(reference.store, config, ids, seed=0, scale=reference.scale)
    expected = report(reference, DPO(beta=BETA)).by_dispersion
    assert report(control, DPO(beta=BETA)).by_dispersion == expected


def test_fewer_pairs_than_terciles_still_make_a_report(reference: Reference) -> None:
    found = report(reference, DPO(beta=BETA), PAIRS[:2])
    assert sum(values["pairs"] for values in found.by_dispersion.values()) == 2
    assert found.pairs == 2


def test_the_interval_resamples_prompts_and_not_pairs() -> None:
    # Within a prompt all pairs win or all lose: eight answers are worth one.
    wins = [prompt % 2 == 0 for prompt in range(10) for _ in range(8)]
    score = scorer([0.0] * 80, [-1.0 if won else 1.0 for won in wins])
    together = report(None, SimPO(), token_pairs([i // 8 for i in range(80)]), score=score)
    apart = report(None, SimPO(), token_pairs(range(80)), score=score)
    assert together.accuracy == apart.accuracy
    widths = [r.accuracy_high - r.accuracy_low for r in (together, apart)]
    assert widths[0] > 2 * widths[1]


def test_metric_names_are_the_fields_and_lie_under_eval(reference: Reference) -> None:
    found = report(reference, DPO(beta=BETA))
    metrics = found.metrics()
    assert all(name.startswith("eval/") for name in metrics)
    assert metrics["eval/rewards/accuracies"] == found.accuracy
    assert metrics["eval/rewards/accuracies_low"] == found.accuracy_low
    assert metrics["eval/rewards/accuracies_high"] == found.accuracy_high
    assert metrics["eval/rewards/margins"] == found.margin
    assert metrics["eval/rewards/chosen"] == found.chosen_reward
    assert metrics["eval/rewards/rejected"] == found.rejected_reward
    assert metrics["eval/logps/chosen"] == found.chosen_logp
    assert metrics["eval/logps/rejected"] == found.rejected_logp
    assert metrics["eval/loss"] == found.loss
    assert metrics["eval/displacement"] == found.displacement
    low = found.by_dispersion["low_dispersion"]
    assert metrics["eval/low_dispersion/accuracy"] == low["accuracy"]
    assert metrics["eval/low_dispersion/margin"] == low["margin"]


def test_the_table_of_pairs_holds_what_the_report_is_the_mean_of(
    reference: Reference, tmp_path: Path
) -> None:
    pairs = token_pairs([0, 0, 1, 2, 3, 4])
    scored = score_pairs(scorer(), pairs, DPO(beta=BETA), reference, 24, CPU, Layout.shared)
    scored.write(tmp_path / "pairs.parquet")
    table = pq.read_table(tmp_path / "pairs.parquet").to_pydict()
    assert list(table) == ["pair_id", "prompt", "win", "margin", "weight"]
    assert table["pair_id"] == [f"pair-{i}" for i in range(6)]
    assert table["win"] == [1, 0, 0.5, 1, 1, 0]
    assert table["margin"] == MARGINS
    assert table["weight"] == pytest.approx([-math.log(e / math.log(200)) for e in ENTROPY])
    assert table["prompt"][0] == table["prompt"][1]
    assert len(set(table["prompt"])) == 5
    found = report(reference, DPO(beta=BETA), pairs)
    assert scored.summary() == found
    assert np.mean(table["win"]) == pytest.approx(found.accuracy)


def test_where_all_pairs_share_a_prompt_pairs_are_resampled(
    reference: Reference, tmp_path: Path
) -> None:
    shared = score_pairs(
        *(scorer(), token_pairs([0] * 6), DPO(beta=BETA), reference, 4096, CPU, Layout.shared)
    )
    apart = score_pairs(scorer(), PAIRS, DPO(beta=BETA), reference, 4096, CPU, Layout.shared)
    found = shared.summary()
    assert found.accuracy_low < found.accuracy < found.accuracy_high
    # Six units of a value each, as where each pair has a prompt of its own.
    widths = [s.accuracy_high - s.accuracy_low for s in (found, apart.summary())]
    assert widths[0] == pytest.approx(widths[1], abs=0.1)
    shared.write(tmp_path / "pairs.parquet")
    table = pq.read_table(tmp_path / "pairs.parquet").to_pydict()
    assert table["prompt"] == table["pair_id"]


def test_the_table_of_pairs_has_no_weights_without_a_reference(tmp_path: Path) -> None:
    scored = score_pairs(scorer(), PAIRS, SimPO(), None, 4096, CPU, Layout.shared)
    scored.write(tmp_path / "pairs.parquet")
    assert pq.read_table(tmp_path / "pairs.parquet")["weight"].to_pylist() == [None] * 6


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_log_probs_that_are_not_finite_are_no_losses(value: float) -> None:
    chosen = [value, -12.0, value, value, -5.0, value]
    with pytest.raises(
        EvalError, match=r"model's log-probs .* 4 of 6 .* pair-0, pair-2, pair-3; expected"
    ):
        report(None, SimPO(), score=scorer(chosen))


def test_rewards_against_a_broken_reference_are_told(reference: Reference) -> None:
    class Broken(DPO):
        def __call__(self, *arguments: Any) -> Any:
            found = super().__call__(*arguments)
            found.rejected_rewards[:1] = math.nan
            return found

    with pytest.raises(EvalError, match=r"rewards against the reference .* 1 of 6 .*pair-"):
        report(reference, Broken(beta=BETA))


def test_a_win_counts_one_a_tie_half_a_loss_nothing() -> None:
    assert win_indicator(torch.tensor([2.0, 0.0, -1e-30, 1e-30])).tolist() == [1, 0.5, 0, 1]
