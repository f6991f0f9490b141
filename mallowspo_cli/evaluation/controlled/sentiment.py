"""Controlled sentiment: how positive a policy's continuations are, and how far it went for that.

The protocol of Rafailov et al. (2023, section 6.1): beginnings of film reviews, continuations
sampled from the policy, a classifier's probability of positive as the reward, and the sequence
KL(policy || reference), both on the same samples.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.data.tokenize import TokenIds, TokenizedPair
from mallowspo_cli.distributed import progress
from mallowspo_cli.evaluation.sampling.stage import Engine, Prompt
from mallowspo_cli.evaluation.strata import estimate
from mallowspo_cli.packing.layout import collate
from mallowspo_cli.packing.packer import lengths_of, pack
from mallowspo_cli.scoring import PairScorer

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """A continuation."""

    prompt: Prompt
    ids: TokenIds
    """Without the end token."""
    ended: bool
    """Whether it came to an end token, and not to its longest length."""
    text: str
    """Beginning and continuation, which the classifier reads."""
    continued: bool
    """Whether the model got the beginning as it stands, and not as a turn of a chat template."""


@dataclass(frozen=True)
class Measured:
    """What was sampled and scored; N samples, those of one prompt one after another."""

    samples: list[Sample]
    log_ratios: Floats | None
    """(N,) ln p of the policy minus that of the reference, in nats; None: not known."""
    reference_samples: list[Sample] | None
    """Of the reference, to the same prompts."""


def draw_samples(
    engine: Engine, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> list[Sample]:
    """A continuation of each prompt, in the order of the prompts."""
    found: dict[tuple[int, int], Sample] = {}
    order = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.index, prompt.sample))
    with progress("continuations", len(order), "samples", "tokens") as advance:

        def done(prompt: Prompt, ids: TokenIds, finish: str) -> None:
            text, continued = whole_text(prompt, ids, tokenizer)
            sample = Sample(prompt, ids, finish == "stop", text, continued)
            found[prompt.index, prompt.sample] = sample
            advance(1, len(ids))

        for start in range(0, len(order), engine.batch_size):
            batch = order[start : start + engine.batch_size]
            engine.answer(batch, [True] * len(batch), done)
    return [found[prompt.index, prompt.sample] for prompt in prompts]


def whole_text(
    prompt: Prompt, ids: TokenIds, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, bool]:
    """Beginning and continuation as one text, without what a chat template adds; and whether it
    added nothing.
    """

    def decode(tokens: list[int]) -> str:
        return str(
            tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    beginning, own = prompt.task.instruction, prompt.ids.tolist()
    bare: Any = tokenizer(beginning, add_special_tokens=False)["input_ids"]
    if own in (bare, [tokenizer.bos_token_id, *bare]):
        # The model may have gone on in the middle of a word.
        return decode([*own, *ids.tolist()]).strip(), True
    return f"{beginning} {decode(ids.tolist()).strip()}", False


@torch.no_grad()
def sequence_logps(
    scorer: PairScorer,
    samples: Sequence[Sample],
    ends: Sequence[int],
    pack_tokens: int,
    device: torch.device,
) -> Floats:
    """(N,) ln p(continuation | beginning) in nats, of tokens and end.

    Samples of one prompt follow each other. The end of a sample is any of `ends`: which of several
    end tokens a model chose is not part of the text, so their probabilities are added up.
    """
    pairs: list[TokenizedPair] = []
    owners: list[tuple[int, int | None]] = []
    for _, group in groupby(range(len(samples)), key=lambda i: samples[i].prompt.index):
        rows = [(number, ids) for number in group for ids in _endings(samples[number], ends)]
        for (first, chosen), *second in (rows[at : at + 2] for at in range(0, len(rows), 2)):
            # A pair scores two answers; the last of an odd number stands beside itself.
            other, rejected = second[0] if second else (None, chosen)
            prompt = samples[first].prompt.ids
            pairs.append(TokenizedPair(str(len(pairs)), prompt, chosen, rejected))
            owners.append((first, other))
    (packs,) = pack(lengths_of(pairs), pack_tokens, layout=scorer.layout)
    parts: dict[int, list[float]] = defaultdict(list)
    with progress("scoring", len(pairs), "pairs") as advance:
        for members in packs:
            scores = scorer(collate([pairs[i] for i in members], scorer.layout).to(device))
            columns = scores.chosen_logps.tolist(), scores.rejected_logps.tolist()
            for index, *logps in zip(members, *columns, strict=True):
                for owner, logp in zip(owners[index], logps, strict=True):
                    if owner is not None:
                        parts[owner].append(logp)
            advance(len(members))
    return np.asarray([np.logaddexp.reduce(parts[number]) for number in range(len(samples))])


def _endings(sample: Sample, ends: Sequence[int]) -> list[TokenIds]:
    if not sample.ended:
        return [sample.ids]
    return [np.append(sample.ids, end).astype(np.int32) for end in ends]


def summarise(
    found: Measured, log_odds: Floats, reference_log_odds: Floats | None
) -> dict[str, Any]:
    """Means over prompts with 95 % intervals, in plain values.

    Args:
        log_odds: (N,) the classifier's, of the samples; the reward is their probability.
        reference_log_odds: (N,) of the reference's samples.
    """
    samples = found.samples
    reward = prompt_means(expit(log_odds), samples)
    values = {"reward": reward, "log_odds": prompt_means(log_odds, samples)}
    if found.log_ratios is not None:
        values["kl"] = prompt_means(found.log_ratios, samples)
    if reference_log_odds is not None and found.reference_samples is not None:
        values["reference_reward"] = prompt_means(
            expit(reference_log_odds), found.reference_samples
        )
        # Both went on from the same beginnings, so these are resampled together.
        values["reward_gain"] = reward - values["reference_reward"]
    names = ("reward", "log_odds", "kl", "reference_reward", "reward_gain")
    return {
        **{name: asdict(estimate(values[name])) if name in values else None for name in names},
        "samples": len(samples),
        "tokens_mean": float(np.mean([len(sample.ids) for sample in samples])),
        "words_mean": float(np.mean([len(sample.text.split()) for sample in samples])),
        "ended": float(np.mean([sample.ended for sample in samples])),
        "continued": all(sample.continued for sample in samples),
    }


def sample_rows(
    found: Measured, log_odds: Floats, reference_log_odds: Floats | None
) -> list[dict[str, Any]]:
    """A row for each sample, the policy's first."""
    sides = [("policy", found.samples, log_odds, found.log_ratios)]
    if found.reference_samples is not None and reference_log_odds is not None:
        sides.append(("reference", found.reference_samples, reference_log_odds, None))
    return [
        {
            "model": side,
            "prompt": sample.prompt.task.instruction,
            "sample": sample.prompt.sample,
            "text": sample.text,
            "tokens": len(sample.ids),
            "ended": sample.ended,
            "reward": float(expit(odds[number])),
            "log_odds": float(odds[number]),
            "log_ratio": float(ratios[number]) if ratios is not None else None,
        }
        for side, samples, odds, ratios in sides
        for number, sample in enumerate(samples)
    ]


def prompt_means(values: Floats, samples: Sequence[Sample]) -> Floats:
    """(P,) the mean of (N,) values over the samples of each prompt, in order."""
    places = np.asarray([sample.prompt.index for sample in samples])
    return np.bincount(places, weights=values) / np.bincount(places)
