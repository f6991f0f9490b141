"""From stored sums to the weights w(x) and theta(x) = w / 2 of each split."""

import math
from pathlib import Path

import pytest
import torch

from mallowspo_cli.errors import CacheError, DataError
from mallowspo_cli.recipe.choices import DispersionMode
from mallowspo_cli.recipe.schema import DispersionConfig
from mallowspo_cli.reference.fingerprint import Fingerprint
from mallowspo_cli.reference.store import ReferenceRows, ReferenceStore
from mallowspo_cli.reference.terms import Reference

CPU = torch.device("cpu")
VOCAB_SIZE = 50
TRAIN = [f"train-{index}" for index in range(40)]
HELD_OUT = [f"eval-{index}" for index in range(15)]


def fill(store: ReferenceStore, pair_ids: list[str], per_token: torch.Tensor) -> None:
    """Rows whose both responses have `per_token` nats, and lengths from 1 to 9."""
    count = len(pair_ids)
    tokens = torch.arange(count, dtype=torch.int32) % 9 + 1
    logps = -torch.arange(count, dtype=torch.float32) - 1
    sums = per_token * tokens
    store.append(
        pair_ids,
        ReferenceRows(
            logps, 2 * logps, tokens, tokens.flip(0), sums, per_token * tokens.flip(0), sums, sums
        ),
    )


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    """A store of a training split, and of a held-out split of higher entropy."""
    built = Fingerprint("w", "none", "c", "t", "float32", "sdpa", "2.6", "5.0")
    store = ReferenceStore.create(tmp_path / "store", built, VOCAB_SIZE)
    generator = torch.Generator().manual_seed(0)
    fill(store, TRAIN, 0.1 + 2 * torch.rand(len(TRAIN), generator=generator))
    fill(store, HELD_OUT, 2.5 + torch.rand(len(HELD_OUT), generator=generator))
    return store


def reference(
    store: ReferenceStore, scale: float | str = "auto", mode: str = "estimated", **kwargs
):
    config = DispersionConfig(mode=DispersionMode(mode), scale=scale)
    return Reference(store, config, TRAIN, seed=3, **kwargs)


def raw(store: ReferenceStore, pair_ids: list[str]) -> torch.Tensor:
    """-ln of the mean token entropy as a share of ln V, by hand."""
    rows = store.lookup(pair_ids)
    chosen = rows.chosen_entropy_sum.double() / rows.chosen_tokens
    rejected = rows.rejected_entropy_sum.double() / rows.rejected_tokens
    return -((chosen + rejected) / 2 / math.log(VOCAB_SIZE)).log()


def test_auto_gives_the_training_split_a_mean_weight_of_one(store: ReferenceStore) -> None:
    terms = reference(store)
    assert terms.weights(TRAIN).double().mean().item() == pytest.approx(1, abs=1e-6)
    assert terms.summary.weight_mean == pytest.approx(1, abs=1e-6)
    assert terms.scale == pytest.approx(1 / raw(store, TRAIN).mean().item())


@pytest.mark.parametrize("scale", [1, 0.29])
def test_a_number_is_used_as_it_is(store: ReferenceStore, scale: float) -> None:
    terms = reference(store, scale)
    assert terms.scale == scale
    expected = (scale * raw(store, TRAIN)).float()
    torch.testing.assert_close(terms.weights(TRAIN), expected, rtol=1e-5, atol=1e-6)


def test_a_given_scale_is_used_again_instead_of_fitting(store: ReferenceStore) -> None:
    first = reference(store)
    again = Reference(store, first.config, HELD_OUT, seed=3, scale=first.scale)
    assert again.scale == first.scale
    first.add(HELD_OUT)
    assert torch.equal(again.weights(HELD_OUT), first.weights(HELD_OUT))


def test_held_out_pairs_are_weighed_with_the_scale_of_the_training_split(
    store: ReferenceStore,
) -> None:
    terms = reference(store)
    before = terms.weights(TRAIN)
    added = terms.add(HELD_OUT)
    expected = (terms.scale * raw(store, HELD_OUT)).float()
    torch.testing.assert_close(added, expected, rtol=1e-5, atol=1e-6)
    # They are more dispersed than the training pairs: a scale of their own would hide it.
    assert added.mean() < 0.8
    assert torch.equal(terms.weights(TRAIN), before)
    assert torch.equal(terms.weights(HELD_OUT), added)


def test_theta_is_half_the_weight_and_scores_are_the_stored_ones(store: ReferenceStore) -> None:
    terms = reference(store)
    order = [TRAIN[index] for index in (7, 0, 31)]
    found, rows = terms(order, CPU), store.lookup(order)
    assert torch.equal(found.neg_log_phi, terms.weights(order) / 2)
    assert torch.equal(found.chosen_logps, rows.chosen_logp)
    assert torch.equal(found.rejected_logps, rows.rejected_logp)
    assert torch.equal(found.chosen_tokens, rows.chosen_tokens)
    assert torch.equal(found.rejected_tokens, rows.rejected_tokens)
    assert found.neg_log_phi.dtype == torch.float32


def test_low_entropy_is_a_large_weight(store: ReferenceStore) -> None:
    weights = reference(store).weights(TRAIN)
    assert torch.equal(weights.argsort(), raw(store, TRAIN).argsort())


def test_constant_weighs_every_pair_one(store: ReferenceStore) -> None:
    terms = reference(store, mode="constant")
    assert terms.weights(TRAIN).tolist() == [1.0] * len(TRAIN)
    assert terms.add(HELD_OUT).tolist() == [1.0] * len(HELD_OUT)
    assert terms.summary.weight_min == terms.summary.weight_max == 1


def test_shuffled_gives_the_same_weights_to_other_pairs_of_the_split(
    store: ReferenceStore,
) -> None:
    terms, estimated = reference(store, mode="shuffled"), reference(store)
    for split in (TRAIN, HELD_OUT):
        terms.add(split)
        estimated.add(split)
        found, expected = terms.weights(split), estimated.weights(split)
        assert torch.equal(found.sort().values, expected.sort().values)
        assert (found != expected).sum() > len(split) / 2
    assert terms.scale == estimated.scale


def test_shuffling_depends_on_the_seed_alone(store: ReferenceStore) -> None:
    config = DispersionConfig(mode=DispersionMode.shuffled)
    torch.manual_seed(1)
    first = Reference(store, config, TRAIN, seed=3).weights(TRAIN)
    torch.manual_seed(2)
    assert torch.equal(Reference(store, config, TRAIN, seed=3).weights(TRAIN), first)
    assert not torch.equal(Reference(store, config, TRAIN, seed=4).weights(TRAIN), first)


def test_inverse_weights_have_mean_one_and_turn_the_order_of_the_estimates(
    store: ReferenceStore,
) -> None:
    terms, estimated = reference(store, mode="inverse"), reference(store)
    assert terms.weights(TRAIN).mean().item() == pytest.approx(1, rel=1e-6)
    for split in (TRAIN, HELD_OUT):
        terms.add(split)
        estimated.add(split)
        turned = terms.weights(split) * estimated.weights(split)
        torch.testing.assert_close(turned, turned[:1].expand_as(turned))
        # Strata and orders go by the estimate in every mode.
        assert torch.equal(terms.estimates(split).argsort(), estimated.estimates(split).argsort())


def test_an_evaluation_weighs_inversely_as_the_run_did(store: ReferenceStore) -> None:
    run = reference(store, mode="inverse")
    config = DispersionConfig(mode=DispersionMode.inverse)
    again = Reference(store, config, HELD_OUT, seed=0, scale=run.scale)
    assert torch.equal(again.weights(HELD_OUT), run.add(HELD_OUT))


def test_clamped_and_empty_pairs_are_counted(store: ReferenceStore) -> None:
    fill(store, ["certain", "also-certain"], torch.zeros(2))
    fill(store, ["clueless"], torch.full((1,), 2 * math.log(VOCAB_SIZE)))
    empty = torch.zeros(1, dtype=torch.int32)
    one = torch.ones(1)
    store.append(["empty"], ReferenceRows(one, one, empty, empty, one, one, one, one))
    ids = [*TRAIN, "certain", "also-certain", "clueless", "empty"]
    terms = Reference(store, DispersionConfig(), ids, seed=0)
    assert (terms.summary.clamped, terms.summary.empty) == (3, 1)
    assert terms.summary.pairs == len(ids)
    assert terms.weights(["empty"]).tolist() == [1.0]
    assert bool(torch.isfinite(terms.weights(ids)).all())
    assert terms.weights(["clueless"]).item() == pytest.approx(0, abs=1e-5)
    inverse = Reference(store, DispersionConfig(mode=DispersionMode.inverse), ids, seed=0)
    assert inverse.weights(["empty"]).tolist() == [1.0]
    assert bool(torch.isfinite(inverse.weights(ids)).all())
    assert reference(store).summary.clamped == reference(store).summary.empty == 0


def test_the_summary_says_what_was_done(store: ReferenceStore) -> None:
    terms = reference(store, 0.29, mode="shuffled")
    weights = terms.weights(TRAIN)
    summary = terms.summary
    assert (summary.mode, summary.scale, summary.vocab_size) == ("shuffled", 0.29, VOCAB_SIZE)
    assert summary.weight_min == weights.min().item()
    assert summary.weight_max == weights.max().item()


def test_pairs_without_a_response_give_no_scale(store: ReferenceStore) -> None:
    empty, one = torch.zeros(1, dtype=torch.int32), torch.ones(1)
    store.append(["empty"], ReferenceRows(one, one, empty, empty, one, one, one, one))
    with pytest.raises(DataError, match="no dispersion scale"):
        Reference(store, DispersionConfig(), ["empty"], seed=0)


def test_a_pair_that_the_store_lacks_is_named(store: ReferenceStore) -> None:
    with pytest.raises(CacheError, match="nobody"):
        Reference(store, DispersionConfig(), [*TRAIN, "nobody"], seed=0)
