"""The reference pass: right numbers, whatever the packs and the order, and nothing done twice."""

import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mallowspo_cli.data.tokenize import TokenizedPair
from mallowspo_cli.errors import CacheError, ModelError
from mallowspo_cli.files import cache_directory
from mallowspo_cli.packing.layout import Layout, PairBatch
from mallowspo_cli.recipe.choices import Dtype, Precision
from mallowspo_cli.recipe.schema import ModelConfig, ReferenceConfig
from mallowspo_cli.reference import build
from mallowspo_cli.reference.claims import Claims
from mallowspo_cli.reference.fingerprint import fingerprint
from mallowspo_cli.reference.store import ReferenceRows, ReferenceStore
from mallowspo_cli.scoring import PairScorer

CPU = torch.device("cpu")
CONFIG = ModelConfig(source="random:llama")


def opened(
    directory: Path,
    place: Path,
    config: ModelConfig = CONFIG,
    precision: Precision = Precision.fp32,
) -> ReferenceStore:
    return build.open_store(directory, config, ReferenceConfig(store=str(place)), precision)


def complete(
    store: ReferenceStore,
    pairs: Sequence[TokenizedPair],
    directory: Path,
    pack_tokens: int = 4096,
    config: ModelConfig = CONFIG,
    precision: Precision = Precision.fp32,
) -> int:
    return build.complete_store(store, pairs, directory, config, precision, pack_tokens, CPU)


def ids(pairs: Sequence[TokenizedPair]) -> list[str]:
    return [pair.pair_id for pair in pairs]


def assert_close(found: ReferenceRows, expected: ReferenceRows, rtol: float) -> None:
    for field in fields(ReferenceRows):
        torch.testing.assert_close(
            getattr(found, field.name), getattr(expected, field.name), rtol=rtol, atol=0
        )


@pytest.fixture(scope="module")
def expected(tiny_directory: Path, tokenized: list[TokenizedPair]) -> ReferenceRows:
    """What plain transformers gives with all logits, in float64, one response at a time."""
    model = AutoModelForCausalLM.from_pretrained(tiny_directory, dtype=torch.float64).eval()
    columns: dict[str, list[float]] = {field.name: [] for field in fields(ReferenceRows)}
    for pair in tokenized:
        for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            sequence = torch.tensor([[*pair.prompt.tolist(), *response.tolist()]])
            with torch.no_grad():
                logits = model(sequence).logits[0, len(pair.prompt) - 1 : -1]
            logps = logits.log_softmax(dim=1)
            entropies = -(logps.exp() * logps).sum(dim=1)
            targets = torch.tensor(response.tolist())[:, None]
            columns[f"{side}_logp"].append(logps.gather(1, targets).sum().item())
            columns[f"{side}_tokens"].append(len(response))
            columns[f"{side}_entropy_sum"].append(entropies.sum().item())
            columns[f"{side}_first_entropy"].append(entropies[0].item())
    dtypes = {name: torch.int64 if "tokens" in name else torch.float32 for name in columns}
    return ReferenceRows(**{n: torch.tensor(v, dtype=dtypes[n]) for n, v in columns.items()})


def test_rows_are_those_of_a_plain_forward_pass_with_all_logits(
    tiny_directory: Path,
    tokenized: list[TokenizedPair],
    expected: ReferenceRows,
    tmp_path: Path,
) -> None:
    store = opened(tiny_directory, tmp_path)
    assert complete(store, tokenized, tiny_directory) == len(tokenized)
    assert_close(store.lookup(ids(tokenized)), expected, rtol=2e-6)


def test_the_vocabulary_is_the_width_of_the_logits(tiny_directory: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_directory)
    assert opened(tiny_directory, tmp_path).vocab_size == PairScorer(model).vocab_size


@pytest.mark.parametrize("pack_tokens", [1, 100, 300])
@pytest.mark.parametrize("backwards", [False, True])
def test_rows_do_not_depend_on_packs_or_order(
    tiny_directory: Path,
    tokenized: list[TokenizedPair],
    tmp_path: Path,
    pack_tokens: int,
    backwards: bool,
) -> None:
    first = opened(tiny_directory, tmp_path / "first")
    complete(first, tokenized, tiny_directory)
    second = opened(tiny_directory, tmp_path / "second")
    complete(second, tokenized[::-1] if backwards else tokenized, tiny_directory, pack_tokens)
    assert_close(second.lookup(ids(tokenized)), first.lookup(ids(tokenized)), rtol=1e-6)


def test_only_what_is_missing_is_scored(
    tiny_directory: Path,
    tokenized: list[TokenizedPair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored: list[str] = []
    honest = build.score_rows

    def counting(scorer: PairScorer, batch: PairBatch, autocast: bool) -> ReferenceRows:
        scored.extend(batch.pair_ids)
        return honest(scorer, batch, autocast)

    monkeypatch.setattr(build, "score_rows", counting)
    assert complete(opened(tiny_directory, tmp_path), tokenized[:5], tiny_directory) == 5
    twice = [*tokenized, *tokenized[3:]]
    assert complete(opened(tiny_directory, tmp_path), twice, tiny_directory) == 7
    assert sorted(scored) == sorted(ids(tokenized))


def test_a_complete_store_needs_no_model(
    tiny_directory: Path,
    tokenized: list[TokenizedPair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = opened(tiny_directory, tmp_path)
    complete(store, tokenized, tiny_directory)
    monkeypatch.setattr(build, "load_model", None)
    assert complete(store, tokenized, tiny_directory) == 0


def test_a_killed_pass_loses_nothing_that_was_written_and_the_next_scores_only_the_rest(
    tiny_directory: Path,
    tokenized: list[TokenizedPair],
    expected: ReferenceRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "SECONDS_PER_SHARD", 0)
    honest, scored = build.score_rows, []

    def dying(scorer: PairScorer, batch: PairBatch, autocast: bool) -> ReferenceRows:
        if len(scored) == 5:
            raise KeyboardInterrupt
        scored.extend(batch.pair_ids)
        return honest(scorer, batch, autocast)

    with monkeypatch.context() as patch:
        patch.setattr(build, "score_rows", dying)
        with pytest.raises(KeyboardInterrupt):
            complete(opened(tiny_directory, tmp_path), tokenized, tiny_directory, pack_tokens=1)
    reopened = opened(tiny_directory, tmp_path)
    left = reopened.missing(ids(tokenized))
    assert sorted(left) == sorted(set(ids(tokenized)) - set(scored))
    assert len(left) == 7
    assert complete(reopened, tokenized, tiny_directory) == 7
    again = opened(tiny_directory, tmp_path)
    assert_close(again.lookup(ids(tokenized)), expected, rtol=2e-6)


def test_the_rows_of_a_block_lie_in_one_shard(
    tiny_directory: Path, tokenized: list[TokenizedPair], tmp_path: Path
) -> None:
    complete(opened(tiny_directory, tmp_path), tokenized, tiny_directory, pack_tokens=1)
    assert len(list(tmp_path.glob("rows-*.parquet"))) == 12 / build.PACKS_PER_BLOCK[0]


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(Dtype.float32, Precision.bf16), (Dtype.bfloat16, Precision.bf16)],
)
def test_bfloat16_is_near_float32_but_not_it_and_sums_stay_float32(
    tiny_directory: Path,
    tokenized: list[TokenizedPair],
    expected: ReferenceRows,
    tmp_path: Path,
    dtype: Dtype,
    precision: Precision,
) -> None:
    config = ModelConfig(source="random:llama", dtype=dtype)
    store = opened(tiny_directory, tmp_path, config, precision)
    complete(store, tokenized, tiny_directory, config=config, precision=precision)
    found = store.lookup(ids(tokenized)).chosen_logp
    torch.testing.assert_close(found, expected.chosen_logp, rtol=3e-2, atol=0)
    assert not torch.equal(found, expected.chosen_logp)
    assert not torch.equal(found, found.bfloat16().float())


def test_the_default_store_is_named_by_its_fingerprint_in_the_users_cache(
    tiny_directory: Path, tokenized: list[TokenizedPair]
) -> None:
    store = build.open_store(tiny_directory, CONFIG, ReferenceConfig(), Precision.fp32)
    key = fingerprint(tiny_directory, CONFIG, Precision.fp32).key()
    assert store.path.parent == cache_directory() / "reference"
    assert key in store.path.name
    complete(store, tokenized[:1], tiny_directory)
    other = build.open_store(tiny_directory, CONFIG, ReferenceConfig(), Precision.bf16)
    assert other.path != store.path
    again = build.open_store(tiny_directory, CONFIG, ReferenceConfig(), Precision.fp32)
    assert again.missing(ids(tokenized[:1])) == []


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_a_pass_that_was_stopped_gives_the_very_numbers_of_one_that_was_not(
    tiny_directory: Path,
    tokenized: list[TokenizedPair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: Precision,
) -> None:
    monkeypatch.setattr(build, "SECONDS_PER_SHARD", 0)
    whole = opened(tiny_directory, tmp_path / "whole", precision=precision)
    complete(whole, tokenized, tiny_directory, 200, precision=precision)
    honest, calls = build.score_rows, []

    def dying(scorer: PairScorer, batch: PairBatch, autocast: bool) -> ReferenceRows:
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(scorer, batch, autocast)

    store = opened(tiny_directory, tmp_path / "parts", precision=precision)
    monkeypatch.setattr(build, "score_rows", dying)
    with pytest.raises(KeyboardInterrupt):
        complete(store, tokenized, tiny_directory, 200, precision=precision)
    monkeypatch.setattr(build, "score_rows", honest)
    store = opened(tiny_directory, tmp_path / "parts", precision=precision)
    assert 0 < len(store) < len(tokenized)
    complete(store, tokenized, tiny_directory, 200, precision=precision)
    for name in ReferenceRows.__slots__:
        one, other = (getattr(s.lookup(ids(tokenized)), name) for s in (whole, store))
        assert torch.equal(one, other), name


def test_out_of_memory_halves_the_packs_and_says_so(
    tiny_directory: Path,
    tokenized: list[TokenizedPair],
    expected: ReferenceRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    honest, sizes = build.score_rows, []

    def small(scorer: PairScorer, batch: PairBatch, autocast: bool) -> ReferenceRows:
        if batch.input_ids.numel() > 400:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(batch.input_ids.numel())
        return honest(scorer, batch, autocast)

    monkeypatch.setattr(build, "score_rows", small)
    store = opened(tiny_directory, tmp_path)
    with caplog.at_level(logging.INFO, "mallowspo"):
        assert complete(store, tokenized, tiny_directory) == len(tokenized)
    assert_close(store.lookup(ids(tokenized)), expected, rtol=2e-6)
    assert max(sizes) <= 400
    assert "out of memory: reference.pack_tokens is" in caplog.text


def test_a_pair_that_never_fits_is_refused_with_what_to_lower(
    tiny_directory: Path,
    tokenized: list[TokenizedPair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> ReferenceRows:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(build, "score_rows", never)
    with pytest.raises(ModelError, match=r"out of memory on one pair .* dataset\.max_length"):
        complete(opened(tiny_directory, tmp_path), tokenized, tiny_directory)


def test_other_errors_of_the_model_are_not_taken_for_memory(
    tiny_directory: Path,
    tokenized: list[TokenizedPair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> ReferenceRows:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(build, "score_rows", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        complete(opened(tiny_directory, tmp_path), tokenized, tiny_directory)


def test_a_block_that_another_process_holds_is_waited_for_and_not_scored_again(
    tiny_directory: Path,
    tokenized: list[TokenizedPair],
    expected: ReferenceRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, other = (opened(tiny_directory, tmp_path) for _ in range(2))
    first, *_ = build._blocks(tokenized, 1, Layout.shared)
    row_of = {pair: index for index, pair in enumerate(ids(tokenized))}
    theirs = [row_of[pair] for pair in first.pair_ids]
    slept = []

    def others_work(seconds: float) -> None:
        slept.append(seconds)
        rows = {name: getattr(expected, name)[theirs] for name in ReferenceRows.__slots__}
        other.append(first.pair_ids, ReferenceRows(**rows))

    monkeypatch.setattr(build.time, "sleep", others_work)
    with Claims(store.path / "claims").held(first.name):
        scored = complete(store, tokenized, tiny_directory, pack_tokens=1)
    assert len(slept) == 1
    assert scored == len(tokenized) - len(theirs)
    assert_close(store.lookup(ids(tokenized)), expected, rtol=2e-6)


@pytest.mark.parametrize("layout", Layout)
def test_every_pair_is_in_one_block(tokenized: list[TokenizedPair], layout: Layout) -> None:
    blocks = list(build._blocks(tokenized, 100, layout))
    assert len({block.name for block in blocks}) == len(blocks) > 1
    assert sorted(p for block in blocks for p in block.pair_ids) == sorted(ids(tokenized))


def test_a_store_is_not_made_by_looking_at_it(tiny_directory: Path, tmp_path: Path) -> None:
    settings = ReferenceConfig(store=str(tmp_path / "none"))
    with pytest.raises(CacheError, match=r"no reference store at .*none\. Build it: mallowspo x"):
        build.open_store(tiny_directory, CONFIG, settings, Precision.fp32, "mallowspo x", False)
    assert not (tmp_path / "none").exists()


def test_a_store_of_another_set_up_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    opened(tiny_directory, tmp_path)
    with pytest.raises(CacheError, match="compute: float32, now bfloat16 autocast over float32"):
        opened(tiny_directory, tmp_path, precision=Precision.bf16)


def test_a_model_that_does_not_fit_on_the_device_stays_in_host_memory(
    tiny_directory: Path,
    tokenized: list[TokenizedPair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected_store = opened(tiny_directory, tmp_path / "whole")
    complete(expected_store, tokenized, tiny_directory)
    honest, moves = PairScorer.to, []

    def full(self: PairScorer, device: object) -> PairScorer:
        moves.append(device)
        if len(moves) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return honest(self, device)

    monkeypatch.setattr(PairScorer, "to", full)
    store = opened(tiny_directory, tmp_path / "offloaded")
    with caplog.at_level(logging.INFO, "mallowspo"):
        assert complete(store, tokenized, tiny_directory) == len(tokenized)
    assert "does not fit" in caplog.text
    assert moves[1] == "cpu"
    assert_close(store.lookup(ids(tokenized)), expected_store.lookup(ids(tokenized)), rtol=0)
