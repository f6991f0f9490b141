"""What there is to know of prepared pairs before training on them: `mallowspo data check`.

Findings are plain values, ready for JSON. Rows are named as in the pairs' column `where`.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.data.layouts import EQUAL
from mallowspo_cli.data.prepare import PreparedSplit
from mallowspo_cli.data.table import Oddity, TokenIds, TokenizedPairs, longer_rows
from mallowspo_cli.recipe.schema import DatasetConfig

Findings = dict[str, Any]

EXAMPLES = 3
"""Rows that are named for each finding."""
LAST_TOKENS = 8
"""Tokens that are named among those that responses end in."""
PERCENTILES = (5, 25, 50, 75, 95)
BINS = 40
"""Bins of a histogram, at most."""
BATCHES = (2, 4, 8)
"""Pairs of a padded batch."""
ORDERS = 10
"""Random orders over which the tokens of padded batches are averaged."""
SEED = 0
"""Of those orders."""
EQUAL_TEXT = f"dropped: {EQUAL}"
EQUAL_TOKENS = "dropped: responses have the same tokens"


@dataclass(frozen=True)
class Marks:
    """The tokens at which a model's texts begin and its responses end."""

    bos: int | None
    bos_put: bool
    """Whether the tokenizer itself begins a text with BOS."""
    bos_elsewhere: bool
    """Whether BOS has its place further inside too, as where every turn begins with it."""
    ends: frozenset[int]
    name: Callable[[int], str]
    """A token's text."""


def read_marks(tokenizer: PreTrainedTokenizerBase, directory: Path) -> Marks:
    """The marks of a tokenizer; `directory` is the model's and may have a generation_config.json.

    End tokens are the tokenizer's EOS and those at which generation stops.
    """
    file = directory / "generation_config.json"
    listed = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    stops: list[Any] = [tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    ends = frozenset(int(stop) for stop in stops if stop is not None)
    bos: Any = tokenizer.bos_token_id
    return Marks(
        bos=bos,
        bos_put=bos is not None and tokenizer("")["input_ids"][:1] == [bos],
        bos_elsewhere=bos in ends or _writes_bos_inside(tokenizer),
        ends=ends,
        name=lambda token: str(tokenizer.decode([token], clean_up_tokenization_spaces=False)),
    )


def _writes_bos_inside(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes BOS behind the beginning of a conversation."""
    if not tokenizer.bos_token:
        return False
    question = [{"role": "user", "content": "?"}]
    try:
        text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return False
    bos, rest = str(tokenizer.bos_token), str(text)
    while rest.startswith(bos):
        rest = rest.removeprefix(bos)
    return bos in rest


def find(splits: Mapping[str, PreparedSplit], config: DatasetConfig, marks: Marks) -> Findings:
    """All findings, but the warnings.

    `splits` may be empty ones: what became of their rows is found then.
    """
    train, held_out = splits["train"], splits.get("eval")
    return {
        "limits": {
            "max_length": config.max_length,
            "max_prompt_length": config.max_prompt_length or config.max_length,
            "truncation": config.truncation.value,
        },
        "splits": {name: _of_split(split, marks) for name, split in splits.items()},
        "overlap": prompt_overlap(train.pairs, held_out.pairs) if held_out is not None else None,
        "gain": predicted_gain(train.pairs.lengths) if len(train.pairs) else None,
    }


def _of_split(split: PreparedSplit, marks: Marks) -> Findings:
    pairs = split.pairs
    counts = np.bincount(split.parts, minlength=len(split.part_names)).tolist()
    causes = losses(pairs)
    return {
        "rows": split.rows,
        "of_split": pairs.considered,
        "pairs": len(pairs),
        "layouts": split.layouts,
        "parts": {name: n for name, n in zip(split.part_names, counts, strict=True) if name},
        "losses": causes,
        "equal_responses": {
            "text": causes.get(EQUAL_TEXT, {"count": 0})["count"],
            "tokens": causes.get(EQUAL_TOKENS, {"count": 0})["count"],
        },
        "lengths": length_table(pairs.lengths) if len(pairs) else None,
        "length_bias": length_bias(pairs.lengths) if len(pairs) else None,
        "duplicates": duplicates(pairs),
        "contradictions": contradictions(pairs),
        "bos": beginnings(pairs, marks),
        "end": endings(pairs, marks),
        "oddities": oddities(pairs),
    }


def losses(pairs: TokenizedPairs) -> Findings:
    """For each cause: pairs or rows that were dropped or cut, their share, and examples."""
    lines = list(pairs.lines(["cause", "where", "error"]))
    found: Findings = {}
    for line in lines:
        if line["cause"] is None:
            continue
        of_cause = found.setdefault(line["cause"], {"count": 0, "examples": []})
        of_cause["count"] += 1
        if len(of_cause["examples"]) < EXAMPLES:
            of_cause["examples"].append({"where": line["where"], "error": line["error"]})
    for cause, count in pairs.losses.items():
        # Pairs beyond a cap or a mixture's weights are counted, and are no lines.
        found.setdefault(cause, {"count": count, "examples": []})
    for cause, of_cause in found.items():
        of_cause["share"] = of_cause["count"] / pairs.considered
        of_cause["dropped"] = cause.startswith("dropped")
    return found


def length_table(lengths: NDArray[np.int64]) -> Findings:
    """Mean, percentiles, maximum and histogram of the tokens of each part of a pair.

    Args:
        lengths: (N, 3) tokens of prompt, chosen and rejected, N > 0.

    Returns:
        Part to numbers. `row` is the prompt with the longer response, which `max_length` limits;
        `pair` is P + C + R.
    """
    prompt, chosen, rejected = lengths.T
    parts = {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "row": longer_rows(lengths),
        "pair": prompt + chosen + rejected,
    }
    longest = {name: int(values.max()) for name, values in parts.items()}
    longest["chosen"] = longest["rejected"] = int(lengths[:, 1:].max())
    return {name: _distribution(values, longest[name]) for name, values in parts.items()}


def _distribution(values: NDArray[np.int64], longest: int) -> Findings:
    # Whole widths: bins that hold now one length and now two would look like a comb.
    width = longest // BINS + 1
    counts, edges = np.histogram(values, bins=np.arange(longest // width + 2) * width)
    percentiles = np.percentile(values, PERCENTILES).tolist()
    return {
        "mean": float(values.mean()),
        **{f"p{share}": n for share, n in zip(PERCENTILES, percentiles, strict=True)},
        "max": int(values.max()),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def length_bias(lengths: NDArray[np.int64]) -> Findings:
    """How much a preference for length would explain: shares of pairs, and chosen minus rejected.

    Args:
        lengths: (N, 3) tokens of prompt, chosen and rejected, N > 0.
    """
    difference = lengths[:, 1] - lengths[:, 2]
    return {
        "chosen_longer": float((difference > 0).mean()),
        "rejected_longer": float((difference < 0).mean()),
        "mean_difference": float(difference.mean()),
    }


def duplicates(pairs: TokenizedPairs) -> Findings:
    """Pairs that occur more than once, token for token."""
    ids = np.asarray(pairs.pair_ids, dtype=str)
    _, group, counts = np.unique(ids, return_inverse=True, return_counts=True)
    where = pairs.values("where")
    groups = _groups(group, counts > 1)
    return {
        "pairs": int(counts[counts > 1].sum()),
        "distinct": int((counts > 1).sum()),
        "examples": [where[lines].tolist()[:EXAMPLES] for lines in groups[:EXAMPLES]],
    }


def contradictions(pairs: TokenizedPairs) -> Findings:
    """Prompts whose two responses stand the other way round in another pair, token for token."""
    prompt, chosen, rejected = (
        pairs.of_lists(name, _hashes).astype(np.int64) for name in ("prompt", "chosen", "rejected")
    )
    ends = np.minimum(chosen, rejected), np.maximum(chosen, rejected)
    keys = np.stack([prompt, *ends], axis=1)
    _, group, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    forward = np.bincount(group[chosen < rejected], minlength=len(counts))
    both = (forward > 0) & (forward < counts)
    where = pairs.values("where")
    examples = []
    for lines in _groups(group, both)[:EXAMPLES]:
        first = lines[0]
        against = next(line for line in lines if chosen[line] != chosen[first])
        examples.append([where[first], where[against]])
    return {"pairs": int(counts[both].sum()), "distinct": int(both.sum()), "examples": examples}


def _hashes(offsets: NDArray[np.int32], tokens: TokenIds) -> NDArray[Any]:
    """(L,) 64-bit names of token lists: two of 100,000 lists collide with p < 1e-9."""
    data = np.ascontiguousarray(tokens).data
    spans = itertools.pairwise(offsets.tolist())
    digests = [hashlib.blake2b(data[a:b], digest_size=8).digest() for a, b in spans]
    return np.frombuffer(b"".join(digests), dtype=np.int64)


def _groups(group: NDArray[np.int64], wanted: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Positions of each wanted group, by first position; no more groups than are shown."""
    lines = np.flatnonzero(wanted[group])
    firsts = dict.fromkeys(group[lines].tolist())
    return [lines[group[lines] == name] for name in list(firsts)[:EXAMPLES]]


def prompt_overlap(train: TokenizedPairs, held_out: TokenizedPairs) -> Findings:
    """Held-out pairs whose prompt's text is in the training split too."""
    known, keys = train.values("prompt_key"), held_out.values("prompt_key")
    shared = np.isin(keys, known)
    first = dict(zip(known[::-1].tolist(), range(len(known) - 1, -1, -1), strict=True))
    trained, tested = train.values("where"), held_out.values("where")
    lines = np.flatnonzero(shared)[:EXAMPLES]
    return {
        "pairs": int(shared.sum()),
        "prompts": len(np.unique(keys[shared])),
        "share": float(shared.mean()) if len(shared) else 0.0,
        "examples": [
            {"eval": tested[line], "train": trained[first[int(keys[line])]]} for line in lines
        ],
    }


def beginnings(pairs: TokenizedPairs, marks: Marks) -> Findings | None:
    """BOS tokens at the prompts' start and further inside; None for a tokenizer without BOS."""
    bos = marks.bos
    if bos is None:
        return None

    def count(offsets: NDArray[np.int32], tokens: TokenIds) -> NDArray[Any]:
        before = np.concatenate([[0], np.cumsum(tokens == bos)])
        return before[offsets[1:]] - before[offsets[:-1]]

    def leading(offsets: NDArray[np.int32], tokens: TokenIds) -> NDArray[Any]:
        others = np.append(np.flatnonzero(tokens != bos), len(tokens))
        first_other = others[np.searchsorted(others, offsets[:-1])]
        return np.minimum(first_other, offsets[1:]) - offsets[:-1]

    start = pairs.of_lists("prompt", leading)
    total = sum(pairs.of_lists(name, count) for name in ("prompt", "chosen", "rejected"))
    inside = total - start
    # A place of its own inside explains any number of them.
    extra = inside > 0 if not marks.bos_elsewhere else np.zeros(len(pairs), dtype=bool)
    return {
        "token": marks.name(bos),
        "expected_at_start": marks.bos_put or bool((start > 0).any()),
        "expected_inside": marks.bos_elsewhere,
        "none": _marked(pairs, start == 0),
        "one": int((start == 1).sum()),
        "several": _marked(pairs, start > 1),
        "inside": _marked(pairs, extra),
    }


def endings(pairs: TokenizedPairs, marks: Marks) -> Findings:
    """The responses' last tokens, and which of them are no end token."""

    def last(offsets: NDArray[np.int32], tokens: TokenIds) -> NDArray[Any]:
        # Behind the end of an empty list stands -1.
        return np.where(np.diff(offsets) > 0, np.append(tokens, -1)[offsets[1:] - 1], -1)

    tokens = np.stack([pairs.of_lists(name, last) for name in ("chosen", "rejected")], axis=1)
    missing = ~np.isin(tokens, list(marks.ends))
    counted = Counter(tokens.reshape(-1).astype(int).tolist())
    return {
        "tokens": [marks.name(token) for token in sorted(marks.ends)],
        "responses": 2 * len(pairs),
        "missing": int(missing.sum()),
        "examples": pairs.values("where")[missing.any(axis=1)][:EXAMPLES].tolist(),
        "last": [
            {"token": marks.name(token), "id": token, "count": n, "ends": token in marks.ends}
            for token, n in counted.most_common(LAST_TOKENS)
        ],
    }


def oddities(pairs: TokenizedPairs) -> Findings:
    """For each kind of oddity: pairs that have it, and examples."""
    flags = pairs.values("oddities").astype(np.int64)
    return {str(odd.name).lower(): _marked(pairs, (flags & odd) > 0) for odd in Oddity}


def _marked(pairs: TokenizedPairs, marked: NDArray[np.bool_]) -> Findings:
    return {
        "count": int(marked.sum()),
        "examples": pairs.values("where")[marked][:EXAMPLES].tolist(),
    }


def predicted_gain(lengths: NDArray[np.int64]) -> Findings:
    """How many times fewer tokens a model reads without padding, and with each prompt read once.

    Derived: a pair has 2P + C + R tokens in a pack, P + C + R where its responses share one
    prompt (arXiv 2410.20305), and 2 max(P + max(C, R)) in a padded batch, whose maximum is over
    the batch. Packs are taken as full (best-fit packing fills 96 to 99 %). Tokens are not time:
    attention, the head and launches are left out.

    Args:
        lengths: (N, 3) tokens P, C, R of prompt, chosen and rejected, N > 0.

    Returns:
        `sharing`; and for each batch size `packing` (padded to packed) and `both`.
    """
    prompt, chosen, rejected = (int(total) for total in lengths.sum(axis=0))
    packed, shared = 2 * prompt + chosen + rejected, prompt + chosen + rejected
    rows = longer_rows(lengths)
    orders = [np.random.default_rng([SEED, i]).permutation(len(rows)) for i in range(ORDERS)]
    batches = {}
    for size in BATCHES:
        padded = float(np.mean([padded_tokens(rows[order], size) for order in orders]))
        batches[str(size)] = {
            "padded_tokens": padded,
            "packing": padded / packed,
            "both": padded / shared,
        }
    return {
        "packed_tokens": packed,
        "shared_tokens": shared,
        "sharing": packed / shared,
        "batches": batches,
    }


def padded_tokens(rows: NDArray[np.int64], batch: int) -> int:
    """Tokens of padded batches, padding included: two rows a pair, as long as the batch's longest.

    Args:
        rows: (N,) tokens of each pair's longer row, in the order of the batches.
        batch: pairs of a batch; the last may have fewer.
    """
    starts = np.arange(0, len(rows), batch)
    sizes = np.diff(np.append(starts, len(rows)))
    return int(2 * (np.maximum.reduceat(rows, starts) * sizes).sum())
