"""Which pairs go into which forward pass: a pure function of lengths, budget and processes.

An optimizer step, or a reference pass, takes its time from the slowest process, so packs are made
equal: longest processing time first (Graham, 1969), every pair onto the lightest pack with room.
Pairs are never split.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mallowspo_cli.data.table import TokenizedPair, TokenizedPairs, longer_rows
from mallowspo_cli.packing.layout import Layout

Pack = list[int]


def lengths_of(pairs: Sequence[TokenizedPair]) -> NDArray[np.int64]:
    """(N, 3) tokens of prompt, chosen and rejected."""
    if isinstance(pairs, TokenizedPairs):
        return pairs.lengths
    rows = [(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def size_of(lengths: ArrayLike, layout: Layout) -> int:
    """Tokens of one pack of these pairs, as they lie; `lengths` as in `pack`."""
    rows = np.asarray(lengths, dtype=np.int64).reshape(-1, 3)
    if layout is Layout.padded:
        return int(2 * len(rows) * longer_rows(rows).max())
    return int(rows.sum())


def pack(
    lengths: ArrayLike,
    pack_tokens: int,
    world_size: int = 1,
    layout: Layout = Layout.shared,
    costs: ArrayLike | None = None,
) -> list[list[Pack]]:
    """Deal pairs onto packs of at most `pack_tokens` tokens, the same number on every rank.

    A pair longer than the budget gets a pack of its own.

    Args:
        lengths: (N, 3) tokens of prompt, chosen and rejected.
        pack_tokens: tokens of a pack; in the padded layout, padding included.
        world_size: number of ranks; N must be a multiple of it, since pairs that each need a pack
            of their own could not be dealt evenly otherwise.
        layout: how pairs will lie.
        costs: (N,) what is to be equal; tokens by default.

    Returns:
        For each rank its packs, costliest first, each a list of indices into `lengths`. Packs at
        the same place of their ranks' lists are like each other.
    """
    rows = np.asarray(lengths, dtype=np.int64).reshape(-1, 3)
    if not len(rows) or len(rows) % world_size:
        raise ValueError(f"{len(rows)} pairs cannot be dealt evenly to {world_size} ranks")
    if layout is Layout.padded:
        packs = _like_lengths(longer_rows(rows), pack_tokens, world_size)
    else:
        tokens = rows.sum(axis=1)
        each = tokens if costs is None else np.asarray(costs)
        packs = _equal_costs(tokens, each, pack_tokens, world_size)
    return [packs[rank::world_size] for rank in range(world_size)]


def _equal_costs(
    tokens: NDArray[np.int64], costs: NDArray[np.float64], pack_tokens: int, world_size: int
) -> list[Pack]:
    """The smallest number of packs, a multiple of the ranks, onto which the pairs fit."""
    order = np.argsort(-costs, kind="stable").tolist()
    most = len(tokens) // world_size
    alone = tokens > pack_tokens
    least = int(alone.sum() + -(-tokens[~alone].sum() // pack_tokens))
    rounds = min(-(-least // world_size), most)
    while (packs := _dealt(order, tokens, costs, pack_tokens, rounds * world_size)) is None:
        # At one pair a pack they always fit.
        rounds = min(rounds + max(1, rounds // 100), most)
    totals = [float(costs[members].sum()) for members in packs]
    heaviest_first = sorted(range(len(packs)), key=lambda index: (-totals[index], index))
    return [packs[index] for index in heaviest_first]


def _dealt(
    order: Sequence[int],
    tokens: NDArray[np.int64],
    costs: NDArray[np.float64],
    pack_tokens: int,
    count: int,
) -> list[Pack] | None:
    """Every pair onto the lightest of `count` packs that has room; None where one has no room."""
    packs: list[Pack] = [[] for _ in range(count)]
    filled = [0] * count
    # Load, pairs, pack: the heap gives the lightest, of equal ones that of the fewest pairs.
    lightest = [(0.0, 0, index) for index in range(count)]
    for pair in order:
        size = int(tokens[pair])
        passed: list[tuple[float, int, int]] = []
        while lightest:
            load, held, index = heapq.heappop(lightest)
            if not packs[index] or filled[index] + size <= pack_tokens:
                break
            passed.append((load, held, index))
        else:
            return None
        packs[index].append(pair)
        filled[index] += size
        for entry in (*passed, (load + float(costs[pair]), held + 1, index)):
            heapq.heappush(lightest, entry)
    return packs


def _like_lengths(widths: NDArray[np.int64], pack_tokens: int, world_size: int) -> list[Pack]:
    """Padded rows, two a pair: pairs of like length share a pack, longest first."""
    packs: list[Pack] = []
    for index in np.argsort(-widths, kind="stable").tolist():
        # Sorted: the first pair of a pack is its longest.
        if packs and 2 * widths[packs[-1][0]] * (len(packs[-1]) + 1) <= pack_tokens:
            packs[-1].append(index)
        else:
            packs.append([index])
    while len(packs) % world_size:
        largest = max(range(len(packs)), key=lambda place: len(packs[place]))
        whole = packs[largest]
        packs[largest : largest + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return packs
