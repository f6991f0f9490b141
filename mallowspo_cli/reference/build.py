"""The reference pass: score what the store lacks with the frozen model.

Any number of processes may run it on one store at the same time, on one machine or on several that
share the directory. Pairs lie in blocks that depend on the data alone; a process claims a block,
scores it, and looks for the next.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import cpu_offload
from torch import Tensor

from mallowspo_cli.data.table import TokenizedPair, TokenizedPairs
from mallowspo_cli.distributed import log, progress, rank, world_size
from mallowspo_cli.errors import ModelError
from mallowspo_cli.files import cache_directory
from mallowspo_cli.models.attention import resolve_attention
from mallowspo_cli.models.load import TORCH_DTYPES, load_model
from mallowspo_cli.objectives.base import PairEntropies, PairScores
from mallowspo_cli.packing.layout import Layout, PairBatch, collate
from mallowspo_cli.packing.packer import lengths_of, pack, size_of
from mallowspo_cli.recipe.choices import Dtype, Precision
from mallowspo_cli.recipe.schema import ModelConfig, ReferenceConfig
from mallowspo_cli.reference.claims import Claims
from mallowspo_cli.reference.fingerprint import fingerprint
from mallowspo_cli.reference.store import FILL, FORMAT, ReferenceRows, ReferenceStore
from mallowspo_cli.scoring import PairScorer

SECONDS_PER_SHARD = 20.0
"""How much work a killed pass can lose."""
BLOCKS = 64
"""About how many blocks a pass has."""
PACKS_PER_BLOCK = (4, 32)
"""Least and most packs of a block."""
LONGEST_PAUSE = 8.0
"""Seconds until a process that found no work looks again."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def store_path(directory: Path, model: ModelConfig, precision: Precision) -> Path:
    """Where a reference model has its store unless `reference.store` says otherwise."""
    key = fingerprint(directory, model, precision).key()
    return cache_directory() / "reference" / f"v{FORMAT}-{key}"


def open_store(
    directory: Path,
    model: ModelConfig,
    reference: ReferenceConfig,
    precision: Precision,
    fill_command: str = FILL,
    create: bool = True,
) -> ReferenceStore:
    """The store of a recipe's reference model, created when it is not there.

    Without `create` nothing is written: the default store is an empty one then.

    Raises:
        CacheError: `reference.store` names a store that another model or set-up built, or none and
            `create` is not set.
    """
    expected = fingerprint(directory, model, precision)
    default = store_path(directory, model, precision)
    path = Path(reference.store).expanduser() if reference.store else default
    if (path / "manifest.json").is_file() or (reference.store and not create):
        return ReferenceStore.open(path, expected, fill_command)
    if not create:
        return ReferenceStore(path, expected, _vocab_size(directory))
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
    """Score the pairs that the store lacks; returns how many of them this process scored.

    Ends when the store has them all: blocks that other processes have claimed are waited for. The
    model is read from `directory`, whose digest is the store's, and never from a run.

    Raises:
        ModelError: the model does not load, or gives scores that are not finite.
    """
    store.refresh()
    if isinstance(pairs, TokenizedPairs) and not store.missing(pairs.pair_ids):
        # Without looking at the tokens of every pair.
        return 0
    by_id = {pair.pair_id: pair for pair in pairs}
    new = len(store.missing(list(by_id)))
    if not new:
        return 0
    log.info("reference pass: %d of %d pairs are new", new, len(by_id))
    work = _Pass(store, directory, model, precision, pack_tokens, device)
    claims = Claims(store.path / "claims")
    blocks = list(_blocks(list(by_id.values()), pack_tokens, work.layout))
    pause = 0.5
    with progress("reference pass", new, "pairs", "tokens") as advance:
        while True:
            done = new - len(store.missing(list(by_id)))
            open_blocks = [b for b in blocks if store.missing(b.pair_ids)]
            if not open_blocks:
                # In the order of the files: where two scored a pair, all read the same row.
                store.reload()
                return work.scored
            before = work.scored
            # Each process begins at a place of its own, or all would ask for the same block.
            place = rank() * len(open_blocks) // world_size()
            for block in (*open_blocks[place:], *open_blocks[:place]):
                with claims.held(block.name) as ours:
                    if not ours:
                        continue
                    # Another process may have finished it between our look and our claim.
                    store.refresh()
                    work.score_block(block, advance)
            pause = 1.0 if work.scored > before else min(2 * pause, LONGEST_PAUSE)
            if work.scored == before:
                time.sleep(pause)
            store.refresh()
            seen = new - len(store.missing(list(by_id)))
            advance(seen - done - (work.scored - before), 0)


@dataclass(frozen=True)
class Block:
    """Packs that one process scores."""

    name: str
    """From the ids of its pairs: the same in every process."""
    packs: list[list[TokenizedPair]]

    @property
    def pair_ids(self) -> list[str]:
        """Ids of all its pairs."""
        return [pair.pair_id for members in self.packs for pair in members]


def _blocks(pairs: Sequence[TokenizedPair], pack_tokens: int, layout: Layout) -> Iterator[Block]:
    """Largest packs first: what is too large for the memory shows at once.

    Which pairs share a pack depends on the data alone and not on what is there already, so a pass
    that goes on where another stopped gives the same numbers, also in bfloat16.
    """
    (packs,) = pack(lengths_of(pairs), pack_tokens, layout=layout)
    size = min(max(len(packs) // BLOCKS, PACKS_PER_BLOCK[0]), PACKS_PER_BLOCK[1])
    for start in range(0, len(packs), size):
        members = [[pairs[i] for i in chosen] for chosen in packs[start : start + size]]
        ids = "".join(pair.pair_id for each in members for pair in each)
        yield Block(hashlib.blake2b(ids.encode(), digest_size=12).hexdigest(), members)


class _Pass:
    """The model at work, loaded when the first block is claimed."""

    def __init__(
        self,
        store: ReferenceStore,
        directory: Path,
        model: ModelConfig,
        precision: Precision,
        pack_tokens: int,
        device: torch.device,
    ):
        self.store, self.directory, self.device = store, directory, device
        self.model, self.precision = model, precision
        self.layout = Layout.of(resolve_attention(directory, model.attention))
        self.budget = pack_tokens
        self.scored = 0
        self._scorer: PairScorer | None = None
        self._pending: list[tuple[list[str], ReferenceRows]] = []

    def score_block(self, block: Block, advance: Callable[[int, int], None]) -> None:
        """Score the block's pairs that the store lacks, and write them."""
        last_write = time.monotonic()
        for members in self._missing_packs(block):
            self._score(members)
            self.scored += len(members)
            advance(len(members), sum(_tokens(pair) for pair in members))
            if time.monotonic() - last_write > SECONDS_PER_SHARD:
                self._flush()
                last_write = time.monotonic()
        self._flush()

    def _missing_packs(self, block: Block) -> list[list[TokenizedPair]]:
        """Packs that are missing whole, as they are; what is left of others, packed anew."""
        missing = set(self.store.missing(block.pair_ids))
        lacking = [[pair for pair in each if pair.pair_id in missing] for each in block.packs]
        whole, rest = [], []
        for left, full in zip(lacking, block.packs, strict=True):
            if len(left) == len(full):
                whole.append(left)
            else:
                rest += left
        if not rest:
            return whole
        (packs,) = pack(lengths_of(rest), self.budget, layout=self.layout)
        return [*whole, *([rest[i] for i in chosen] for chosen in packs)]

    def _score(self, members: list[TokenizedPair]) -> None:
        (packs,) = pack(lengths_of(members), self.budget, layout=self.layout)
        for chosen in packs:
            fitting = [members[i] for i in chosen]
            batch = collate(fitting, self.layout).to(self.device)
            try:
                rows = score_rows(self.scorer, batch, self._autocast)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            else:
                _check_finite(rows, batch.pair_ids, self.directory)
                self._pending.append((batch.pair_ids, rows))
                continue
            # Outside the handler, which keeps what did not fit alive.
            self._halve(fitting)
            self._score(fitting)

    def _halve(self, members: list[TokenizedPair]) -> None:
        size = size_of(lengths_of(members), self.layout)
        if len(members) == 1:
            raise ModelError(
                f"out of memory on one pair of {size} tokens. Lower "
                "dataset.max_length, or set model.dtype=bfloat16."
            )
        self.budget = min(self.budget, size) // 2
        log.info("out of memory: reference.pack_tokens is %d from here on", self.budget)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def scorer(self) -> PairScorer:
        """The frozen model."""
        if self._scorer is None:
            self._scorer = load_scorer(self.directory, self.model, self.device)
        return self._scorer

    @property
    def _autocast(self) -> bool:
        return self.model.dtype is Dtype.float32 and self.precision is Precision.bf16

    def _flush(self) -> None:
        """Write the pending rows."""
        if not self._pending:
            return
        ids = [pair for pair_ids, _ in self._pending for pair in pair_ids]
        joined = {
            name: torch.cat([getattr(rows, name) for _, rows in self._pending])
            for name in ReferenceRows.__slots__
        }
        self.store.append(ids, ReferenceRows(**joined), self._about())
        self._pending.clear()

    def _about(self) -> dict[str, str]:
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else "cpu"
        return {"device": name, "pack_tokens": str(self.budget)}


def load_scorer(directory: Path, model: ModelConfig, device: torch.device) -> PairScorer:
    """The frozen reference model of a recipe, ready to score."""
    dtype = TORCH_DTYPES[model.dtype]
    scorer = PairScorer(load_model(directory, dtype, model.attention, model.quantization, device))
    scorer.eval().requires_grad_(False)
    try:
        return scorer.to(device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    log.info(
        "the reference model does not fit on %s: its weights stay in the machine's memory, and are "
        "sent there layer by layer. `mallowspo plan` says what would fit.",
        device,
    )
    scorer.to("cpu")
    cpu_offload(scorer, execution_device=device)
    return scorer


def _tokens(pair: TokenizedPair) -> int:
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or elsewhere."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(w in text for w in OUT_OF_MEMORY)


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


def _vocab_size(directory: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(directory).get_text_config().vocab_size)
