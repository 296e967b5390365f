"""From token ids to text, token by token: bytes of tokens, incremental decoding, stop strings."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

from moeless.core.errors import ConfigError
from moeless.text.length_bound import byte_chars
from moeless.text.tokenizer_files import panics_as_errors

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 8
"""Tokens of the prompt that a completion's first tokens are decoded beside."""


class Decoder(Protocol):
    """Text of one sequence as its tokens arrive. All pieces together are the text of all tokens decoded at once.

    One exception: byte-fallback tokenizers (Llama's) turn a whole run of byte tokens into U+FFFD when a later one makes
    it invalid, which text that has been shown cannot follow.
    """

    def feed(self, token_id: int) -> str:
        """The text that is certain after this token; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """Return the text held back; an incomplete character becomes U+FFFD."""
        ...


class TokenTexts:
    """The texts and bytes of a tokenizer's tokens, and decoders for sequences of them."""

    def __init__(self, tokenizer: Any) -> None:
        """Args:
        tokenizer: a `tokenizers.Tokenizer`, or what is built on one (`moeless.text`'s, or one of transformers).
        """
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not isinstance(backend, Tokenizer):
            raise ConfigError(
                f"tokenizer must be a tokenizers.Tokenizer or be built on one, got {type(tokenizer).__name__}"
            )
        self._tokenizer = backend
        added = backend.get_added_tokens_decoder()
        self._added = {i: str(token.content) for i, token in added.items()}
        self._special = {i for i, token in added.items() if token.special}
        self._special_ids = {self._added[i]: i for i in self._special}
        eos_id = getattr(tokenizer, "eos_token_id", None)
        self.eos_ids: frozenset[int] = frozenset() if eos_id is None else frozenset([eos_id])
        """Ids that the tokenizer itself names as the end of a sequence."""
        self._is_byte_level = _is_byte_level(backend.decoder)
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The exact bytes that a token stands for, special tokens included; empty for an unknown id."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def token_ids(self) -> frozenset[int]:
        """Every id that stands for a token."""
        return frozenset(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def special_id(self, text: str) -> int | None:
        """The special token that is written `text`."""
        return self._special_ids.get(text)

    def new_decoder(self, before: Sequence[int] = ()) -> Decoder:
        """A decoder for one sequence. Special tokens add no text.

        Args:
            before: the tokens that the text goes on from, if any; without them it begins as a text does, which for
                SentencePiece means without the first word's space.
        """
        if self._is_byte_level:
            return ByteLevelDecoder(self)
        return WindowDecoder(self._tokenizer, before[-_CONTEXT_TOKENS:])

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return self._added[token_id].encode()
        if self._is_byte_level:
            if all(char in _BYTE_OF_CHAR for char in token):
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            return str(token).encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return str(token).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


class ByteLevelDecoder:
    """For byte-level BPE: tokens are bytes, so decoding is decoding UTF-8."""

    __slots__ = ("_texts", "_utf8")

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        if self._texts.is_special(token_id):
            return ""
        return self._utf8.decode(self._texts.bytes_of(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """For any other tokenizer: decodes a window of the last tokens with and without the newest ones.

    The window starts where the text was last certain, one emission back, so that decoders which treat a sequence's
    first token differently (a stripped space, say) see the same neighbours both times.
    """

    __slots__ = ("_ids", "_num_emitted", "_shown", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = list(before)
        self._num_emitted = len(self._ids)
        self._shown = self._text().rstrip(_REPLACEMENT) if before else ""
        """Text of the first `_num_emitted` ids of the window, which has been emitted."""

    def feed(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._text()
        if text.endswith(_REPLACEMENT) or len(text) <= len(self._shown):
            return ""
        piece = text[len(self._shown) :]
        del self._ids[: self._num_emitted]
        self._num_emitted = len(self._ids)
        self._shown = self._text()
        return piece

    def flush(self) -> str:
        text = self._text()
        piece = text[len(self._shown) :]
        self._shown = text
        return piece

    def _text(self) -> str:
        with panics_as_errors("the tokenizer cannot decode its tokens"):
            text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text


class StopMatcher:
    """Finds the first of several stop strings in text that arrives in pieces, and holds back what may begin one."""

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """The text that is now certain to come before any stop string, and the stop string if one is complete.

        Of several complete ones that which begins first wins, of those the one listed first. After a stop string
        nothing may be fed.
        """
        text = self._held + text
        found = [(start, order) for order, stop in enumerate(self._stops) if (start := text.find(stop)) >= 0]
        if found:
            start, order = min(found)
            self._held = ""
            return text[:start], self._stops[order]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def skip(self, text: str) -> str:
        """Do as `feed` where no stop string may end yet: complete ones are text like any other."""
        text = self._held + text
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the text held back, when the sequence has ended without a stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def _is_byte_level(decoder: Any) -> bool:
    if decoder is None:
        return False
    description = json.loads(decoder.__getstate__())
    parts = description["decoders"] if description["type"] == "Sequence" else [description]
    return [part["type"] for part in parts] == ["ByteLevel"]


_BYTE_OF_CHAR = {char: byte for byte, char in enumerate(byte_chars())}
