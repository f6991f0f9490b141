"""One tokenisation rule: render the conversation, tokenise once, find the response by offsets."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.data.pairs import Message, PreferencePair, Skipped
from mallowspo_cli.data.render import Opening, Rendered
from mallowspo_cli.data.table import (
    SCHEMA,
    Oddity,
    TokenIds,
    TokenizedPair,
    TokenizedPairs,
    pair_id,
)
from mallowspo_cli.distributed import progress
from mallowspo_cli.errors import DataError
from mallowspo_cli.recipe.choices import OnError, Truncation
from mallowspo_cli.recipe.schema import DatasetConfig

__all__ = ["TokenizedPair", "TokenizedPairs", "pair_id", "split_response", "tokenize_pairs"]

BATCH_PAIRS = 256
"""Pairs that the tokenizer is given at a time; it works on them in parallel."""
NO_PAIR = "dropped: no preference pair"
"""Cause of a row that no layout could read."""
NO_BOUNDARY = "dropped: the response's tokens cannot be told apart"
"""Cause of a pair on which the tokenisation rule fails."""
ROLE_NAMES = {"user", "assistant", "system", "human", "model", "gpt", "bot"}

Item = PreferencePair | Skipped | DataError
"""What a row of the data became: a pair, nothing for a reason, or an error."""


def prompt_key(prompt: Sequence[Message]) -> int:
    """A 64-bit name of a prompt's text: pairs of one prompt have one key."""
    digest = hashlib.blake2b(digest_size=8)
    for message in prompt:
        for text in (message.role, message.content):
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little", signed=True)


def tokenize_pairs(
    pairs: Sequence[Item], tokenizer: PreTrainedTokenizerBase, config: DatasetConfig
) -> TokenizedPairs:
    """Tokenise pairs in memory and apply the length limits.

    Raises:
        DataError: a response whose tokens cannot be told from the prompt's (unless
            `config.on_error` is drop), or nothing left.
    """
    tables = []
    with progress("tokenising", len(pairs), "pairs") as advance:
        for start in range(0, len(pairs), BATCH_PAIRS):
            batch = [(i, pairs[i], np.nan) for i in range(start, len(pairs))[:BATCH_PAIRS]]
            tables.append(tokenize_items(batch, tokenizer, config))
            advance(len(batch))
    found = TokenizedPairs(tables)
    check_losses(found, config)
    return found


def check_losses(found: TokenizedPairs, config: DatasetConfig) -> None:
    """Stop at the first broken row, unless they are to be dropped, and where nothing is left.

    Raises:
        DataError: that row's error, or the causes.
    """
    stop_at_broken(found, config)
    if not len(found):
        causes = ", ".join(f"{n} {cause}" for cause, n in found.losses.items())
        raise DataError(
            f"no pair of {config.title} is left to score: {causes or 'there were none'}."
        )


def stop_at_broken(found: TokenizedPairs, config: DatasetConfig) -> None:
    """Stop at the first row that is no pair or cannot be tokenised exactly.

    Raises:
        DataError: that row's error, unless `config.on_error` is drop.
    """
    broken = any(cause in found.losses for cause in (NO_PAIR, NO_BOUNDARY))
    if broken and config.on_error is OnError.stop:
        first = next(line["error"] for line in found.lines(["error"]) if line["error"])
        raise DataError(f"{first} Rows like it are left out with dataset.on_error=drop.")


def tokenize_items(
    items: Sequence[tuple[int, Item, float]],
    tokenizer: PreTrainedTokenizerBase,
    config: DatasetConfig,
) -> pa.Table:
    """One line of the table for each (row number, item, number of `dispersion.column`)."""
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, so conversations "
            "cannot be rendered. Use an instruction-tuned model, or give a template: "
            "model.chat_template=plain, dialogue or FILE.jinja."
        )
    pairs = [item for _, item, _ in items if isinstance(item, PreferencePair)]
    spans = iter(split_pairs(pairs, tokenizer, config.header_in_response))
    special = _special_texts(tokenizer)
    lines: list[dict[str, Any]] = []
    for row, item, number in items:
        line: dict[str, Any] = {"row": row, "column": number}
        if isinstance(item, Skipped):
            line |= {"where": item.row, "cause": f"dropped: {item.cause}"}
        elif isinstance(item, DataError):
            line |= {"where": f"row {row}", "cause": NO_PAIR, "error": str(item)}
        else:
            line |= _about(item, special)
            line |= _tokens(next(spans), config)
        lines.append(line)
    return pa.Table.from_pylist(lines, schema=SCHEMA)


def _about(pair: PreferencePair, special: re.Pattern[str]) -> dict[str, Any]:
    """What a table says of a pair beside its tokens."""
    odd = Oddity(0)
    if any(not message.content.strip() for message in pair.prompt):
        odd |= Oddity.BLANK_TURN
    answers = (pair.chosen.content, pair.rejected.content)
    if any(text.strip().lower() in ROLE_NAMES for text in answers):
        odd |= Oddity.ROLE_NAME
    if any(special.search(text) for text in (*answers, *(m.content for m in pair.prompt))):
        odd |= Oddity.SPECIAL_TOKEN
    start = pair.prompt[-1].content
    if start.strip() and all(text.startswith(start) for text in answers):
        odd |= Oddity.REPEATED_PROMPT
    return {
        "where": pair.row,
        "prompt_key": prompt_key(pair.prompt),
        "oddities": int(odd),
        "rater_neg_log_phi": pair.rater_neg_log_phi,
    }


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the spelling of any special token; nothing where there is none."""
    texts = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    words = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words)) if words else r"(?!)")


def _tokens(
    spans: tuple[TokenIds, TokenIds, TokenIds] | DataError, config: DatasetConfig
) -> dict[str, Any]:
    """A pair's tokens within the length limits, or why there are none."""
    if isinstance(spans, DataError):
        return {"cause": NO_BOUNDARY, "error": str(spans)}
    fitted, cause = _fit(*spans, config)
    if fitted is None:
        return {"cause": cause}
    names = ("prompt", "chosen", "rejected")
    return {"cause": cause, "pair_id": pair_id(*fitted), **dict(zip(names, fitted, strict=True))}


def split_pairs(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, header: bool = False
) -> list[tuple[TokenIds, TokenIds, TokenIds] | DataError]:
    """Token ids of prompt, chosen and rejected of each pair, or the error that it meets."""
    results: list[Any] = []
    texts: list[str] = []
    for pair in pairs:
        try:
            opening = Opening(pair.prompt, tokenizer, header, pair.row)
            both = [opening.render(response) for response in (pair.chosen, pair.rejected)]
        except DataError as error:
            results.append(error)
            continue
        results.append(both)
        texts += [rendered.text for rendered in both]
    special = _special_ids(tokenizer)
    encodings = iter(_encode(tokenizer, texts))
    for index, (pair, both) in enumerate(zip(pairs, results, strict=True)):
        if isinstance(both, DataError):
            continue
        # Both are taken from the iterator before either can fail.
        encoded = [(rendered, next(encodings)) for rendered in both]
        try:
            (prompt, chosen), (same, rejected) = (
                _split(rendered, encoding, special, tokenizer) for rendered, encoding in encoded
            )
            if not np.array_equal(prompt, same):
                raise DataError(
                    f"{pair.row}: the prompt's tokens depend on the response: "
                    f"{_show(tokenizer, prompt)} against {_show(tokenizer, same)}."
                )
            results[index] = (prompt, chosen, rejected)
        except DataError as error:
            results[index] = error
    return results


def split_response(
    prompt: Sequence[Message],
    response: Message,
    tokenizer: PreTrainedTokenizerBase,
    row: str,
    header: bool = False,
) -> tuple[TokenIds, TokenIds]:
    """Token ids of the prompt and of the response with its end token.

    The rendered conversation is tokenised once, so that the ids are those of the chat template;
    what the template writes behind the end-of-turn token belongs to neither part. The assistant's
    header belongs to the prompt, unless `header` is set.
    """
    rendered = Opening(prompt, tokenizer, header, row).render(response)
    (encoding,) = _encode(tokenizer, [rendered.text])
    return _split(rendered, encoding, _special_ids(tokenizer), tokenizer)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Sequence[Encoding]:
    """What the tokenizer makes of each text, without special tokens of its own."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
    assert encoded.encodings is not None
    return encoded.encodings


def _split(
    rendered: Rendered, encoding: Encoding, special: set[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenIds, TokenIds]:
    """The prompt's and the response's share of a tokenised conversation."""
    ids, row = np.asarray(encoding.ids, dtype=np.int32), rendered.row
    first = _first_token(encoding, rendered.start)
    if first == 0:
        raise DataError(f"{row}: the chat template renders the prompt as nothing.")
    if _end(encoding, first - 1) > rendered.start:
        raise DataError(
            f"{row}: one token holds the end of the prompt and the beginning of the response: "
            f"{_show(tokenizer, ids[max(0, first - 4) : first + 3])}. Does the response begin with "
            "white space?"
        )
    for index in range(_first_token(encoding, rendered.text_end), len(ids)):
        if int(ids[index]) in special:
            return ids[:first], ids[first : index + 1]
    raise DataError(
        f"{row}: the chat template writes no end-of-turn token behind the response, so the model "
        f"would never learn to stop; it ends in {_show(tokenizer, ids[-5:])}."
    )


def _first_token(encoding: Encoding, character: int) -> int:
    """Index of the first token that begins at or behind a character."""
    index = encoding.char_to_token(character)
    if index is not None:
        span = encoding.token_to_chars(index)
        if span is not None and span[0] == character:
            return index
    # No token begins just there: all offsets are looked at, which is slow.
    starts = np.asarray([start for start, _ in encoding.offsets])
    return int(np.searchsorted(starts, character))


def _end(encoding: Encoding, token: int) -> int:
    """The character behind a token."""
    span = encoding.token_to_chars(token)
    return span[1] if span is not None else encoding.offsets[token][1]


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    # Not every tokenizer that marks its end-of-turn token as special also names it.
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)


def _fit(
    prompt: TokenIds, chosen: TokenIds, rejected: TokenIds, config: DatasetConfig
) -> tuple[tuple[TokenIds, TokenIds, TokenIds] | None, str | None]:
    """The pair within the length limits, or None when it is dropped; and what was done."""
    limit = config.max_prompt_length or config.max_length
    room = min(limit, config.max_length - max(len(chosen), len(rejected)))
    cause = None
    if config.truncation is Truncation.keep_end and len(prompt) > room >= 1:
        prompt = prompt[-room:]
        which = (
            f"{limit:,} tokens"
            if room == limit
            else f"{config.max_length:,} tokens with the response"
        )
        cause = f"prompts cut to fit {which}"
    if len(prompt) > limit:
        return None, f"dropped: prompt longer than {limit:,} tokens"
    if len(prompt) + max(len(chosen), len(rejected)) > config.max_length:
        room = config.max_length - len(prompt)
        if config.truncation is not Truncation.keep_start or room < 1:
            return None, f"dropped: longer than {config.max_length:,} tokens"
        chosen, rejected = chosen[:room], rejected[:room]
        cause = f"responses cut to fit {config.max_length:,} tokens"
    if np.array_equal(chosen, rejected):
        return None, "dropped: responses have the same tokens"
    return (prompt, chosen, rejected), cause


def _show(tokenizer: PreTrainedTokenizerBase, ids: TokenIds) -> str:
    return "|".join(tokenizer.convert_ids_to_tokens(ids[-12:].tolist()))
