"""What 8, 64 and 512 processes would do, without starting them: packs, files, start-up.

    python benchmarks/simulate_ranks.py --json docs/results/cluster/simulate.json

Runs the project's own code for every rank in one process, in turn. Three parts:

balance     the pairs of optimizer steps, drawn from benchmarks/lengths/, dealt to the ranks: how
            long the slowest takes over the mean, and how long dealing takes, which every rank does
pass        the reference pass: real claims, blocks and store, with fabricated rows in the place of
            a model's and a clock that is moved on by what packs would take; a thread a rank, of
            which one runs at a time. Counts files, claims and looks into the directory.
start       what every rank does before the first step, and in each: reading prepared data, opening
            the store, dealing a step. Seconds of CPU on this machine, one thread.
"""

import argparse
import heapq
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import measure
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mallowspo_cli.data.table import (
    SCHEMA,
    TokenizedPair,
    TokenizedPairs,
    map_table,
    pair_id,
    write_table,
)
from mallowspo_cli.files import write_json
from mallowspo_cli.models.flops import ForwardFlops
from mallowspo_cli.models.sources import resolve_model
from mallowspo_cli.packing.packer import lengths_of, pack
from mallowspo_cli.recipe.choices import Order, Precision
from mallowspo_cli.recipe.schema import DispersionConfig, ModelConfig
from mallowspo_cli.reference import build, claims
from mallowspo_cli.reference.claims import Claims
from mallowspo_cli.reference.fingerprint import Fingerprint
from mallowspo_cli.reference.store import COLUMNS, ReferenceRows, ReferenceStore
from mallowspo_cli.reference.terms import fit_reference
from mallowspo_cli.training.checkpoint import shard_name
from mallowspo_cli.training.order import PairOrder

LLAMA_3_8B = ForwardFlops(per_token=2 * 6.979e9, per_visible=524_288, per_target=2 * 0.5253e9)
PARAMETERS = 8_030_261_248
RATE = 0.5 * 989e12
"""FLOP/s of an H100, as the plan assumes."""
STEPS = ((8, 256), (8, 1024), (64, 256), (64, 1024), (512, 1024), (512, 4096))
"""Processes, and pairs of a step."""
PACK_TOKENS = (4096, 8192, 16384)
RANKS = (8, 64, 512)
MAX_LENGTH = {"dpo": 2048, "hh": 512}
Lengths = NDArray[np.int64]


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=61_000, help="of the reference pass")
    parser.add_argument("--draws", type=int, default=10, help="steps of each kind")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [kind for kind in STEPS if kind[0] in options.ranks]
    found: dict[str, Any] = {
        "balance": [
            balance(name, ranks, pairs, tokens, options.draws)
            for name in MAX_LENGTH
            for ranks, pairs in kinds
            for tokens in PACK_TOKENS
        ]
    }
    show("balance", found["balance"])
    rows = known("dpo")
    data = fabricated(rows[np.arange(options.pairs) % len(rows)])
    found["pass"] = [reference_pass(ranks, data, 16384) for ranks in options.ranks]
    show("reference pass", found["pass"])
    found["start"] = [start(data, ranks, pairs) for ranks, pairs in kinds]
    show("start and step of a rank", found["start"])
    found["checkpoint"] = [checkpoint(ranks) for ranks in options.ranks]
    show("checkpoint of Llama-3-8B, on paper", found["checkpoint"])
    if options.json:
        machine = {"machine": measure.machine(), "versions": measure.versions()}
        write_json(options.json, {**found, **machine})


def known(name: str) -> Lengths:
    """(N, 3) lengths of the pairs of a file that fit."""
    rows = measure.fit_lengths(measure.known_lengths(name), MAX_LENGTH[name], "drop")
    return np.array(rows, dtype=np.int64)


def balance(name: str, ranks: int, pairs: int, pack_tokens: int, draws: int) -> dict[str, Any]:
    """Means over steps of `pairs` pairs, drawn with replacement from a file.

    `slowest_over_mean`: ranks wait for each other after every pack, so a step takes the sum of its
    costliest packs. `least_possible` is a bound on it for any dealing of whole pairs.
    """
    rows, draw = known(name), np.random.default_rng(0)
    figures = []
    for _ in range(draws):
        step = rows[draw.integers(len(rows), size=pairs)]
        costs = LLAMA_3_8B.of_pairs(step)
        cpu, wall = time.process_time(), time.perf_counter()
        dealt = pack(step, pack_tokens, ranks, costs=costs)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        counts = {len(packs) for packs in dealt}
        cost = np.array([[costs[members].sum() for members in packs] for packs in dealt])
        tokens = np.array([[step[members].sum() for members in packs] for packs in dealt])
        figures.append(
            {
                "same_number": len(counts) == 1,
                "packs_of_a_rank": len(dealt[0]),
                "slowest_over_mean": cost.max(axis=0).sum() / cost.mean(axis=0).sum(),
                "step_over_mean": cost.sum(axis=1).max() / cost.sum(axis=1).mean(),
                "least_possible": least_possible(costs, ranks),
                "fill": tokens.sum() / (tokens.size * tokens.max()),
                "dealing_cpu_s": cpu,
                "dealing_wall_s": wall,
                # Forward and backward pass of the costliest packs: three times the forward pass.
                "step_s": 3 * cost.max(axis=0).sum() / RATE,
            }
        )
    means = {key: float(np.mean([each[key] for each in figures])) for key in figures[0]}
    about = {"lengths": name, "ranks": ranks, "pairs": pairs, "pack_tokens": pack_tokens}
    same = all(each["same_number"] for each in figures)
    return {**about, **means, "same_number": same, "draws": draws}


def least_possible(costs: NDArray[np.float64], ranks: int) -> float:
    """The busiest rank over the mean cannot be less than this, however whole pairs are dealt.

    It has the mean at least, and of the k G + 1 costliest pairs one of G ranks has k + 1: no less
    than the k + 1 cheapest of them.
    """
    ordered = np.sort(costs)[::-1]
    bound = float(ordered.mean() * len(ordered) / ranks)
    mean = bound
    for count in range(-(-len(ordered) // ranks)):
        last = count * ranks
        if last < len(ordered):
            bound = max(bound, float(ordered[last - count : last + 1].sum()))
    return bound / mean


def fabricated(rows: Lengths) -> TokenizedPairs:
    """Prepared pairs of these lengths, each different, as files would hold them."""
    starts = range(0, len(rows), 4096)
    return TokenizedPairs([_table(rows[first : first + 4096], first) for first in starts])


def _table(rows: Lengths, first: int) -> pa.Table:
    lists = {}
    for name, sizes in zip(("prompt", "chosen", "rejected"), rows.T, strict=True):
        ends = np.cumsum(sizes)
        values = np.arange(ends[-1], dtype=np.int32) % 1000
        # The last token tells pairs of the same lengths apart.
        values[ends - 1] = first + np.arange(len(rows))
        lists[name] = np.split(values, ends[:-1])
    columns = {
        "row": first + np.arange(len(rows)),
        "where": [f"row {first + index}" for index in range(len(rows))],
        "pair_id": [pair_id(*parts) for parts in zip(*lists.values(), strict=True)],
        **lists,
    }
    absent = {name: [None] * len(rows) for name in SCHEMA.names if name not in columns}
    whole = {**columns, **absent}
    return pa.table({name: whole[name] for name in SCHEMA.names}, schema=SCHEMA)


class Clock:
    """Simulated seconds of many ranks, each a thread, of which one runs at a time: always the one
    that is furthest behind.
    """

    def __init__(self) -> None:
        self._queue: list[tuple[float, int]] = []
        self._turns: dict[int, threading.Semaphore] = {}
        self._back = threading.Semaphore(0)
        self._here = threading.local()

    def run(self, works: Sequence[Any]) -> list[float]:
        """Run every work to its end; returns when each ended."""
        ends = [0.0] * len(works)
        failed: list[BaseException] = []

        def body(rank: int) -> None:
            self._turns[rank].acquire()
            self._here.rank, self._here.now = rank, 0.0
            try:
                works[rank]()
            except BaseException as error:
                failed.append(error)
            ends[rank] = self._here.now
            self._back.release()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(len(works))]
        for rank, thread in enumerate(threads):
            self._turns[rank] = threading.Semaphore(0)
            heapq.heappush(self._queue, (0.0, rank))
            thread.start()
        while self._queue:
            _, rank = heapq.heappop(self._queue)
            self._turns[rank].release()
            self._back.acquire()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return ends

    def monotonic(self) -> float:
        """The time of the rank that asks."""
        return self._here.now

    def rank(self) -> int:
        """The rank that asks."""
        return self._here.rank

    def sleep(self, seconds: float) -> None:
        """Let `seconds` go by for the rank that asks, and others catch up."""
        self._here.now += seconds
        heapq.heappush(self._queue, (self._here.now, self._here.rank))
        self._back.release()
        self._turns[self._here.rank].acquire()


class CountedStore(ReferenceStore):
    """One view of the directory for all ranks: a rank reads it before whatever depends on it, so
    all see the same. Counts how often each would look.
    """

    def __init__(self, *arguments: Any):
        self.looks, self.changed = 0, True
        super().__init__(*arguments)

    def refresh(self) -> None:
        """A look into the directory, and at what is new there."""
        self.looks += 1
        if self.changed:
            self.changed = False
            super().refresh()

    def reload(self) -> None:
        """All files anew, by each rank at its end: read once here."""
        if not hasattr(self, "_known"):
            super().reload()
        else:
            self.looks += 1

    def append(self, *arguments: Any) -> None:
        """A file of rows."""
        super().append(*arguments)
        self.changed = True


class CountedClaims(Claims):
    """Counts how often a claim is tried, and in vain."""

    tries = vain = 0

    @contextmanager
    def held(self, name: str) -> Iterator[bool]:
        """As the claims' own, without the thread that touches the file."""
        CountedClaims.tries += 1
        file = self.directory / name
        if not self._create(file):
            taken_over = self._abandoned(file)
            assert not taken_over
            CountedClaims.vain += 1
            yield False
            return
        yield True
        file.unlink()


def reference_pass(ranks: int, data: TokenizedPairs, pack_tokens: int) -> dict[str, Any]:
    """`complete_store` in every rank, on an empty store."""
    clock, CountedClaims.tries, CountedClaims.vain = Clock(), 0, 0
    blocks: list[build.Block] = []
    layout_of_blocks = build._blocks

    class Rank(build._Pass):
        """Rows without a model, in the time that an H100 would take."""

        def _score(self, members: list[TokenizedPair]) -> None:
            clock.sleep(float(LLAMA_3_8B.of_pairs(lengths_of(members)).sum()) / RATE)
            self._pending.append(([p.pair_id for p in members], rows_of(len(members))))

    def same_blocks(*arguments: Any) -> list[build.Block]:
        if not blocks:
            blocks.extend(layout_of_blocks(*arguments))
        return blocks

    stand_ins = {
        "_Pass": Rank,
        "Claims": CountedClaims,
        "_blocks": same_blocks,
        "time": clock,
        "rank": clock.rank,
        "world_size": lambda: ranks,
        "progress": lambda *_: nullcontext(lambda *_: None),
    }
    # No time goes by for claims: all of these ranks are alive.
    still = mock.patch.object(claims, "time", SimpleNamespace(monotonic=lambda: 0.0))
    pairs = list(data)
    with still, tempfile.TemporaryDirectory() as scratch, mock.patch.multiple(build, **stand_ins):
        place = Path(scratch) / "store"
        store = CountedStore.create(place, FINGERPRINT, 128_256)
        assert isinstance(store, CountedStore)
        store.looks = 0
        model, directory = ModelConfig(source="random:llama"), resolve_model("random:llama")
        setting = (directory, model, Precision.bf16, pack_tokens, torch.device("cpu"))
        scored = [0] * ranks

        def work(rank: int) -> None:
            scored[rank] = build.complete_store(store, pairs, *setting)

        ends = clock.run([lambda rank=rank: work(rank) for rank in range(ranks)])
        files = store.shards()
        ideal = float(LLAMA_3_8B.of_pairs(data.lengths).sum()) / (RATE * ranks)
        begin = time.process_time()
        opened = ReferenceStore.open(place, FINGERPRINT)
        opening = time.process_time() - begin
        begin = time.process_time()
        lacking = opened.missing(data.pair_ids)
        looking = time.process_time() - begin
        assert not lacking
        assert sum(scored) == len(opened) == len(data)
        return {
            "ranks": ranks,
            "pairs": len(data),
            "blocks": len(blocks),
            "files": len(files),
            "kib": sum(file.stat().st_size for file in files) / 1024,
            "left_over_claims": len(list((place / "claims").iterdir())),
            "idle_ranks": scored.count(0),
            "claims_tried": CountedClaims.tries,
            "of_them_in_vain": CountedClaims.vain,
            "looks_into_directory": store.looks,
            "simulated_s": max(ends),
            "ideal_s": ideal,
            "open_cpu_s": opening,
            "look_up_cpu_s": looking,
        }


FINGERPRINT = Fingerprint(*("simulated",) * 8)


def rows_of(count: int) -> ReferenceRows:
    """Scores of so many pairs, made up."""
    values = {
        name: torch.ones(count, dtype=torch.int32 if name.endswith("tokens") else torch.float32)
        for name in COLUMNS
    }
    return ReferenceRows(**values)


def start(data: TokenizedPairs, ranks: int, pairs: int) -> dict[str, Any]:
    """CPU seconds of a rank: before the first step, and of dealing a step."""
    found: dict[str, Any] = {"ranks": ranks, "pairs_a_step": pairs, "pairs": len(data)}
    with tempfile.TemporaryDirectory() as scratch:
        files = []
        for number, batch in enumerate(data._batches):
            files.append(Path(scratch) / f"pairs-{number:06d}.arrow")
            write_table(files[-1], pa.Table.from_batches([batch]))
        with stopwatch(found, "read_prepared_s"):
            mapped = TokenizedPairs([map_table(file) for file in files])
            lengths, ids = mapped.lengths, mapped.pair_ids
        store = ReferenceStore.create(Path(scratch) / "store", FINGERPRINT, 128_256)
        generator = np.random.default_rng(0)
        rows = rows_of(len(ids))
        rows.chosen_entropy_sum.copy_(torch.from_numpy(generator.random(len(ids))))
        store.append(ids, rows)
        with stopwatch(found, "dispersion_s"):
            fit_reference(store, DispersionConfig(), mapped, 0)
        order = PairOrder(len(mapped), pairs, 0, Order.shuffle)
        with stopwatch(found, "first_order_s"):
            order.step(0)
        with stopwatch(found, "order_s"):
            members = order.step(1)
        with stopwatch(found, "all_lengths_s"):
            rows_of_step = lengths[members]
        with stopwatch(found, "dealing_s"):
            dealt = pack(rows_of_step, 16384, ranks, costs=LLAMA_3_8B.of_pairs(rows_of_step))
        with stopwatch(found, "own_tokens_s"):
            own = [[mapped[members[index]] for index in packs] for packs in dealt[0]]
        assert own
        del mapped, store
    return found


@contextmanager
def stopwatch(found: dict[str, Any], name: str) -> Iterator[None]:
    """CPU seconds of the block."""
    begin = time.process_time()
    yield
    found[name] = time.process_time() - begin


def checkpoint(ranks: int) -> dict[str, Any]:
    """Files of a checkpoint and their size: float32 weights and two moments, over the ranks."""
    return {
        "ranks": ranks,
        # One a rank, state.json and manifest.json.
        "files": len({shard_name(rank, ranks) for rank in range(ranks)}) + 2,
        "gib_of_a_file": 12 * PARAMETERS / ranks / 2**30,
        "gib": 12 * PARAMETERS / 2**30,
    }


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A Markdown table."""
    print(f"\n{title}")
    names = list(rows[0])
    print("| " + " | ".join(names) + " |")
    print("|" + " --- |" * len(names))
    for row in rows:
        print("| " + " | ".join(cell(row[name]) for name in names) + " |")


def cell(value: object) -> str:
    """A number, shortly."""
    if isinstance(value, float):
        return f"{value:.4f}" if value < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()
