"""The bound never exceeds the number of tokens, and is close to it where a text is all of a kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moeless.text.length_bound import LengthBound

CORPUS = ["The gate of a layer reads a token 2024 and names the experts 1999 that work.    \n\n café naïve 12 345"]
SPECIAL = [
    AddedToken("<|end|>", special=True, normalized=False),
    AddedToken("<|reserved_special_token_777|>", special=True, normalized=False),
]


def byte_level(normalizer: object = None, *added: AddedToken) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens([*SPECIAL, *added])
    return tokenizer


def unigram(*, byte_fallback: bool = False) -> Tokenizer:
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("a", -3.0), ("bb", -3.0), ("▁a", -2.5), ("e", -3.0), ("▁the", -2.0)]
    bytes_ = [(f"<0x{byte:02X}>", -9.0) for byte in range(256)] if byte_fallback else []
    tokenizer = Tokenizer(models.Unigram([*pieces, *bytes_], unk_id=0, byte_fallback=byte_fallback))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_tokens(SPECIAL)
    return tokenizer


def dropping_unknown() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("-", "removed")
    return tokenizer


def word_piece() -> Tokenizer:
    return Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level, composing": lambda: byte_level(normalizers.NFC()),
    "byte level, stripping": lambda: byte_level(normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()])),
    "tokens that take the space around them": lambda: byte_level(
        None, AddedToken("<mask>", lstrip=True, rstrip=True, normalized=True)
    ),
    "unigram": unigram,
    "unigram in bytes": lambda: unigram(byte_fallback=True),
    "dropping what is unknown": dropping_unknown,
    "word pieces": word_piece,
}
BOTH = {name: (tokenizer := make(), LengthBound(tokenizer)) for name, make in MAKERS.items()}

TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            ["<|end|>", "<mask>", "the", " experts", "  ", "\n", "2024", "café", "cafe\u0301", "ﬁ", "ab", "-"]
        ),
        st.text(max_size=6),
    ),
    max_size=40,
).map("".join)


@pytest.mark.parametrize("name", BOTH)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=TEXTS, times=st.integers(1, 5))
def test_no_text_has_fewer_tokens_than_the_bound(name: str, text: str, times: int) -> None:
    tokenizer, bound = BOTH[name]
    text = (text * times).encode(errors="replace").decode()
    assert bound.min_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


def test_digits_are_bounded_by_the_longest_token_with_a_digit_in_it() -> None:
    _, bound = BOTH["byte level"]
    tokenizer = BOTH["byte level"][0]
    longest = max(len(token) for token in tokenizer.get_vocab() if "7" in token and "<" not in token)
    assert bound.min_tokens("7" * 1000) == -(-1000 // longest)


def test_a_special_token_counts_only_where_it_occurs() -> None:
    _, bound = BOTH["byte level"]
    assert bound.min_tokens("<|end|>" + "7" * 1000) == bound.min_tokens("7" * 1000)


def test_nothing_is_said_of_tokenizers_that_merge_or_drop_at_will() -> None:
    assert BOTH["word pieces"][1].min_tokens("a" * 1000) == 0
    assert BOTH["dropping what is unknown"][1].min_tokens("a" * 1000) == 0
