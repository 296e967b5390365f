from __future__ import annotations

from typing import Any

import msgspec
import pytest

from moeless.core.generation import GenerationDelta
from moeless.engine.text import TokenTexts
from moeless.engine.transformers.sampling import RawLogprobs, Sampled
from moeless.engine.transformers.sequence import Sequence
from tests.families import EOS_ID, make_tokenizer
from tests.unit.engine.support import request

TOKENIZER = make_tokenizer()
TEXTS = TokenTexts(TOKENIZER)


def sequence(**sampling: Any) -> Sequence:
    params: dict[str, Any] = {"ignore_eos": False, "max_tokens": 50}
    return Sequence(request("r", [7, 8, 9], **(params | sampling)), eos_ids=frozenset({EOS_ID}), texts=TEXTS)


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def run(seq: Sequence, ids: list[int]) -> list[GenerationDelta]:
    """Feed tokens until the sequence ends; every one must be taken."""
    deltas = []
    for n, token_id in enumerate(ids):
        ended = seq.advance(token_id)
        deltas.append(seq.take_delta())
        assert ended == (deltas[-1].finish_reason is not None)
        assert not ended or n == len(ids) - 1
    return deltas


def test_a_delta_tells_text_tokens_and_the_prompts_length() -> None:
    deltas = run(sequence(), ids_of("def f"))
    assert "".join(delta.text for delta in deltas) == "def f"
    assert {delta.num_tokens for delta in deltas} == {1}
    assert {delta.num_prompt_tokens for delta in deltas} == {3}
    assert {delta.finish_reason for delta in deltas} == {None}


def test_the_end_token_ends_with_stop_counts_and_adds_no_text() -> None:
    last = run(sequence(), [*ids_of("x"), EOS_ID])[-1]
    assert (last.finish_reason, last.stop_reason, last.text, last.num_tokens) == ("stop", None, "", 1)


def test_the_end_token_has_no_logprobs() -> None:
    seq = sequence(logprobs=0)
    seq.advance(EOS_ID, RawLogprobs(EOS_ID, -0.1, 1, [], []))
    assert seq.take_delta().logprobs == []


def test_ignore_eos_goes_on_to_max_tokens() -> None:
    deltas = run(sequence(ignore_eos=True, max_tokens=3), [EOS_ID] * 3)
    assert deltas[-1].finish_reason == "length"


def test_max_tokens_ends_with_length_and_shows_what_was_held_back() -> None:
    ids = ids_of("abcSTO")
    last = run(sequence(max_tokens=len(ids), stop=("STOP",)), ids)
    assert last[-1].finish_reason == "length"
    assert "".join(delta.text for delta in last) == "abcSTO"


def test_a_stop_string_on_the_last_token_ends_with_stop() -> None:
    ids = ids_of("abcSTOP")
    last = run(sequence(max_tokens=len(ids), stop=("no", "STOP")), ids)[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", "STOP")


def test_an_incomplete_character_is_shown_at_the_end() -> None:
    ids = ids_of("é")[:1]
    last = run(sequence(max_tokens=1), ids)[-1]
    assert (last.finish_reason, last.text) == ("length", "\ufffd")


def test_logprobs_carry_text_and_exact_bytes() -> None:
    first = ids_of("é")[0]
    seq = sequence(logprobs=1)
    seq.advance(first, RawLogprobs(first, -0.5, 2, [ids_of("a")[0]], [-1.5]))
    (token,) = seq.take_delta().logprobs
    assert (token.token_id, token.token, token.token_bytes) == (first, "\ufffd", b"\xc3")
    assert (token.logprob, token.rank) == (-0.5, 2)
    assert token.top == [(ids_of("a")[0], "a", b"a", -1.5)]


@pytest.mark.parametrize("reason", ["cancelled", "error"])
def test_an_end_from_outside_drops_what_is_held_back(reason: Any) -> None:
    seq = sequence(stop=("STOP",))
    run(seq, ids_of("ST"))
    seq.finish(reason, "why")
    delta = seq.take_delta()
    assert (delta.text, delta.num_tokens, delta.finish_reason, delta.error) == ("", 0, reason, "why")


def test_a_stop_string_that_is_a_special_token_ends_the_sequence() -> None:
    user_id = TOKENIZER.convert_tokens_to_ids("<|user|>")
    deltas = run(sequence(stop=("END", "<|user|>")), [*ids_of("abE"), user_id])
    assert "".join(delta.text for delta in deltas) == "abE"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "<|user|>")


def test_a_stop_string_that_is_a_special_token_waits_for_min_tokens_and_can_be_kept() -> None:
    user_id = TOKENIZER.convert_tokens_to_ids("<|user|>")
    params = {"stop": ("<|user|>",), "min_tokens": 2, "include_stop_string": True}
    deltas = run(sequence(**params), [user_id, *ids_of("a"), user_id])
    assert "".join(delta.text for delta in deltas) == "a<|user|>"


def test_a_special_token_that_is_no_stop_string_is_hidden() -> None:
    user_id = TOKENIZER.convert_tokens_to_ids("<|user|>")
    deltas = run(sequence(stop=("<|system|>",)), [*ids_of("ab"), user_id, *ids_of("c")])
    assert "".join(delta.text for delta in deltas) == "abc"


def of_a_chat(*end_of_turn_ids: int, **sampling: Any) -> Sequence:
    params: dict[str, Any] = {"ignore_eos": False, "max_tokens": 50}
    asked = msgspec.structs.replace(request("r", [7], **(params | sampling)), end_of_turn_ids=end_of_turn_ids)
    return Sequence(asked, eos_ids=frozenset({EOS_ID}), texts=TEXTS)


def test_the_templates_end_of_a_turn_ends_the_sequence() -> None:
    user_id = TOKENIZER.convert_tokens_to_ids("<|user|>")
    assert run(of_a_chat(user_id), [*ids_of("x"), user_id])[-1].finish_reason == "stop"
    assert run(of_a_chat(user_id), [*ids_of("x"), EOS_ID])[-1].finish_reason == "stop"
    ignoring = run(of_a_chat(user_id, ignore_eos=True, max_tokens=2), [user_id, user_id])
    assert ignoring[-1].finish_reason == "length"


def test_offsets_count_whole_characters_and_no_hidden_tokens() -> None:
    user_id = TOKENIZER.convert_tokens_to_ids("<|user|>")
    seq = sequence(logprobs=0)
    ids = [*ids_of("a"), user_id, *ids_of("é"), *ids_of("b")]
    assert len(ids) == 5
    for token_id in ids:
        seq.advance(token_id, RawLogprobs(token_id, -0.1, 1, [], []))
    delta = seq.take_delta()
    assert delta.text == "aéb"
    assert [token.text_offset for token in delta.logprobs] == [0, 1, 1, 1, 2]


def test_offsets_go_on_from_delta_to_delta() -> None:
    seq = sequence(logprobs=0, stop=("def",))
    offsets = []
    for token_id in ids_of("abdxy"):
        seq.advance(token_id, RawLogprobs(token_id, -0.1, 1, [], []))
        offsets += [token.text_offset for token in seq.take_delta().logprobs]
    texts = [TEXTS.bytes_of(i).decode() for i in ids_of("abdxy")]
    assert offsets == [sum(map(len, texts[:n])) for n in range(len(texts))]


def test_a_stop_token_ends_as_the_end_token_does_and_is_named() -> None:
    stop_id = ids_of("x")[0]
    last = run(sequence(stop_token_ids=(stop_id,), ignore_eos=True), [*ids_of("ab"), EOS_ID, stop_id])[-1]
    assert (last.finish_reason, last.stop_reason, last.text, last.num_tokens) == ("stop", stop_id, "", 1)


def test_a_stop_token_that_is_the_end_token_is_not_named() -> None:
    last = run(sequence(stop_token_ids=(EOS_ID,)), [EOS_ID])[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", None)


def test_what_stopped_is_kept_in_the_text_where_that_is_set() -> None:
    deltas = run(sequence(stop=("STOP",), include_stop_string=True), ids_of("abSTOP"))
    assert "".join(delta.text for delta in deltas) == "abSTOP"
    stop_id = ids_of("x")[0]
    deltas = run(
        sequence(stop=("bxy",), stop_token_ids=(stop_id,), include_stop_string=True),
        [*ids_of("a"), *ids_of("b"), stop_id],
    )
    assert "".join(delta.text for delta in deltas) == "abx"
    assert deltas[-1].stop_reason == stop_id


def test_a_stop_string_counts_from_min_tokens_on() -> None:
    ids = [token_id for letter in "SxSxabS" for token_id in ids_of(letter)]
    deltas = run(sequence(stop=("S",), min_tokens=3), ids)
    assert "".join(delta.text for delta in deltas) == "SxSxab"
    assert deltas[-1].stop_reason == "S"


def test_a_stop_string_that_begins_before_min_tokens_and_ends_after_it_is_found() -> None:
    ids = [token_id for letter in "abST" for token_id in ids_of(letter)]
    deltas = run(sequence(stop=("ST",), min_tokens=3), ids)
    assert "".join(delta.text for delta in deltas) == "ab"


def test_max_tokens_0_ends_after_the_prompt() -> None:
    seq = sequence(max_tokens=0)
    assert seq.advance(ids_of("x")[0])
    delta = seq.take_delta()
    assert (delta.finish_reason, delta.text, delta.num_tokens, delta.num_prompt_tokens) == ("length", "", 0, 3)


def test_a_sampling_error_ends_the_sequence_with_its_words() -> None:
    seq = sequence()
    assert seq.take(Sampled([5, 6], None, {1: "not finite"}), 1)
    delta = seq.take_delta()
    assert (delta.finish_reason, delta.error, delta.num_tokens) == ("error", "not finite", 0)


class FailingMatcher:
    def feed(self, text: str) -> tuple[str, str | None]:
        raise RuntimeError(f"cannot match {text!r}")


def test_a_fault_in_the_text_ends_the_sequence_with_its_words() -> None:
    seq = sequence(stop=("STOP",))
    seq._matcher = FailingMatcher()  # type: ignore[assignment]
    assert seq.take(Sampled(ids_of("x")), 0)
    assert seq.take_delta().error == "RuntimeError: cannot match 'x'"
