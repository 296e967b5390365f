from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from moeless.core.errors import ConfigError, RequestError
from moeless.engine.text import StopMatcher, TokenTexts, WindowDecoder
from moeless.text.tokenizer import Tokenizer as ModelTokenizer
from tests.families import VOCAB_SIZE, make_tokenizer

BYTE_LEVEL = make_tokenizer()
TEXTS = TokenTexts(BYTE_LEVEL)


def sentencepiece_like() -> Tokenizer:
    """Llama's scheme: words that carry their space as a block, characters as bytes where there is no word."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁cat", "s", "é", "▁é"]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


SENTENCEPIECE = sentencepiece_like()


def streamed(tokenizer: object, ids: list[int]) -> tuple[list[str], str]:
    decoder = TokenTexts(tokenizer).new_decoder()
    return [decoder.feed(i) for i in ids], decoder.flush()


# -- decoding ----------------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.lists(st.integers(0, VOCAB_SIZE + 5), max_size=60))
def test_pieces_of_any_byte_level_tokens_make_the_whole_text(ids: list[int]) -> None:
    pieces, rest = streamed(BYTE_LEVEL, ids)
    assert "".join(pieces) + rest == BYTE_LEVEL.backend_tokenizer.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=30))
def test_no_replacement_character_is_shown_for_a_character_on_its_way(text: str) -> None:
    ids = BYTE_LEVEL.backend_tokenizer.encode(text, add_special_tokens=False).ids
    pieces, rest = streamed(BYTE_LEVEL, ids)
    assert "".join(pieces) == text
    assert rest == ""


def test_an_incomplete_character_at_the_end_becomes_one_replacement_character() -> None:
    ids = BYTE_LEVEL.backend_tokenizer.encode("naïve 😀", add_special_tokens=False).ids
    pieces, rest = streamed(BYTE_LEVEL, ids[:-1])
    assert "".join(pieces) == "naïve "
    assert rest == "\ufffd"


def sentencepiece_tokens(piece: str) -> list[int]:
    if (token_id := SENTENCEPIECE.token_to_id(piece)) is not None:
        return [token_id]
    return [SENTENCEPIECE.token_to_id(f"<0x{byte:02X}>") for byte in piece.encode()]


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(st.sampled_from(["<s>", "▁", "▁the", "▁cat", "s", "é", "▁é"]), st.characters(codec="utf-8")),
        max_size=30,
    )
)
def test_pieces_of_any_sentencepiece_text_make_the_whole_text(parts: list[str]) -> None:
    ids = [token_id for part in parts for token_id in sentencepiece_tokens(part)]
    pieces, rest = streamed(SENTENCEPIECE, ids)
    assert "".join(pieces) + rest == SENTENCEPIECE.decode(ids, skip_special_tokens=True)


def test_a_sentencepiece_character_in_bytes_comes_whole() -> None:
    ids = [SENTENCEPIECE.token_to_id(t) for t in ("▁the", "▁cat", "s", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>")]
    pieces, rest = streamed(SENTENCEPIECE, ids)
    assert pieces == ["the", " cat", "s", " ", "", "", "", "😀"]
    assert rest == ""


@pytest.mark.parametrize(
    ("before", "tokens", "text"),
    [
        (["▁the"], ["▁cat", "s"], " cats"),
        (["<s>", "▁the"], ["▁cat"], " cat"),
        (["▁the", "</s>"], ["▁cat"], " cat"),
        (["<s>"], ["▁cat"], "cat"),
        ([], ["▁cat"], "cat"),
        (["▁the"] * 20, ["▁cat"], " cat"),
        (["▁the"], ["s", "▁cat"], "s cat"),
        (["▁the", "<0xC3>"], ["<0xA9>", "s"], "és"),
    ],
)
def test_a_completion_keeps_the_space_of_its_first_word(before: list[str], tokens: list[str], text: str) -> None:
    decoder = TokenTexts(SENTENCEPIECE).new_decoder([SENTENCEPIECE.token_to_id(token) for token in before])
    pieces = [decoder.feed(SENTENCEPIECE.token_to_id(token)) for token in tokens]
    assert "".join(pieces) + decoder.flush() == text


def test_the_window_forgets_what_is_settled() -> None:
    decoder = WindowDecoder(SENTENCEPIECE)
    for _ in range(1000):
        decoder.feed(SENTENCEPIECE.token_to_id("▁cat"))
    assert len(decoder._ids) <= 2


@given(st.text(max_size=20))
def test_bytes_of_tokens_are_exact(text: str) -> None:
    ids = BYTE_LEVEL.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(TEXTS.bytes_of(i) for i in ids) == text.encode()


def test_bytes_of_special_unknown_and_sentencepiece_tokens() -> None:
    assert TEXTS.bytes_of(BYTE_LEVEL.convert_tokens_to_ids("<|end|>")) == b"<|end|>"
    assert TEXTS.bytes_of(10**6) == b""
    texts = TokenTexts(SENTENCEPIECE)
    assert texts.bytes_of(SENTENCEPIECE.token_to_id("<0x98>")) == b"\x98"
    assert texts.bytes_of(SENTENCEPIECE.token_to_id("▁cat")) == b" cat"


def test_bytes_of_an_added_token_are_its_text_not_bytes_that_look_like_it() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("é")])
    assert TokenTexts(tokenizer).bytes_of(1) == "é".encode()


CLASSES = ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "GemmaTokenizer", "Qwen2Tokenizer", None]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("backend", "text"),
    [(BYTE_LEVEL.backend_tokenizer, "the gate\n of é"), (SENTENCEPIECE, "the cats é")],
    ids=["byte level", "SentencePiece"],
)
def test_text_is_decoded_by_the_file_whatever_its_class(
    tmp_path: Path, name: str | None, backend: Tokenizer, text: str
) -> None:
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name} if name else {}))
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    if backend is SENTENCEPIECE:
        ids = [token_id for piece in ("▁the", "▁cat", "s", "▁é") for token_id in sentencepiece_tokens(piece)]
    else:
        ids = ModelTokenizer.load(tmp_path).encode_chat(text)
    pieces, rest = streamed(ModelTokenizer.load(tmp_path), ids)
    assert "".join(pieces) + rest == text
    token_bytes = [TokenTexts(ModelTokenizer.load(tmp_path)).bytes_of(i) for i in ids]
    assert b"".join(token_bytes).decode().removeprefix(" ") == text


def test_the_tokenizers_own_end_token_is_known(tmp_path: Path) -> None:
    BYTE_LEVEL.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|user|>"}))
    assert TokenTexts(ModelTokenizer.load(tmp_path)).eos_ids == {BYTE_LEVEL.convert_tokens_to_ids("<|user|>")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|nowhere|>"}))
    assert TokenTexts(ModelTokenizer.load(tmp_path)).eos_ids == set()


def test_a_panic_of_the_tokenizer_is_an_error() -> None:
    class PanickingTokenizer:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            raise panic()

    with pytest.raises(RequestError, match="the tokenizer cannot decode its tokens"):
        WindowDecoder(PanickingTokenizer()).feed(1)  # type: ignore[arg-type]


def panic() -> BaseException:
    """A panic as Rust's raise it: from a tokenizer whose expression needs more steps than its engine allows."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(a|a)*(a|aa)*b|(?=(a+a+)+c)x"), "isolated")
    try:
        tokenizer.encode("a" * 36)
    except BaseException as error:
        return error
    raise AssertionError("the tokenizer did not panic")


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer must be a tokenizers\.Tokenizer or be built on one, got int"):
        TokenTexts(3)


# -- stop strings ------------------------------------------------------------------------------------------------------


def run_matcher(stops: list[str], pieces: list[str]) -> tuple[str, str | None, str]:
    """What is let through, the stop string found, and all that was fed until then."""
    matcher = StopMatcher(stops)
    out, fed = "", ""
    for piece in pieces:
        fed += piece
        text, stop = matcher.feed(piece)
        out += text
        if stop is not None:
            return out, stop, fed
        assert not any(s in out for s in stops)
    return out + matcher.flush(), None, fed


ABC = st.text(alphabet="abc", max_size=4)


@settings(max_examples=1000)
@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4), st.lists(ABC, max_size=15))
def test_output_is_the_text_before_the_first_stop_string(stops: list[str], pieces: list[str]) -> None:
    out, stop, fed = run_matcher(stops, pieces)
    starts = [fed.find(s) for s in stops if s in fed]
    assert out == (fed[: min(starts)] if starts else fed)
    assert (stop is not None) == bool(starts)
    if stop is not None:
        assert fed.startswith(stop, len(out))


@given(st.text(alphabet="abc", min_size=1, max_size=6), st.lists(ABC, max_size=15))
def test_no_more_is_held_back_than_could_begin_the_stop_string(stop: str, pieces: list[str]) -> None:
    matcher = StopMatcher([stop])
    out, fed = "", ""
    for piece in pieces:
        fed += piece
        text, found = matcher.feed(piece)
        if found is not None:
            return
        out += text
        held = fed[len(out) :]
        assert stop.startswith(held)
        assert not any(fed.endswith(stop[:size]) for size in range(len(held) + 1, len(stop)))


def test_a_stop_string_across_pieces_is_found_and_named() -> None:
    assert run_matcher(["###", "END"], ["one E", "N", "D two"]) == ("one ", "END", "one END two")


def test_text_that_only_begins_like_a_stop_string_is_let_through() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("the E") == ("the ", None)
    assert matcher.feed("N") == ("", None)
    assert matcher.feed("T") == ("ENT", None)
    assert matcher.flush() == ""
