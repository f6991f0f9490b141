"""Pure: token entropies of the reference model -> the dispersion weight w(x) = -2 log phi(x).

Low entropy means consensus (phi near 0, large weight), high entropy dispersion (phi near 1, small
weight). Source: MallowsPO (arXiv 2405.14953) as its release computes it, with the *mean* token
entropy: the sum of the printed formula gives negative weights at ordinary lengths. Where we differ:
the entropy is clamped, and the scale is found from the data instead of the release's 0.29.

The same w can come from elsewhere: a column of the data, or the agreement of raters (`raters.py`).
`raw` is w before its scale, whatever it comes from. A pair of which nothing is known (an empty
response, no raters) is carried as NaN, gets weight 1, and is left out of the scale; `empty_count`
says how many there are.
"""

import math
from typing import Final

import torch
from torch import Tensor

from mallowspo_cli.errors import DataError

LOWEST: Final = 1e-6
HIGHEST: Final = 1 - 1e-6
SMALLEST_INVERTED: Final = 0.01
"""Smaller values count as this: one near 0 would be all of the mean of the inverses."""
SHUFFLE_STREAM: Final = 0x5EED
"""Added to the seed of the shuffled control."""


def normalised_entropy(
    chosen_entropy: Tensor,
    chosen_tokens: Tensor,
    rejected_entropy: Tensor,
    rejected_tokens: Tensor,
    vocab_size: int,
    pool_tokens: bool = False,
    normaliser: float | None = None,
) -> Tensor:
    """Mean token entropy of a pair as a share of ln(vocab_size), clamped to [LOWEST, HIGHEST].

    Shapes: all (B,). Entropies in nats, summed over a response's tokens; each response counts
    alike, whatever its length, or each token where `pool_tokens` is set. Returns (B,), float32 or
    better, NaN where a response is empty.

    `vocab_size` is the width of the logits (the release's choice), not the tokenizer's size. The
    choice matters: after the logarithm of `raw_weight` it is a shift, not a scale. `normaliser`
    gives other nats than ln(vocab_size) to take shares of.
    """
    if vocab_size < 2:
        raise ValueError(f"expected a vocabulary of at least 2 tokens, found {vocab_size}")
    chosen = _per_token(chosen_entropy, chosen_tokens)
    rejected = _per_token(rejected_entropy, rejected_tokens)
    mean = (chosen + rejected) / 2
    if pool_tokens:
        tokens = chosen_tokens + rejected_tokens
        share = chosen_tokens / tokens.clamp(min=1)
        mean = share * chosen + (1 - share) * rejected
    return (mean / (normaliser or math.log(vocab_size))).clamp(LOWEST, HIGHEST)


def raw_weight(entropy: Tensor) -> Tensor:
    """-ln(entropy), (B,) float64: w before its scale; NaN where the entropy is."""
    return -entropy.double().log()


def unit_mean_scale(raw: Tensor) -> float:
    """The scale c for which w = c * raw has mean 1 over `raw`, (N,), the train split.

    Computed in float64. Raises DataError if no pair has a value, or if all are 0.
    """
    known = raw.detach().cpu().double()
    known = known[~known.isnan()]
    if known.numel() == 0:
        raise DataError(
            f"no dispersion scale: none of the {raw.numel()} training pairs has a dispersion. "
            "Are their responses empty, or has the data no raters (dispersion.source=raters)?"
        )
    if not bool(known.any()):
        raise DataError("no dispersion scale: w is 0 for every training pair.")
    return 1 / float(known.mean())


def weight(raw: Tensor, scale: float, bounds: tuple[float, float] = (0, math.inf)) -> Tensor:
    """w = scale * raw within bounds, (B,); 1 where raw is NaN (nothing is known of the prompt)."""
    return torch.where(raw.isnan(), 1.0, (scale * raw).clamp(*bounds))


def within_quantiles(raw: Tensor, low: float, high: float) -> Tensor:
    """(N,) bool: which values lie between two quantiles of the known ones; NaN is kept."""
    known = raw[~raw.isnan()].double()
    if known.numel() == 0:
        return torch.ones_like(raw, dtype=torch.bool)
    lowest, highest = torch.quantile(known, torch.tensor([low, high], dtype=known.dtype))
    return raw.isnan() | ((raw >= lowest) & (raw <= highest))


def neg_log_phi(weight: Tensor) -> Tensor:
    """theta = -log phi(x) = w / 2, (B,): what every objective reads, for both links."""
    return weight / 2


def clamped_count(entropy: Tensor) -> int:
    """How many values of `normalised_entropy` sit on a bound; report it, they are suspect."""
    return int(((entropy <= LOWEST) | (entropy >= HIGHEST)).sum())


def empty_count(entropy: Tensor) -> int:
    """How many pairs have no value: a response is empty, or no raters were there."""
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


def inverse(raw: Tensor) -> Tensor:
    """Control: `raw` the wrong way round, 1 / raw, (N,), before its scale; NaN stays NaN."""
    return 1 / raw.clamp(min=SMALLEST_INVERTED)


def terciles(values: Tensor) -> Tensor:
    """0, 1, 2, (N,) int64: the lowest, middle and highest third by rank; ties keep their order."""
    rank = values.argsort(stable=True).argsort()
    return rank * 3 // values.shape[0]


def _per_token(entropy: Tensor, tokens: Tensor) -> Tensor:
    """(B,) mean nats per token in float32 or better; NaN where there is no token."""
    precise = entropy.to(torch.promote_types(entropy.dtype, torch.float32))
    return torch.where(tokens > 0, precise / tokens.clamp(min=1), math.nan)
