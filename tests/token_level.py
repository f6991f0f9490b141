"""Single tokens of a plain model's responses: what sums over them are checked against."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mallowspo_cli.data.table import TokenizedPair
from mallowspo_cli.models.load import load_model
from mallowspo_cli.objectives.base import ReferenceScores
from mallowspo_cli.objectives.details import DetailedScores

LENGTHS = ((5, 3, 9), (4, 8, 8), (7, 12, 2), (3, 1, 1), (2, 1, 6))
"""Tokens of prompt, chosen and rejected response."""
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Response:
    """The T tokens of a response under a model, float64, nats."""

    logps: Tensor
    """(T,) log-prob of each token."""
    squares: Tensor
    """(T,) log sum_v p_v^2 of the distribution that it is from."""


def tiny_model(directory: Path, seed: int | None = None) -> nn.Module:
    """The tiny model in float64, with distributions that are neither flat nor certain.

    Args:
        directory: that of `model=tiny_random`.
        seed: moves the weights a little; None leaves them.
    """
    model = load_model(directory, torch.float64).eval()
    generator = torch.Generator().manual_seed(seed or 0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)  # type: ignore[operator]
        for parameter in model.parameters() if seed is not None else ():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).double()
    return model


def token_pairs() -> list[TokenizedPair]:
    """A pair for each of `LENGTHS`, of random bytes."""
    draw = np.random.default_rng(3)
    return [
        TokenizedPair(f"pair {index}", *(draw.integers(0, 256, n).astype(np.int32) for n in each))
        for index, each in enumerate(LENGTHS)
    ]


def responses(model: nn.Module, pairs: Sequence[TokenizedPair]) -> list[tuple[Response, Response]]:
    """Chosen and rejected response of each pair, one at a time, from all logits."""

    def response(prompt: np.ndarray, tokens: np.ndarray) -> Response:
        ids = torch.from_numpy(np.concatenate([prompt, tokens])).long()
        predicted = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logps = predicted.gather(1, ids[len(prompt) :, None]).squeeze(1)
        return Response(logps, (2 * predicted.detach()).exp().sum(-1).log())

    return [(response(p.prompt, p.chosen), response(p.prompt, p.rejected)) for p in pairs]


def detailed(pairs: Sequence[tuple[Response, Response]]) -> DetailedScores:
    """Their sums, as a scorer has to find them."""
    columns: dict[str, list[Tensor]] = {}
    for pair in pairs:
        common = min(len(response.logps) for response in pair)
        for side, response in zip(SIDES, pair, strict=True):
            for name, value in {
                "logps": response.logps.sum(),
                "tokens": torch.tensor(len(response.logps)),
                "common_logps": response.logps[:common].sum(),
                "log_collisions": response.squares.sum(),
            }.items():
                columns.setdefault(f"{side}_{name}", []).append(value)
    return DetailedScores(**{name: torch.stack(values) for name, values in columns.items()})


def whole_sums(pairs: Sequence[tuple[Response, Response]], weights: Tensor) -> ReferenceScores:
    """What a reference store knows of them, with w(x) of each pair."""
    scores = detailed(pairs)
    return ReferenceScores(
        *(scores.chosen_logps.detach(), scores.rejected_logps.detach()),
        *(scores.chosen_tokens, scores.rejected_tokens, weights / 2),
    )
