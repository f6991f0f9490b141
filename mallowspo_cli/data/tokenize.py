"""One tokenisation rule: render the conversation, tokenise once, find the response by offsets."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.data.pairs import Message, PreferencePair
from mallowspo_cli.distributed import progress
from mallowspo_cli.errors import DataError
from mallowspo_cli.recipe.schema import DatasetConfig, Truncation

TokenIds = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """Token ids of one pair. A response holds what is trained: its text and its end token."""

    pair_id: str
    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds


@dataclass(frozen=True)
class TokenizedPairs(Sequence[TokenizedPair]):
    """Pairs ready to score, and what was left out or cut on the way."""

    pairs: list[TokenizedPair]
    losses: Counter[str] = field(default_factory=Counter)
    """Cause to number of pairs dropped or cut."""

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]

    @property
    def pair_ids(self) -> list[str]:
        """Content ids, in order."""
        return [pair.pair_id for pair in self.pairs]


def pair_id(prompt: TokenIds, chosen: TokenIds, rejected: TokenIds) -> str:
    """blake2b-128 (hex) of the three token lists, each as its length and its ids, little-endian.

    Shuffling, filtering or sharding can never pair a score with the wrong example.
    """
    digest = hashlib.blake2b(digest_size=16)
    for ids in (prompt, chosen, rejected):
        digest.update(np.int32(len(ids)).astype("<i4").tobytes())
        digest.update(np.asarray(ids, dtype="<i4").tobytes())
    return digest.hexdigest()


def tokenize_pairs(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, config: DatasetConfig
) -> TokenizedPairs:
    """Tokenise pairs and apply the length limits.

    Raises:
        DataError: a response whose tokens cannot be told from the prompt's, or nothing left.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, so conversations "
            "cannot be rendered. Use an instruction-tuned model, or set tokenizer.chat_template "
            "in a local copy of the model."
        )
    kept, losses = [], Counter[str]()
    with progress("tokenising", len(pairs), "pairs") as advance:
        for pair in pairs:
            fitted = _fit(*_split_pair(pair, tokenizer), config, losses)
            if fitted is not None:
                kept.append(TokenizedPair(pair_id(*fitted), *fitted))
            advance(1)
    if not kept:
        causes = ", ".join(f"{n} {cause}" for cause, n in losses.items()) or "there were none"
        raise DataError(f"no pair is left to score: {causes}.")
    return TokenizedPairs(kept, losses)


def _split_pair(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenIds, TokenIds, TokenIds]:
    """Token ids of the prompt, the chosen and the rejected response."""
    prompt, chosen = split_response(pair.prompt, pair.chosen, tokenizer, pair.row)
    same, rejected = split_response(pair.prompt, pair.rejected, tokenizer, pair.row)
    if not np.array_equal(prompt, same):
        raise DataError(
            f"{pair.row}: the prompt's tokens depend on the response: "
            f"{_show(tokenizer, prompt)} against {_show(tokenizer, same)}."
        )
    return prompt, chosen, rejected


def split_response(
    prompt: Sequence[Message], response: Message, tokenizer: PreTrainedTokenizerBase, row: str
) -> tuple[TokenIds, TokenIds]:
    """Token ids of the prompt (with the response's header) and of the response with its end token.

    The rendered conversation is tokenised once, so that the ids are those of the chat template;
    what the template writes behind the end-of-turn token belongs to neither part.
    """
    history = [message.as_dict() for message in prompt]
    try:
        opening = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
        rendered = tokenizer.apply_chat_template([*history, response.as_dict()], tokenize=False)
    except TemplateError as error:
        roles = ", ".join(message.role for message in (*prompt, response))
        raise DataError(
            f"{row}: the chat template refuses the conversation (roles: {roles!r}): "
            f"{' '.join(str(error).split())}."
        ) from error
    assert isinstance(opening, str)
    assert isinstance(rendered, str)
    if not rendered.startswith(opening):
        raise DataError(
            f"{row}: the chat template renders the prompt differently before a response "
            f"(...{opening[-40:]!r} is not how the whole conversation begins)."
        )
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(encoded["input_ids"], dtype=np.int32)
    starts = np.asarray([offset[0] for offset in encoded["offset_mapping"]])
    ends = np.asarray([offset[1] for offset in encoded["offset_mapping"]])
    first = int(np.searchsorted(starts, len(opening)))
    if first == 0:
        raise DataError(f"{row}: the chat template renders the prompt as nothing.")
    if ends[first - 1] > len(opening):
        raise DataError(
            f"{row}: one token holds the end of the prompt and the beginning of the response: "
            f"{_show(tokenizer, ids[max(0, first - 4) : first + 3])}. Does the response begin with "
            "white space?"
        )
    text = response.content.strip()
    text_start = rendered.find(text, len(opening))
    if text_start < 0:
        raise DataError(
            f"{row}: the chat template changes the response's text: {_cut(text)} is not in "
            f"{_cut(rendered[len(opening) :])}."
        )
    last = _end_of_turn(ids, starts, text_start + len(text), tokenizer, row)
    return ids[:first], ids[first : last + 1]


def _end_of_turn(
    ids: TokenIds,
    starts: NDArray[np.int64],
    text_end: int,
    tokenizer: PreTrainedTokenizerBase,
    row: str,
) -> int:
    """Index of the token that ends the response: the first special token behind its text."""
    behind = int(np.searchsorted(starts, text_end))
    # Not every tokenizer that marks its end-of-turn token as special also names it.
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = marked | set(tokenizer.all_special_ids)
    for index in range(behind, len(ids)):
        if int(ids[index]) in special:
            return index
    raise DataError(
        f"{row}: the chat template writes no end-of-turn token behind the response, so the model "
        f"would never learn to stop; it ends in {_show(tokenizer, ids[-5:])}."
    )


def _fit(
    prompt: TokenIds,
    chosen: TokenIds,
    rejected: TokenIds,
    config: DatasetConfig,
    losses: Counter[str],
) -> tuple[TokenIds, TokenIds, TokenIds] | None:
    """The pair within the length limits, or None when it is dropped; counts what was done."""
    limit = config.max_prompt_length or config.max_length
    room = min(limit, config.max_length - max(len(chosen), len(rejected)))
    cut = None
    if config.truncation is Truncation.keep_end and len(prompt) > room >= 1:
        prompt = prompt[-room:]
        cut = f"prompts cut to fit {config.max_length:,} tokens"
    if len(prompt) > limit:
        losses[f"dropped: prompt longer than {limit:,} tokens"] += 1
        return None
    if len(prompt) + max(len(chosen), len(rejected)) > config.max_length:
        room = config.max_length - len(prompt)
        if config.truncation is not Truncation.keep_start or room < 1:
            losses[f"dropped: longer than {config.max_length:,} tokens"] += 1
            return None
        chosen, rejected = chosen[:room], rejected[:room]
        cut = f"responses cut to fit {config.max_length:,} tokens"
    if np.array_equal(chosen, rejected):
        losses["dropped: responses have the same tokens"] += 1
        return None
    if cut is not None:
        losses[cut] += 1
    return prompt, chosen, rejected


def _cut(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _show(tokenizer: PreTrainedTokenizerBase, ids: TokenIds) -> str:
    return "|".join(tokenizer.convert_ids_to_tokens(ids[-12:].tolist()))
