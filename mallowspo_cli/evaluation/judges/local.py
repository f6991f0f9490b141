"""A judge in this process: a causal language model with a chat template."""

import math
from collections.abc import Sequence
from time import monotonic
from typing import Any

import jinja2
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mallowspo_cli.errors import EvalError, first_line
from mallowspo_cli.evaluation.generate import generation_config, stop_ids
from mallowspo_cli.evaluation.judges.annotators import Annotator
from mallowspo_cli.evaluation.judges.replies import Messages, OnReply, Reply, Unreadable
from mallowspo_cli.evaluation.judges.spellings import break_special
from mallowspo_cli.evaluation.judges.verdicts import Weighted

MAX_TOKENS = 256
"""Longest answer where the annotator sets none."""


class LocalJudge:
    """Answers as a server would.

    An annotator that reads log-probs gets those of its verdicts exactly, however improbable they
    are: no answer is written. Any other gets the most probable answer, whatever its temperature.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        annotator: Annotator,
        batch_size: int = 8,
    ):
        """Check that this model can judge so.

        Raises:
            EvalError: no chat template, a verdict that is no single token, or an annotator that
                needs a server (function calls, log-probs behind a written comparison).
        """
        if not tokenizer.chat_template:
            raise EvalError(
                f"{name} has no chat template, so it cannot be asked. Take a chat model."
            )
        if "tools" in annotator.request:
            raise EvalError(
                f"the annotator {annotator.name} needs function calls, which a judge with "
                "judge.engine=transformers does not have. Take pairwise_choice, say."
            )
        self.name, self.model, self.tokenizer = name, model.eval(), tokenizer
        self.batch_size = batch_size
        self.ends = stop_ids(model, tokenizer)
        self.device = next(model.parameters()).device
        request = annotator.request
        limit = request.get("max_completion_tokens") or request.get("max_tokens") or MAX_TOKENS
        self.verdicts: dict[str, Tensor] = {}
        if isinstance(annotator.parse, Weighted):
            self.verdicts = self._verdicts(annotator.parse, annotator.name)
            limit = 1
        self.max_tokens = int(limit)
        self.special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]

    def ask(self, questions: Sequence[Messages], pending: Sequence[int], on_reply: OnReply) -> None:
        """Answer the pending questions, shortest first, and hand each on with its batch.

        All questions together decide on the batches, so that an answer is the same to the last bit
        whichever of them are pending.

        Raises:
            EvalError: out of memory, or the chat template refuses every conversation.
        """
        wanted = set(pending)
        prompts = [self._prompt(question) for question in questions]
        room = self._context() - self.max_tokens
        short = [index for index, ids in enumerate(prompts) if len(ids) <= room]
        for index in sorted(wanted - set(short)):
            on_reply(index, Unreadable(f"{len(prompts[index]):,} tokens; the judge takes {room:,}"))
        short.sort(key=lambda index: (len(prompts[index]), index))
        for start in range(0, len(short), self.batch_size):
            batch = short[start : start + self.batch_size]
            if wanted.isdisjoint(batch):
                continue
            for index, reply in zip(batch, self._answer([prompts[i] for i in batch]), strict=True):
                if index in wanted:
                    on_reply(index, reply)

    def redact(self, text: str) -> str:
        """The text itself: there is no key."""
        return text

    def _prompt(self, question: Messages) -> list[int]:
        """Token ids of a conversation; only the template's own special tokens are such."""
        inert = [
            {**message, "content": break_special(message["content"], self.special)[0]}
            for message in question
        ]
        try:
            text = self._rendered(inert)
        except jinja2.TemplateError:
            try:
                text = self._rendered(_without_system(inert))
            except jinja2.TemplateError as error:
                raise EvalError(
                    f"the chat template of {self.name} refuses the annotator's conversation: "
                    f"{first_line(error)}."
                ) from error
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    def _rendered(self, messages: Messages) -> str:
        # A judge that thinks first would have no token left for its verdict.
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert isinstance(text, str)
        return text

    @torch.inference_mode()
    def _answer(self, prompts: Sequence[list[int]]) -> list[Reply]:
        """The replies to a batch, padded on the left."""
        start = monotonic()
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.ends[0])
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_tokens,
            eos_token_id=self.ends,
            pad_token_id=self.ends[0],
            return_dict_in_generate=True,
            output_logits=bool(self.verdicts),
        )
        with generation_config(self.model, config):
            try:
                found: Any = self.model.generate(  # type: ignore[operator]
                    ids.to(self.device), attention_mask=mask.to(self.device)
                )
            except torch.OutOfMemoryError as error:
                raise EvalError(
                    f"out of memory with {len(prompts)} questions of up to {width:,} tokens. Lower "
                    f"judge.batch_size (now {self.batch_size}); answers so far are kept."
                ) from error
        seconds = round((monotonic() - start) / len(prompts), 3)
        answers = found.sequences[:, width:].cpu()
        logps = (
            found.logits[0].float().log_softmax(-1).cpu() if self.verdicts else [None] * len(ids)
        )
        return [
            self._reply(answer, row, len(prompt), seconds)
            for answer, row, prompt in zip(answers, logps, prompts, strict=True)
        ]

    def _reply(self, answer: Tensor, logps: Tensor | None, width: int, seconds: float) -> Reply:
        """A reply from (N,) written tokens and the (V,) log-probs of the first, in nats."""
        ended = torch.isin(answer, torch.tensor(self.ends)).nonzero()
        count = int(ended[0]) if len(ended) else len(answer)
        text = self.tokenizer.decode(answer[:count], skip_special_tokens=True)
        tops = ()
        if logps is not None:
            sums = {token: float(logps[ids].logsumexp(0)) for token, ids in self.verdicts.items()}
            tops = (tuple((token, value) for token, value in sums.items() if value > -math.inf),)
        return Reply(str(text), None, tops, not len(ended), width, count + len(ended[:1]), seconds)

    def _verdicts(self, parse: Weighted, annotator: str) -> dict[str, Tensor]:
        """For each verdict the ids of the tokens that are it, with or without a space before."""
        if parse.position != 0:
            raise EvalError(
                f"the annotator {annotator} reads log-probs behind a written comparison, which a "
                "judge with judge.engine=transformers does not give. Take pairwise_choice, say."
            )
        found = {}
        for verdict in parse.tokens:
            spelled = (
                self.tokenizer.encode(text, add_special_tokens=False)
                for text in (verdict, f" {verdict}")
            )
            ids = sorted({ids[0] for ids in spelled if len(ids) == 1})
            if not ids:
                raise EvalError(
                    f"{verdict!r}, a verdict of {annotator}, is no single token of {self.name}."
                )
            found[verdict] = torch.tensor(ids)
        return found

    def _context(self) -> int:
        """The most tokens that the model takes."""
        config: Any = self.model.config
        most = getattr(config.get_text_config(), "max_position_embeddings", None)
        return most if isinstance(most, int) else 10**9


def _without_system(messages: Messages) -> Messages:
    """The system's words at the beginning of the user's, for templates that know no system."""
    texts = [m["content"] for m in messages if m["role"] == "system"]
    first, *rest = (m for m in messages if m["role"] != "system")
    return [{**first, "content": "\n\n".join([*texts, first["content"]])}, *rest]
