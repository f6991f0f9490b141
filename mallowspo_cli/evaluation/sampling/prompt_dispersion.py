"""The dispersion of evaluation prompts: the reference's token entropy on one common answer each."""

from collections.abc import Sequence

import torch

from mallowspo_cli.data.pairs import Message
from mallowspo_cli.data.tokenize import TokenizedPair, split_response
from mallowspo_cli.dispersion import normalised_entropy
from mallowspo_cli.distributed import progress
from mallowspo_cli.errors import DataError
from mallowspo_cli.evaluation.sampling.tasks import Task
from mallowspo_cli.packing.layout import collate
from mallowspo_cli.packing.packer import lengths_of, pack
from mallowspo_cli.scoring import PairScorer


@torch.no_grad()
def prompt_entropy(
    scorer: PairScorer,
    tokenizer: object,
    answers: Sequence[tuple[Task, str]],
    pack_tokens: int,
    longest: int,
    device: torch.device,
) -> dict[str, float]:
    """Normalised mean token entropy, in (0, 1), of the reference along each answer.

    As the training estimate (method.md 2.4), but along one answer that all compared models share
    (the baseline's), not a chosen and a rejected one: terciles then are the same for all of them.
    Tasks whose answer cannot be tokenised exactly, or with prompt is longer than `longest` tokens,
    are left out.
    """
    pairs, kept = [], []
    for task, answer in answers:
        try:
            prompt, response = split_response(
                task.messages,
                Message("assistant", answer),
                tokenizer,  # type: ignore[arg-type]
                "an answer",
            )
        except DataError:
            continue
        if len(prompt) + len(response) <= longest:
            # The second response is there because a pair has two; its one token costs nothing.
            pairs.append(TokenizedPair(str(len(pairs)), prompt, response, response[-1:]))
            kept.append(task.instruction)
    found: dict[str, float] = {}
    if not pairs:
        return found
    (packs,) = pack(lengths_of(pairs), pack_tokens, layout=scorer.layout)
    with progress("prompt dispersion", len(pairs), "answers") as advance:
        for members in packs:
            batch = collate([pairs[i] for i in members], scorer.layout).to(device)
            scores, entropies = scorer(batch, entropy=True)
            answer = entropies.chosen_entropy, scores.chosen_tokens
            values = normalised_entropy(*answer, *answer, scorer.vocab_size)
            found |= {kept[i]: v for i, v in zip(members, values.tolist(), strict=True)}
            advance(len(members))
    return found
