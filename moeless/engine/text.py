"""From token ids to text, token by token: bytes of tokens, incremental decoding, stop strings."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

from moeless.core.errors import ConfigError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """Text of one sequence as its tokens arrive. All pieces together are the text of all tokens decoded at once.

    One exception: byte-fallback tokenizers (Llama's) turn a whole run of byte tokens into U+FFFD when a later one makes
    it invalid, which text that has been shown cannot follow.
    """

    def feed(self, token_id: int) -> str:
        """The text that is certain after this token; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What was held back; an incomplete character becomes U+FFFD."""
        ...


class TokenTexts:
    """The texts and bytes of a tokenizer's tokens, and decoders for sequences of them."""

    def __init__(self, tokenizer: Any) -> None:
        """Args:
        tokenizer: a `tokenizers.Tokenizer`, or a transformers tokenizer that is built on one.
        """
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not isinstance(backend, Tokenizer):
            raise ConfigError(
                f"tokenizer must be a tokenizers.Tokenizer or be built on one, got {type(tokenizer).__name__}"
            )
        self._tokenizer = backend
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._is_byte_level = _is_byte_level(backend.decoder)
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The exact bytes that a token stands for, special tokens included; empty for an unknown id."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def new_decoder(self) -> Decoder:
        """A decoder for one sequence. Special tokens add no text."""
        return ByteLevelDecoder(self) if self._is_byte_level else WindowDecoder(self._tokenizer)

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
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

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._num_emitted = 0
        self._shown = ""
        """Text of the first `_num_emitted` ids of the window, which has been emitted."""

    def feed(self, token_id: int) -> str:
        self._ids.append(token_id)
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if text.endswith(_REPLACEMENT) or len(text) <= len(self._shown):
            return ""
        piece = text[len(self._shown) :]
        del self._ids[: self._num_emitted]
        self._num_emitted = len(self._ids)
        self._shown = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return piece

    def flush(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        piece = text[len(self._shown) :]
        self._shown = text
        return piece


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

    def flush(self) -> str:
        """What was held back, when the sequence has ended without a stop string."""
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


def _byte_of_char() -> dict[str, int]:
    """GPT-2's map: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
