"""Which pairs go into which forward pass: a pure function of lengths, budget and processes."""

from collections.abc import Sequence

from mallowspo_cli.data.tokenize import TokenizedPair


def padded_length(pair: TokenizedPair) -> int:
    """Tokens of the longer row of a pair."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def pack(lengths: Sequence[int], pack_tokens: int, world_size: int = 1) -> list[list[list[int]]]:
    """Deal pairs onto packs of at most `pack_tokens` padded tokens, the same number on every rank.

    Pairs of like length share a pack, longest packs first; a pair longer than the budget gets a
    pack of its own.

    Args:
        lengths: `padded_length` of each pair.
        pack_tokens: tokens of a pack, padding included.
        world_size: number of ranks; the number of pairs must be a multiple of it, since pairs that
            each need a pack of their own could not be dealt evenly otherwise.

    Returns:
        For each rank its packs, each a list of indices into `lengths`.
    """
    if not lengths or len(lengths) % world_size:
        raise ValueError(f"{len(lengths)} pairs cannot be dealt evenly to {world_size} ranks")
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    packs: list[list[int]] = []
    for index in longest_first:
        # Sorted: the first pair of a pack is its longest, two rows a pair.
        if packs and 2 * lengths[packs[-1][0]] * (len(packs[-1]) + 1) <= pack_tokens:
            packs[-1].append(index)
        else:
            packs.append([index])
    while len(packs) % world_size:
        largest = max(range(len(packs)), key=lambda p: len(packs[p]))
        whole = packs[largest]
        packs[largest : largest + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return [packs[rank::world_size] for rank in range(world_size)]
