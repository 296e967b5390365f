"""Text to token ids and chats to text, by the tokenizer.json and the chat template that lie beside a model.

The gateway's text processes (gateway/text_process.py) encode with it, the engine (engine/text.py) decodes with it, and
recordings from prompts (engine/offline_recording.py) do both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from moeless.core.errors import RequestError
from moeless.text.chat_template import ChatTemplate
from moeless.text.length_bound import LengthBound
from moeless.text.template_probe import TemplateTraits, probe_template
from moeless.text.tokenizer_files import panics_as_errors, read_backend, read_special_tokens, read_template

_DEFAULT_TRAITS = TemplateTraits()


class TextTooLongError(Exception):
    """A text has more tokens than allowed."""

    def __init__(self, num_tokens: int, *, is_exact: bool) -> None:
        super().__init__(f"{num_tokens} tokens")
        self.num_tokens = num_tokens
        self.is_exact = is_exact
        """False: the text was not tokenized, for it has at least this many tokens by its length."""


class Tokenizer:
    """The tokenizer and chat template of one model.

    Args:
        backend: tokenizer.json.
        chat_template: None if the model has none.
        special_tokens: named special tokens (`eos_token`, …).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: ChatTemplate | None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.backend_tokenizer = backend
        self.chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})
        self._bound: LengthBound | None = None

    @classmethod
    def load(cls, folder: Path, *, with_template: bool = True) -> Tokenizer:
        """Read the files of a model.

        Args:
            with_template: whether to compile the chat template, which computes what is constant in it.
        Raises: ConfigError if there is no tokenizer.json or a file cannot be read.
        """
        tokenizer = cls(read_backend(folder), None, read_special_tokens(folder))
        if with_template:
            tokenizer.load_template(folder)
        return tokenizer

    def load_template(self, folder: Path) -> None:
        """Raises: ConfigError if the template is not valid or its file cannot be read."""
        source = read_template(folder)
        self.chat_template = None if source is None else ChatTemplate(source, self._special_tokens)

    @property
    def eos_token_id(self) -> int | None:
        """The id of the tokenizer's own end-of-sequence token."""
        token = self._special_tokens.get("eos_token")
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def length_bound(self) -> LengthBound:
        """Made at the first call, which goes over the whole vocabulary."""
        if self._bound is None:
            self._bound = LengthBound(self.backend_tokenizer)
        return self._bound

    def encode_prompt(self, text: str, *, max_tokens: int | None = None) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that tokenizer.json's post-processor adds.

        add_bos_token and add_eos_token in tokenizer_config.json count for nothing beside it, as in transformers.

        Raises: TextTooLongError beyond `max_tokens`; RequestError if the tokenizer fails.
        """
        return self._encode(text, max_tokens, add_special_tokens=True)

    def encode_chat(self, rendered: str, *, max_tokens: int | None = None) -> list[int]:
        """Token ids of a rendered chat. The template has written the special tokens already, so none are added.

        Raises: as encode_prompt.
        """
        return self._encode(rendered, max_tokens, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, with_special_tokens: bool = False) -> str:
        """The text of token ids."""
        with panics_as_errors("The model's tokenizer cannot decode these tokens"):
            text: str = self.backend_tokenizer.decode(list(token_ids), skip_special_tokens=not with_special_tokens)
        return text

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        traits: TemplateTraits = _DEFAULT_TRAITS,
        **options: Any,
    ) -> str:
        """The text of a chat; `options` are ChatTemplate.render's.

        Args:
            traits: in which forms the template reads messages; by default content is given as strings.
        Raises: RequestError if the model has no chat template or the template cannot take the messages.
        """
        return self._template().render(traits.adapt(messages), **options)

    def probe_template(self) -> TemplateTraits:
        """Render a few chats to find out how the template reads messages and how it ends a turn.

        Raises: RequestError if the model has no chat template.
        """
        added = self.backend_tokenizer.get_added_tokens_decoder()
        special = {str(token.content): token_id for token_id, token in added.items() if token.special}
        return probe_template(self._template(), special)

    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise RequestError(
                "This model has no chat template; use /v1/completions.", param="messages", code="no_chat_template"
            )
        return self.chat_template

    def _encode(self, text: str, max_tokens: int | None, *, add_special_tokens: bool) -> list[int]:
        with panics_as_errors("The model's tokenizer cannot encode this text"):
            if max_tokens is not None and len(text) > max_tokens // 4:
                min_tokens = self.length_bound().min_tokens(text, enough=max_tokens)
                if min_tokens > max_tokens:
                    raise TextTooLongError(min_tokens, is_exact=False)
            # Unlike `encode`, this lets other threads run; a batch of one is a batch.
            encoding = self.backend_tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        if max_tokens is not None and len(encoding) > max_tokens:
            raise TextTooLongError(len(encoding), is_exact=True)
        ids: list[int] = encoding.ids
        return ids
