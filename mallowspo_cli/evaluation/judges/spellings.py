"""Spellings of special tokens in texts that others wrote: a server reads them as the tokens."""

import re
from collections.abc import Iterable

SPECIAL = re.compile(
    r"<\|[^\s|<>]{1,64}\|>"  # ChatML, Llama 3, Phi, Command R
    r"|<\uff5c[^<>]{1,64}\uff5c>"  # DeepSeek
    r"|</?s>|<(?:bos|eos|pad|unk|mask|sep|cls|sop|eop|BOS_TOKEN|EOS_TOKEN|EOD|unused\d+)>"
    r"|</?(?:start|end)_of_[a-z]+>"  # Gemma, Granite
    r"|<</?SYS>>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT)\]"
    r"|\[/?(?:CLS|SEP|PAD|g?MASK|UNK|BOS|EOS|THINK|IMG)\]"
)
"""What the usual chat models spell their special tokens like."""


def break_special(text: str, others: Iterable[str] = ()) -> tuple[str, int]:
    """The text with a space behind the first character of each such spelling, and their number.

    Adding a space cannot make another one.

    Args:
        others: spellings of the special tokens of the tokenizer in hand.
    """
    # Longest first: one may be the beginning of another.
    words = sorted((word for word in others if len(word) > 1), key=len, reverse=True)
    pattern = SPECIAL
    if words:
        pattern = re.compile("|".join([*map(re.escape, words), SPECIAL.pattern]))
    return pattern.subn(lambda found: f"{found[0][0]} {found[0][1:]}", text)
