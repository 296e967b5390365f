"""A lower bound on the number of tokens of a text, from how often each character occurs in it.

Called by tokenizer.py before a long text is tokenized, which can take seconds and gigabytes.

A token of n characters consists of characters whose longest token has at least n characters. So if each character
counts 1 / (length of the longest token that contains it), a token's characters count at most 1 together, and the text
has at least as many tokens as its characters count. Characters that a tokenizer may drop or merge count 0.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers

_KEEPING = {"ByteLevel", "Digits", "Metaspace", "UnicodeScripts", "Split", "Punctuation"}
"""Pre-tokenizers that lose no character, the last two unless their behavior is Removed."""
_WHITESPACE = "".join(char for char in map(chr, range(0x3001)) if char.isspace())


class LengthBound:
    """The bound for one tokenizer; 0 for every text where nothing is known of the tokenizer's parts."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder().values()
        self._cut_out = [str(token.content) for token in added if not token.normalized and token.content]
        pre_tokenizers = _parts(backend.pre_tokenizer)
        self._is_byte_level = any(part["type"] == "ByteLevel" for part in pre_tokenizers)
        self._space = next((str(p["replacement"]) for p in pre_tokenizers if p["type"] == "Metaspace"), " ")
        self._weights: dict[str, float] = {}
        if _keeps_all(pre_tokenizers) and _has_plain_tokens(backend.model):
            matched = [self._units(str(token.content)) for token in added if token.normalized]
            self._weights = _weights(backend.get_vocab(with_added_tokens=False), matched)
            if any(token.lstrip or token.rstrip for token in added):
                # Such a token takes the space around it, however long.
                for unit in self._units(_WHITESPACE):
                    self._weights.pop(unit, None)

    def min_tokens(self, text: str, *, enough: int | None = None) -> int:
        """A number of tokens that `text` has at least.

        Args:
            enough: no more need be known than whether the bound is above this.
        """
        if not self._weights:
            return 0
        largest = max(self._weights.values())
        if enough is not None and len(text) * 4 * largest <= enough:
            return 0
        counts: Counter[str] = Counter()
        for segment in self._segments(text):
            counts.update(self._units(segment))
        total = sum(count * self._weights.get(unit, 0.0) for unit, count in counts.items())
        return math.ceil(total - 1e-6)

    def _segments(self, text: str) -> Iterable[str]:
        """Yield the text between the added tokens, normalized as the tokenizer does."""
        present = sorted((token for token in self._cut_out if token in text), key=len, reverse=True)
        segments = re.split("|".join(map(re.escape, present)), text) if present else [text]
        normalizer = self._backend.normalizer
        return segments if normalizer is None else (normalizer.normalize_str(s) for s in segments if s)

    def _units(self, text: str) -> dict[str, int]:
        """Count each character of the vocabulary in the text."""
        if self._is_byte_level:
            return {_BYTE_CHARS[byte]: count for byte, count in Counter(text.encode(errors="replace")).items()}
        return Counter(text.replace(" ", self._space))


def _parts(component: Any) -> list[dict[str, Any]]:
    if component is None:
        return []
    description = json.loads(component.__getstate__())
    return list(_flatten(description))


def _flatten(description: dict[str, Any]) -> Iterable[dict[str, Any]]:
    if description["type"] != "Sequence":
        yield description
        return
    for part in description["pretokenizers"]:
        yield from _flatten(part)


def _keeps_all(pre_tokenizers: list[dict[str, Any]]) -> bool:
    return all(part["type"] in _KEEPING and part.get("behavior") != "Removed" for part in pre_tokenizers)


def _has_plain_tokens(model: Any) -> bool:
    """Return whether a token's text is the text it stands for."""
    if isinstance(model, tokenizers.models.BPE):
        return not (model.continuing_subword_prefix or model.end_of_word_suffix)
    return isinstance(model, tokenizers.models.Unigram)


def _weights(vocabulary: Iterable[str], matched: Iterable[Mapping[str, int]]) -> dict[str, float]:
    tokens = list(vocabulary)
    # What is no token by itself becomes an unknown token, of which many may be merged, or is dropped.
    alone = {token for token in tokens if len(token) == 1}
    longest: dict[str, int] = {}
    for token in sorted(tokens, key=len, reverse=True):
        length = len(token)
        for char in token:
            if char not in longest:
                longest[char] = length
    for counts in matched:
        length = sum(counts.values())
        for char in counts:
            longest[char] = max(longest.get(char, 1), length)
    return {char: 1 / longest[char] for char in alone}


def byte_chars() -> list[str]:
    """GPT-2's map, by byte: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + n) for n in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


_BYTE_CHARS = byte_chars()
