"""Pure: token entropies of the reference model -> the dispersion weight w(x) = -2 log phi(x).

Low entropy means consensus (phi near 0, large weight), high entropy dispersion (phi near 1, small
weight). Source: MallowsPO (arXiv 2405.14953) as its release computes it, with the *mean* token
entropy: the sum of the printed formula gives negative weights at ordinary lengths. Where we differ:
the entropy is clamped, and the scale is found from the data instead of the release's 0.29.

A pair with an empty response has no entropy. It is carried as NaN, gets weight 1, and is left out
of the scale; `empty_count` says how many there are.
"""

import math
from typing import Final

import torch
from torch import Tensor

from mallowspo_cli.errors import DataError

LOWEST: Final = 1e-6
HIGHEST: Final = 1 - 1e-6
SHUFFLE_STREAM: Final = 0x5EED
"""Added to the seed of the shuffled control."""


def normalised_entropy(
    chosen_entropy: Tensor,
    chosen_tokens: Tensor,
    rejected_entropy: Tensor,
    rejected_tokens: Tensor,
    vocab_size: int,
) -> Tensor:
    """Mean token entropy of a pair as a share of ln(vocab_size), clamped to [LOWEST, HIGHEST].

    Shapes: all (B,). Entropies in nats, summed over a response's tokens; each response counts
    alike, whatever its length. Returns (B,), float32 or better, NaN where a response is empty.

    `vocab_size` is the width of the logits (the release's choice), not the tokenizer's size. The
    choice matters: after the logarithm of `weight` it is a shift, not a scale.
    """
    if vocab_size < 2:
        raise ValueError(f"expected a vocabulary of at least 2 tokens, found {vocab_size}")
    chosen = _per_token(chosen_entropy, chosen_tokens)
    rejected = _per_token(rejected_entropy, rejected_tokens)
    return ((chosen + rejected) / (2 * math.log(vocab_size))).clamp(LOWEST, HIGHEST)


def unit_mean_scale(entropy: Tensor) -> float:
    """The scale c for which w = c * -ln(entropy) has mean 1 over `entropy`, (N,), the train split.

    Computed in float64. Raises DataError if no pair has an entropy.
    """
    known = entropy.detach().cpu().double()
    known = known[~known.isnan()]
    if known.numel() == 0:
        raise DataError(
            f"no dispersion scale: each of the {entropy.numel()} pairs has an empty response. "
            "Give training pairs whose responses have text."
        )
    return 1 / float(-known.log().mean())


def weight(entropy: Tensor, scale: float) -> Tensor:
    """w = scale * -ln(entropy), (B,); 1 where the entropy is NaN (an empty response)."""
    return torch.where(entropy.isnan(), 1.0, scale * -entropy.log())


def neg_log_phi(weight: Tensor) -> Tensor:
    """theta = -log phi(x) = w / 2, (B,): what every objective reads, for both links."""
    return weight / 2


def clamped_count(entropy: Tensor) -> int:
    """How many values of `normalised_entropy` sit on a bound; report it, they are suspect."""
    return int(((entropy <= LOWEST) | (entropy >= HIGHEST)).sum())


def empty_count(entropy: Tensor) -> int:
    """How many pairs have no entropy because a response is empty."""
    return int(entropy.isnan().sum())


def constant(values: Tensor) -> Tensor:
    """Control: every weight 1, (B,). MallowsPO-theta becomes DPO."""
    return torch.ones_like(values)


def shuffled(values: Tensor, seed: int) -> Tensor:
    """Control: the same weights on other pairs, (N,). Shuffle the whole split, not a batch."""
    # Another stream than the data order's, which would pair weights and positions.
    generator = torch.Generator().manual_seed(seed + SHUFFLE_STREAM)
    order = torch.randperm(values.shape[0], generator=generator)
    return values[order.to(values.device)]


def terciles(values: Tensor) -> Tensor:
    """0, 1, 2, (N,) int64: the lowest, middle and highest third by rank; ties keep their order."""
    rank = values.argsort(stable=True).argsort()
    return rank * 3 // values.shape[0]


def _per_token(entropy: Tensor, tokens: Tensor) -> Tensor:
    """(B,) mean nats per token in float32 or better; NaN where there is no token."""
    precise = entropy.to(torch.promote_types(entropy.dtype, torch.float32))
    return torch.where(tokens > 0, precise / tokens.clamp(min=1), math.nan)
