"""One tokenisation rule: exact against the chat template, or one clear refusal."""

import copy
import hashlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mallowspo_cli.data.pairs import Message, PreferencePair
from mallowspo_cli.data.tokenize import TokenizedPairs, pair_id, split_response, tokenize_pairs
from mallowspo_cli.errors import DataError
from mallowspo_cli.models.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, build_byte_tokenizer
from mallowspo_cli.recipe.choices import Truncation
from mallowspo_cli.recipe.schema import DatasetConfig

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] "
    "+ '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The end-of-turn token is marked as special, but is no named token; eos comes behind it.
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] "
    "+ '<|stop|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Writes an empty thought in front of the last response, which the generation prompt has not.
THINK = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last and not add_generation_prompt %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "tiny": CHAT_TEMPLATE,
    "chatml": CHATML,
    "llama3": LLAMA3,
    "phi3": PHI3,
    "think": THINK,
}
END = {
    "tiny": "<|end|>",
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "phi3": "<|stop|>",
    "think": "<|im_end|>",
}
MARKED = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MARKED += ["<|stop|>"]


def with_template(
    tokenizer: PreTrainedTokenizerBase, template: str, tokens: list[str] = MARKED
) -> PreTrainedTokenizerBase:
    """A copy with another chat template, and with special tokens that it does not name."""
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    changed.chat_template = template
    return changed


BYTES = {name: with_template(build_byte_tokenizer(), TEMPLATES[name]) for name in TEMPLATES}


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def answer(text: str) -> Message:
    return Message("assistant", text)


def ids_of(
    tokenizer: PreTrainedTokenizerBase, history: tuple[Message, ...], **options
) -> list[int]:
    """What the chat template itself gives."""
    conversation = [message.as_dict() for message in history]
    encoded = tokenizer.apply_chat_template(
        conversation, tokenize=True, return_dict=True, **options
    )
    return encoded["input_ids"]


def assert_exact(
    tokenizer: PreTrainedTokenizerBase, prompt: tuple[Message, ...], response: Message, end: str
) -> None:
    """Prompt and response are the template's own ids, up to and with its last end token."""
    head, tail = split_response(prompt, response, tokenizer, "f row 0")
    whole = ids_of(tokenizer, (*prompt, response))
    end_id = tokenizer.convert_tokens_to_ids(end)
    stop = len(whole) - whole[::-1].index(end_id)
    assert [*head, *tail] == whole[:stop]
    assert tail[-1] == end_id
    text = tokenizer.apply_chat_template(
        [message.as_dict() for message in prompt], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(head, clean_up_tokenization_spaces=False) == text
    assert head.dtype == tail.dtype == np.int32


PIECES = [
    *("user", "assistant", "system", "end", "n", "<", "|", ">", "<|", "|>", " ", "\n", "\n\n"),
    *(
        "think",
        "\xe9",
        "e\u0301",
        "🙂",
        "👩\u200d👩\u200d👧",
        "\u2028",
        "\xa0",
        "\0",
        "\ufeff",
        "漢",
    ),
    *("ש", "  x", "{{ bos_token }}", "{% raise %}", "</s>", "[INST]"),
    *SPECIAL_TOKENS,
    *MARKED,
]
CONTENTS = st.one_of(
    st.text(max_size=12), st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
)


ADVERSARIAL = [
    *("a", "?", "user", "assistant", "system", "model", "message", "\N{ZERO WIDTH SPACE}x"),
    *("<|assistant|>", "<|im_start|>assistant", "x<|end|>y", "<|user|>hi<|end|>", "</s>", "[INST]"),
    *("שלום עולם", "مرحبا بالعالم", "🙂", "👩\u200d👩\u200d👧 family", "é vs e\u0301", "漢字かな"),
    *("{{ bos_token }}", "{% raise %}", "line\n\n\nline", "tab\tend", "x " * 5000, "🙂" * 2500),
]


HEADERS = {
    "tiny": "<|assistant|>",
    "chatml": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("text", ADVERSARIAL, ids=lambda text: repr(text[:20]))
def test_the_responses_tokens_decode_to_the_response(name: str, text: str) -> None:
    _, tail = split_response(user("Hi"), answer(text), BYTES[name], "f row 0")
    decoded = BYTES[name].decode(tail, clean_up_tokenization_spaces=False)
    # Two templates write something of their own around the text.
    thought = "<think>\n\n</think>\n\n" if name == "think" else ""
    trimmed = text.strip() if name == "llama3" else text
    assert decoded == f"{thought}{trimmed}{END[name]}"


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("text", ADVERSARIAL, ids=lambda text: repr(text[:20]))
def test_the_header_moves_whole_from_the_prompt_to_the_response(name: str, text: str) -> None:
    head, tail = split_response(user("Hi"), answer(text), BYTES[name], "f row 0")
    before, after = split_response(user("Hi"), answer(text), BYTES[name], "f row 0", header=True)
    assert [*before, *after] == [*head, *tail]
    moved = BYTES[name].decode(after[: len(after) - len(tail)])
    assert moved == HEADERS[name]


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - HEADERS.keys()))
def test_a_header_that_cannot_be_told_apart_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"header cannot be told apart.*header_in_response=false"):
        split_response(user("Hi"), answer("yes"), BYTES[name], "f row 0", header=True)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "text",
    [
        *"endio<|>_",
        *("user", "end", "think", "<|end|>", "a<|im_end|>", "<|eot_id|>b"),
        *("  lead", "trail \n", "two\n\nparagraphs", "🙂", " "),
    ],
)
def test_prompt_and_response_are_the_templates_ids_up_to_its_end_token(
    name: str, text: str
) -> None:
    assert_exact(BYTES[name], user("Say it: " + text), answer(text), END[name])


@pytest.mark.parametrize("name", TEMPLATES)
@given(
    prompt=st.lists(
        st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), CONTENTS),
        min_size=1,
        max_size=4,
    ),
    text=CONTENTS,
)
@settings(max_examples=60)
def test_any_content_in_any_turn_is_exact(name: str, prompt: list[Message], text: str) -> None:
    assert_exact(BYTES[name], tuple(prompt), answer(text), END[name])


def merging_tokenizer(template: str) -> PreTrainedTokenizerBase:
    """Byte-level BPE with merges over white space, so that a token can hold both sides."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Behind a line end or a space: the same again, and the first letter of some words.
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ċ", "Ġ"), ("Ġ", "x"), ("Ċ", "u"), ("e", "n"), ("en", "d")]
    tokens = [*alphabet, *("".join(merge) for merge in merges)]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    begin, end, pad = SPECIAL_TOKENS[:3]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=begin, eos_token=end, pad_token=pad
    )
    return with_template(tokenizer, template)


MERGING = {name: merging_tokenizer(template) for name, template in TEMPLATES.items()}


@pytest.mark.parametrize("name", TEMPLATES)
@given(prompt=CONTENTS, text=CONTENTS)
@settings(max_examples=60)
def test_with_merges_over_the_boundary_content_is_exact_or_refused_in_one_line(
    name: str, prompt: str, text: str
) -> None:
    refused = ""
    try:
        assert_exact(MERGING[name], user(prompt), answer(text), END[name])
    except DataError as error:
        refused = str(error)
    over_boundary = refused.startswith("f row 0: one token holds the end of the prompt")
    assert not refused or (over_boundary and len(refused.splitlines()) == 1)


def test_a_token_over_the_boundary_is_refused() -> None:
    with pytest.raises(DataError, match="one token holds the end of the prompt and the beginning"):
        split_response(user("x"), answer("\n\nyes"), MERGING["chatml"], "f row 0")
    assert_exact(MERGING["chatml"], user("x"), answer("yes"), "<|im_end|>")


def test_a_prompt_whose_tokens_depend_on_the_response_is_refused() -> None:
    # "ab" is one token, unless a Z follows anywhere.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "ab"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("a(?=.*Z)"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ':' }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"  # noqa: E501
    pair = PreferencePair(user("ab"), answer("Z"), answer("y"), "f row 0")
    with pytest.raises(DataError, match=r"^f row 0: the prompt's tokens depend on the response"):
        tokenize_pairs([pair], tokenizer, DatasetConfig())


def test_multi_turn_conversations_with_a_system_prompt_are_exact() -> None:
    history = (Message("system", "Be brief."), *user("Hi"), answer("end"), *user("More"))
    for name, tokenizer in BYTES.items():
        assert_exact(tokenizer, history, answer("end"), END[name])


@pytest.mark.parametrize(("name", "expected"), [("tiny", 1), ("llama3", 1), ("chatml", 0)])
def test_bos_is_there_as_often_as_the_template_writes_it(name: str, expected: int) -> None:
    tokenizer = copy.deepcopy(BYTES[name])
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, bos)]
    )
    assert tokenizer("x")["input_ids"][0] == bos
    prompt, response = split_response(user("Hi"), answer("yes"), tokenizer, "f row 0")
    assert [*prompt, *response].count(bos) == expected
    assert prompt[:expected].tolist() == [bos] * expected


def test_a_template_that_trims_white_space_is_followed() -> None:
    tokenizer = BYTES["llama3"]
    _, response = split_response(user(" Hi "), answer(" \n yes\t"), tokenizer, "f row 0")
    assert tokenizer.decode(response) == "yes<|eot_id|>"


def test_the_first_special_token_behind_the_text_ends_the_response_named_or_not() -> None:
    tokenizer = BYTES["phi3"]
    assert "<|stop|>" not in tokenizer.all_special_tokens
    _, response = split_response(user("Hi"), answer("yes"), tokenizer, "f row 0")
    assert tokenizer.decode(response) == "yes<|stop|>"


def refusal(template: str, prompt: tuple[Message, ...] = user("Hello"), text: str = "yes") -> str:
    tokenizer = with_template(build_byte_tokenizer(), template)
    with pytest.raises(DataError) as error:
        split_response(prompt, answer(text), tokenizer, "f row 3")
    message = str(error.value)
    assert message.startswith("f row 3: ")
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("change", ["[:2]", " | upper", ".split('s')[0]", " | replace('y', '')"])
def test_a_template_that_changes_the_responses_text_is_refused(change: str) -> None:
    template = CHATML.replace("message['content']", f"message['content']{change}")
    assert "changes the response's text: 'yes' is not in" in refusal(template, user("12"))


def test_a_text_that_only_the_prompt_holds_is_not_taken_for_the_response() -> None:
    # A search over the whole conversation would find it there.
    template = CHATML.replace("message['content'] ", "(message['content'] | replace('yes', '')) ")
    template = template.replace("message['role'] + '\n'", "message['role'] + ' yes\n'")
    template = template.replace("assistant\n' }}{% endif", "assistant yes\n' }}{% endif")
    assert "changes the response's text" in refusal(template)


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace(
            "<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant\n<think>' }}{% endif"
        ),
        "{{ messages | length }}" + CHATML,
        CHATML.replace("message['content'] +", "(message['content'] if loop.last else 'cut') +"),
    ],
)
def test_a_template_that_renders_the_prompt_differently_is_refused(template: str) -> None:
    assert "renders the prompt differently before a response" in refusal(template)


@pytest.mark.parametrize("end", ["", "\n", "### End"])
def test_a_template_without_an_end_token_is_refused(end: str) -> None:
    template = CHATML.replace("'<|im_end|>' + '\n'", repr(end))
    assert "writes no end-of-turn token behind the response" in refusal(template)


def test_a_template_that_writes_nothing_before_the_response_is_refused() -> None:
    template = "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"  # noqa: E501
    assert "renders the prompt as nothing" in refusal(template)


def test_a_conversation_that_the_template_refuses_is_refused_with_its_words_and_roles() -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('no system\nprompts') }}{% endif %}" + CHATML
    )
    message = refusal(template, (Message("system", "x"), *user("y")))
    assert "no system prompts" in message
    assert "roles: 'system, user'" in message
    # Jinja's own errors too, such as a key that is not there.
    assert "refuses" in refusal("{{ messages[0]['content'].nothing.more }}")


def test_a_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = None
    pair = PreferencePair(user("a"), answer("b"), answer("c"), "f row 0")
    with pytest.raises(DataError, match="has no chat template") as error:
        tokenize_pairs([pair], tokenizer, DatasetConfig())
    assert "\n" not in str(error.value)


# Length limits. With the tiny template a prompt of n bytes has n + 5 tokens, a response n + 1.


def pair_of(prompt: int, chosen: int, rejected: int) -> PreferencePair:
    return PreferencePair(
        user("p" * prompt), answer("c" * chosen), answer("r" * rejected), "f row 0"
    )


def tokenized(pairs: list[PreferencePair], truncation: str = "drop", **limits) -> TokenizedPairs:
    config = DatasetConfig(path="-", truncation=Truncation(truncation), **limits)
    return tokenize_pairs(pairs, BYTES["tiny"], config)


def lengths(pairs: TokenizedPairs) -> list[tuple[int, int, int]]:
    return [(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs]


END_ID = BYTES["tiny"].eos_token_id


@pytest.mark.parametrize("truncation", list(Truncation))
def test_pairs_at_the_limit_are_left_alone(truncation: Truncation) -> None:
    found = tokenized([pair_of(5, 9, 4)], truncation, max_length=20, max_prompt_length=10)
    assert lengths(found) == [(10, 10, 5)]
    assert not found.losses


def test_drop_leaves_out_what_is_too_long_and_counts_why() -> None:
    pairs = [pair_of(5, 9, 4), pair_of(5, 10, 4), pair_of(5, 4, 10), pair_of(6, 1, 2)]
    found = tokenized(pairs, max_length=20, max_prompt_length=10)
    assert lengths(found) == [(10, 10, 5)]
    assert found.losses == {
        "dropped: longer than 20 tokens": 2,
        "dropped: prompt longer than 10 tokens": 1,
    }


def test_keep_start_cuts_responses_which_then_have_no_end_token() -> None:
    whole = tokenized([pair_of(5, 20, 4)], max_length=100)[0]
    found = tokenized([pair_of(5, 20, 4), pair_of(5, 2, 3)], "keep_start", max_length=20)
    assert lengths(found) == [(10, 10, 5), (10, 3, 4)]
    assert found[0].chosen.tolist() == whole.chosen[:10].tolist()
    assert END_ID not in found[0].chosen
    assert found[0].rejected[-1] == END_ID
    assert found.losses == {"responses cut to fit 20 tokens": 1}


def test_keep_start_drops_what_leaves_no_room_for_a_response() -> None:
    pairs = [pair_of(15, 3, 4), pair_of(16, 3, 4), pair_of(3, 1, 2)]
    found = tokenized(pairs, "keep_start", max_length=20)
    assert lengths(found) == [(8, 2, 3)]
    assert found.losses == {
        "dropped: longer than 20 tokens": 1,
        "dropped: prompt longer than 20 tokens": 1,
    }


def test_keep_end_cuts_the_beginning_of_the_prompt_alone() -> None:
    whole = tokenized([pair_of(30, 4, 2)], max_length=100)[0]
    found = tokenized([pair_of(30, 4, 2)], "keep_end", max_length=20)[0]
    assert found.prompt.tolist() == whole.prompt[-15:].tolist()
    assert (found.chosen.tolist(), found.rejected.tolist()) == (
        whole.chosen.tolist(),
        whole.rejected.tolist(),
    )
    short = tokenized([pair_of(30, 4, 2)], "keep_end", max_length=20, max_prompt_length=6)
    assert lengths(short) == [(6, 5, 3)]
    assert short.losses == {"prompts cut to fit 6 tokens": 1}


def test_keep_end_drops_responses_that_leave_no_room_for_a_prompt() -> None:
    found = tokenized([pair_of(3, 19, 2), pair_of(3, 18, 2)], "keep_end", max_length=20)
    assert lengths(found) == [(1, 19, 3)]
    assert found.losses == {
        "dropped: longer than 20 tokens": 1,
        "prompts cut to fit 20 tokens with the response": 1,
    }


def test_responses_with_the_same_tokens_are_dropped_and_counted_once() -> None:
    twins = PreferencePair(user("p"), answer("same then a"), answer("same then b"), "f row 0")
    found = tokenized([twins, pair_of(1, 2, 3)], "keep_start", max_length=12)
    assert lengths(found) == [(6, 3, 4)]
    assert found.losses == {"dropped: responses have the same tokens": 1}
    trimmed = PreferencePair(user("p"), answer("a"), answer(" a "), "f row 0")
    other = PreferencePair(user("p"), answer("a"), answer("b"), "f row 1")
    found = tokenize_pairs([trimmed, other], BYTES["llama3"], DatasetConfig())
    assert len(found) == 1
    assert found.losses == {"dropped: responses have the same tokens": 1}


@pytest.mark.parametrize("truncation", list(Truncation))
@given(
    sizes=st.lists(st.tuples(*[st.integers(0, 30)] * 3), min_size=1, max_size=8),
    max_length=st.integers(2, 60),
    max_prompt_length=st.none() | st.integers(1, 60),
)
@settings(max_examples=50)
def test_limits_hold_ends_are_never_forged_and_every_pair_is_accounted_for(
    truncation: Truncation, sizes: list[Any], max_length: int, max_prompt_length: int | None
) -> None:
    pairs = [pair_of(*sizes) for sizes in (*sizes, (0, 0, 1))]
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    try:
        found = tokenized(pairs, truncation, **limits)
    except DataError:
        assume(False)
    dropped = sum(n for cause, n in found.losses.items() if cause.startswith("dropped"))
    cut = sum(n for cause, n in found.losses.items() if "cut to fit" in cause)
    whole = tokenized([p for p in pairs if p.chosen.content or p.rejected.content])
    originals = [(p.prompt.tolist(), p.chosen.tolist(), p.rejected.tolist()) for p in whole]
    assert dropped + len(found) == len(pairs)
    changed = 0
    for pair in found:
        prompt, chosen, rejected = (
            pair.prompt.tolist(),
            pair.chosen.tolist(),
            pair.rejected.tolist(),
        )
        assert 1 <= len(prompt) <= (max_prompt_length or max_length)
        assert len(prompt) + max(len(chosen), len(rejected)) <= max_length
        changed += (prompt, chosen, rejected) not in originals
        for response in (chosen, rejected):
            assert len(response) >= 1
            assert END_ID not in response[:-1]
            if truncation is not Truncation.keep_start:
                assert response[-1] == END_ID
        assert any(
            original[0][-len(prompt) :] == prompt
            and original[1][: len(chosen)] == chosen
            and original[2][: len(rejected)] == rejected
            and (truncation is Truncation.keep_end or original[0] == prompt)
            for original in originals
        )
    assert cut == changed


def test_nothing_left_is_refused_with_the_causes() -> None:
    pairs = [pair_of(30, 3, 4), pair_of(3, 40, 4), pair_of(3, 40, 5)]
    with pytest.raises(DataError) as error:
        tokenized(pairs, max_length=20)
    assert str(error.value) == (
        "no pair of - is left to score: 1 dropped: prompt longer than 20 tokens, "
        "2 dropped: longer than 20 tokens."
    )
    with pytest.raises(DataError, match=r"^no pair of \S+ is left to score: there were none\.$"):
        tokenized([])


def test_pairs_come_back_in_order_with_their_ids() -> None:
    found = tokenized([pair_of(i, 2, 3) for i in range(4)])
    assert len(found) == 4
    assert [len(pair.prompt) for pair in found] == [5, 6, 7, 8]
    assert found.pair_ids == [pair_id(p.prompt, p.chosen, p.rejected) for p in found]


IDS = st.lists(st.integers(0, 2**31 - 1), max_size=4)


def arrays(*lists: list[int], dtype: str = "int32") -> list[np.ndarray]:
    return [np.asarray(values, dtype=dtype) for values in lists]


@given(st.tuples(IDS, IDS, IDS))
def test_pair_id_is_blake2b_over_lengths_and_little_endian_ids(lists: tuple) -> None:
    written = b"".join(struct.pack(f"<i{len(ids)}i", len(ids), *ids) for ids in lists)
    expected = hashlib.blake2b(written, digest_size=16).hexdigest()
    for dtype in ("int32", ">i4", "int64"):
        assert pair_id(*arrays(*lists, dtype=dtype)) == expected


def test_pair_id_has_its_golden_value() -> None:
    # It keys the reference store on disk: another value would orphan every store there is.
    assert pair_id(*arrays([1, 2], [3], [4, 5])) == "cfc18b61fce28d905a2a8a866ff62be0"


@given(st.tuples(IDS, IDS, IDS), st.tuples(IDS, IDS, IDS))
def test_pair_id_depends_on_content_and_on_nothing_else(first: tuple, second: tuple) -> None:
    same = pair_id(*arrays(*first)) == pair_id(*arrays(*second))
    assert same == (first == second)


def test_pair_id_differs_when_the_boundary_moves_or_the_label_flips() -> None:
    variants = [([1, 2], [3], [4]), ([1], [2, 3], [4]), ([1, 2, 3], [], [4]), ([1, 2], [4], [3])]
    assert len({pair_id(*arrays(*variant)) for variant in variants}) == 4


def test_pair_id_ignores_where_the_pair_came_from() -> None:
    here, there = pair_of(3, 4, 5), pair_of(3, 4, 5)
    there = PreferencePair(there.prompt, there.chosen, there.rejected, "elsewhere row 9")
    pairs = [pair_of(1, 1, 2), here]
    assert tokenized(pairs).pair_ids[1] == tokenized([there]).pair_ids[0]
