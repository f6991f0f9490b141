"""The reference pass: score what the store lacks with the frozen model."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from mallowspo_cli.data.tokenize import TokenizedPair
from mallowspo_cli.distributed import log, progress
from mallowspo_cli.errors import ModelError
from mallowspo_cli.files import cache_directory
from mallowspo_cli.models.load import TORCH_DTYPES, load_model
from mallowspo_cli.objectives.base import PairEntropies, PairScores
from mallowspo_cli.packing.layout import PairBatch, collate
from mallowspo_cli.packing.packer import pack, padded_length
from mallowspo_cli.recipe.schema import Dtype, ModelConfig, Precision, ReferenceConfig
from mallowspo_cli.reference.fingerprint import fingerprint
from mallowspo_cli.reference.store import FORMAT, ReferenceRows, ReferenceStore
from mallowspo_cli.scoring import PairScorer

SECONDS_PER_SHARD = 20.0
"""How much work a killed pass can lose."""


def open_store(
    directory: Path, model: ModelConfig, reference: ReferenceConfig, precision: Precision
) -> ReferenceStore:
    """The store of a recipe's reference model, created when it is not there.

    Raises:
        CacheError: `reference.store` names a store that another model or set-up built.
    """
    expected = fingerprint(directory, model, precision)
    default = cache_directory() / "reference" / f"v{FORMAT}-{expected.key()}"
    path = Path(reference.store).expanduser() if reference.store else default
    if (path / "manifest.json").is_file():
        return ReferenceStore.open(path, expected)
    return ReferenceStore.create(path, expected, _vocab_size(directory))


def complete_store(
    store: ReferenceStore,
    pairs: Sequence[TokenizedPair],
    directory: Path,
    model: ModelConfig,
    precision: Precision,
    pack_tokens: int,
    device: torch.device,
) -> int:
    """Score the pairs that the store lacks; returns how many those were.

    The model is read from `directory`, whose digest is the store's, and never from a run.

    Raises:
        ModelError: the model does not load, or gives scores that are not finite.
    """
    by_id = {pair.pair_id: pair for pair in pairs}
    wanted = [by_id[p] for p in store.missing(list(by_id))]
    if not wanted:
        return 0
    log.info("reference pass: %d of %d pairs are new", len(wanted), len(by_id))
    scorer = PairScorer(load_model(directory, TORCH_DTYPES[model.dtype], model.attention))
    scorer.eval().requires_grad_(False).to(device)
    autocast = model.dtype is Dtype.float32 and precision is Precision.bf16
    (packs,) = pack([padded_length(p) for p in wanted], pack_tokens)
    pending: list[tuple[list[str], ReferenceRows]] = []
    last_write = time.monotonic()
    with progress("reference pass", len(wanted), "pairs") as advance:
        for members in packs:
            batch = collate([wanted[i] for i in members]).to(device)
            rows = score_rows(scorer, batch, autocast)
            _check_finite(rows, batch.pair_ids, directory)
            pending.append((batch.pair_ids, rows))
            advance(len(members))
            if time.monotonic() - last_write > SECONDS_PER_SHARD:
                _flush(store, pending)
                last_write = time.monotonic()
    _flush(store, pending)
    return len(wanted)


def _check_finite(rows: ReferenceRows, pair_ids: list[str], directory: Path) -> None:
    """A row that is not finite would be stored for good, and stop every later run."""
    sums = (
        rows.chosen_logp,
        rows.rejected_logp,
        rows.chosen_entropy_sum,
        rows.rejected_entropy_sum,
    )
    broken = (~torch.stack(sums).isfinite()).any(dim=0).nonzero().flatten().tolist()
    if broken:
        raise ModelError(
            f"the reference model in {directory} gives log-probs that are not finite (pair "
            f"{pair_ids[broken[0]]}). Nothing of this pack was stored. Are its weights whole? "
            "Otherwise try train.precision=fp32."
        )


@torch.inference_mode()
def score_rows(scorer: PairScorer, batch: PairBatch, autocast: bool) -> ReferenceRows:
    """One forward pass with entropies, as rows of the store."""
    device_type = batch.input_ids.device.type
    with torch.autocast(device_type, torch.bfloat16) if autocast else nullcontext():
        scores, entropies = scorer(batch, entropy=True)
    return _rows(scores, entropies)


def _rows(scores: PairScores, entropies: PairEntropies) -> ReferenceRows:
    def stored(value: Tensor) -> Tensor:
        return value.float().cpu()

    return ReferenceRows(
        chosen_logp=stored(scores.chosen_logps),
        rejected_logp=stored(scores.rejected_logps),
        chosen_tokens=scores.chosen_tokens.int().cpu(),
        rejected_tokens=scores.rejected_tokens.int().cpu(),
        chosen_entropy_sum=stored(entropies.chosen_entropy),
        rejected_entropy_sum=stored(entropies.rejected_entropy),
        chosen_first_entropy=stored(entropies.chosen_first_entropy),
        rejected_first_entropy=stored(entropies.rejected_first_entropy),
    )


def _flush(store: ReferenceStore, pending: list[tuple[list[str], ReferenceRows]]) -> None:
    if not pending:
        return
    ids = [pair for pair_ids, _ in pending for pair in pair_ids]
    joined = {
        name: torch.cat([getattr(rows, name) for _, rows in pending])
        for name in ReferenceRows.__slots__
    }
    store.append(ids, ReferenceRows(**joined))
    pending.clear()


def _vocab_size(directory: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(directory).get_text_config().vocab_size)
