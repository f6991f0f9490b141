"""Conversations as the chat template writes them, with the places that matter."""

from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mallowspo_cli.data.pairs import Message
from mallowspo_cli.errors import DataError


class Rendered(NamedTuple):
    """A conversation as the chat template writes it."""

    text: str
    start: int
    """Character at which the response's part begins."""
    text_end: int
    """Character behind the response's own text."""
    row: str


class Opening:
    """The part of a conversation that its responses share."""

    def __init__(
        self,
        prompt: Sequence[Message],
        tokenizer: PreTrainedTokenizerBase,
        header: bool,
        row: str,
    ):
        self.tokenizer, self.row, self.prompt = tokenizer, row, prompt
        self.history = [message.as_dict() for message in prompt]
        self.text = self._template(self.history, opening=True)
        self.start = len(self.text)
        if header:
            bare = self._template(self.history)
            if not self.text.startswith(bare):
                raise DataError(
                    f"{row}: the chat template ends a conversation before a response otherwise "
                    f"(...{bare[-40:]!r}), so the response's header cannot be told apart. Set "
                    "dataset.header_in_response=false."
                )
            self.start = len(bare)

    def render(self, response: Message) -> Rendered:
        """The whole conversation with this response.

        Raises:
            DataError: the template refuses it, or changes the prompt or the response's text.
        """
        rendered = self._template([*self.history, response.as_dict()], response=response)
        if not rendered.startswith(self.text):
            raise DataError(
                f"{self.row}: the chat template renders the prompt differently before a response "
                f"(...{self.text[-40:]!r} is not how the whole conversation begins)."
            )
        text = response.content.strip()
        found = rendered.find(text, len(self.text))
        if found < 0:
            raise DataError(
                f"{self.row}: the chat template changes the response's text: {shortened(text)} is "
                f"not in {shortened(rendered[len(self.text) :])}."
            )
        return Rendered(rendered, self.start, found + len(text), self.row)

    def _template(
        self, history: list[dict[str, str]], opening: bool = False, response: Message | None = None
    ) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                history, tokenize=False, add_generation_prompt=opening
            )
        except TemplateError as error:
            roles = ", ".join(m.role for m in (*self.prompt, response) if m is not None)
            raise DataError(
                f"{self.row}: the chat template refuses the conversation (roles: {roles!r}): "
                f"{' '.join(str(error).split())}."
            ) from error
        assert isinstance(text, str)
        return text


def shortened(text: str) -> str:
    """A text, or its beginning, in quotes."""
    return repr(text if len(text) <= 40 else text[:40] + "...")
