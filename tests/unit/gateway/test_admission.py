"""Requests to the engine, made from a client's body."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.core.errors import ContextLengthError
from moeless.core.generation import SamplingParams
from moeless.gateway.admission import Admission, AdmittedRequest, ServedModel, seed_of_choice
from moeless.gateway.config import GatewayConfig
from moeless.gateway.schemas import ChatCompletionRequest, CompletionRequest
from moeless.text.tokenizer import Tokenizer
from tests.unit.gateway.support import chat, completion, model_info

pytestmark = pytest.mark.anyio


class Admitter:
    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.load(folder)
        self.model = ServedModel(
            info=model_info(folder), tokenizer=self.tokenizer, traits=self.tokenizer.probe_template()
        )
        self.admission = Admission(GatewayConfig())

    async def chat(self, content: object = "hi", **fields: object) -> AdmittedRequest:
        body = ChatCompletionRequest.model_validate(chat(content, **fields))
        return self.admission.admit_chat(body, self.model, "chatcmpl-1")

    async def completion(self, prompt: object = "hi", **fields: object) -> AdmittedRequest:
        body = CompletionRequest.model_validate(completion(prompt, **fields))
        return self.admission.admit_completion(body, self.model, "cmpl-1")


@pytest.fixture
def admit(tokenizer_folder: Path) -> Admitter:
    return Admitter(tokenizer_folder)


def text_of(admit: Admitter, token_ids: list[int]) -> str:
    return admit.tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=False)


async def test_a_chat_is_rendered_and_gets_no_second_bos(admit: Admitter) -> None:
    admitted = await admit.chat("hi")
    prompt = admitted.sequences[0].prompt_token_ids
    assert text_of(admit, prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert admitted.num_prompt_tokens == len(prompt)


async def test_a_plain_prompt_gets_the_special_tokens_of_its_tokenizer(admit: Admitter) -> None:
    admitted = await admit.completion("hi")
    assert text_of(admit, admitted.sequences[0].prompt_token_ids) == "<s>hi"


async def test_token_ids_are_taken_as_they_are(admit: Admitter) -> None:
    admitted = await admit.completion([7, 8, 9])
    assert [sequence.prompt_token_ids for sequence in admitted.sequences] == [[7, 8, 9]]


async def test_text_parts_are_joined_and_developer_is_system(admit: Admitter) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    admitted = await admit.chat(messages=[{"role": "developer", "content": parts}])
    prompt = text_of(admit, admitted.sequences[0].prompt_token_ids)
    assert prompt.startswith("<|im_start|>system\nab<|im_end|>")


async def test_absent_fields_get_openais_defaults(admit: Admitter) -> None:
    admitted = await admit.completion("hi")
    assert admitted.sequences[0].sampling == SamplingParams(max_tokens=16, temperature=1.0, top_p=1.0)
    assert not admitted.is_stream


async def test_a_chat_without_a_limit_may_fill_the_context(admit: Admitter) -> None:
    admitted = await admit.chat("hi")
    assert admitted.sequences[0].sampling.max_tokens == 256 - admitted.num_prompt_tokens


@pytest.mark.parametrize("num_tokens", [256, 257])
async def test_a_prompt_that_fills_the_context_is_refused_without_max_tokens(admit: Admitter, num_tokens: int) -> None:
    with pytest.raises(ContextLengthError, match=f"'prompt' has {num_tokens} tokens") as raised:
        await admit.completion([1] * num_tokens)
    assert raised.value.code == "context_length_exceeded"
    empty = (await admit.chat("")).num_prompt_tokens
    with pytest.raises(ContextLengthError, match=f"'messages' has {num_tokens} tokens"):
        await admit.chat("x" * (num_tokens - empty))


async def test_a_prompt_that_leaves_one_token_gets_it(admit: Admitter) -> None:
    assert (await admit.completion([1] * 255)).sequences[0].sampling.max_tokens == 1
    empty = (await admit.chat("")).num_prompt_tokens
    assert (await admit.chat("x" * (255 - empty))).sequences[0].sampling.max_tokens == 1


async def test_a_chats_answer_begins_anew_and_ends_as_the_template_ends_turns(admit: Admitter) -> None:
    chat_request = (await admit.chat("hi")).sequences[0]
    im_end = admit.tokenizer.backend_tokenizer.token_to_id("<|im_end|>")
    assert (chat_request.continues_prompt, chat_request.end_of_turn_ids) == (False, (im_end,))
    completion_request = (await admit.completion("hi")).sequences[0]
    assert (completion_request.continues_prompt, completion_request.end_of_turn_ids) == (True, ())


async def test_the_default_of_completions_shrinks_to_what_is_left(admit: Admitter) -> None:
    admitted = await admit.completion([1] * 250)
    assert admitted.sequences[0].sampling.max_tokens == 6


async def test_every_parameter_reaches_the_engine(admit: Admitter) -> None:
    admitted = await admit.chat(
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        seed=11,
        presence_penalty=1,
        frequency_penalty=-1.5,
        stop="END",
        logprobs=True,
        top_logprobs=3,
        ignore_eos=True,
        logit_bias={"5": -100},
        min_p=0.125,
        repetition_penalty=1.5,
        min_tokens=4,
        stop_token_ids=[7, 8],
        include_stop_str_in_output=True,
        prompt_logprobs=2,
    )
    assert admitted.sequences[0].sampling == SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        seed=11,
        presence_penalty=1.0,
        frequency_penalty=-1.5,
        stop=("END",),
        logprobs=3,
        ignore_eos=True,
        logit_bias={5: -100.0},
        min_p=0.125,
        repetition_penalty=1.5,
        min_tokens=4,
        stop_token_ids=(7, 8),
        include_stop_string=True,
        prompt_logprobs=2,
    )
    assert admitted.num_logprobs == 3


async def test_logprobs_without_top_are_those_of_the_sampled_token(admit: Admitter) -> None:
    assert (await admit.chat(logprobs=True)).sequences[0].sampling.logprobs == 0
    assert (await admit.completion(logprobs=0)).sequences[0].sampling.logprobs == 0
    assert (await admit.chat(logprobs=False)).sequences[0].sampling.logprobs is None


@pytest.mark.parametrize("top_k", [-1, 0, None])
async def test_top_k_without_a_limit_is_zero(admit: Admitter, top_k: int | None) -> None:
    assert (await admit.chat(top_k=top_k)).sequences[0].sampling.top_k == 0


async def test_an_echo_with_log_probabilities_wants_those_of_the_prompt(admit: Admitter) -> None:
    assert (await admit.completion("ab", echo=True)).sequences[0].sampling.prompt_logprobs is None
    assert (await admit.completion("ab", echo=True, logprobs=3)).sequences[0].sampling.prompt_logprobs == 3
    both = await admit.completion("ab", echo=True, logprobs=3, prompt_logprobs=5)
    assert both.sequences[0].sampling.prompt_logprobs == 5
    assert (await admit.completion("ab", logprobs=3)).sequences[0].sampling.prompt_logprobs is None


async def test_a_prompt_can_be_scored_without_generating(admit: Admitter) -> None:
    for fields in ({"echo": True}, {"prompt_logprobs": 0}):
        assert (await admit.completion("ab", max_tokens=0, **fields)).sequences[0].sampling.max_tokens == 0


async def test_fields_without_effect_are_listed(admit: Admitter) -> None:
    admitted = await admit.chat(
        user="ann", metadata={"a": "b"}, store=True, tools=[], temperature=1, seed=None, service_tier=None,
        stream=True, stream_options={"continuous_usage_stats": True},
    )  # fmt: skip
    assert set(admitted.ignored_fields) == {
        "user",
        "metadata",
        "store",
        "tools",
        "stream_options.continuous_usage_stats",
    }
    assert (await admit.chat(temperature=1)).ignored_fields == ()


async def test_choices_share_the_prompt_and_differ_in_id_and_seed(admit: Admitter) -> None:
    admitted = await admit.completion([[1, 2], [3]], n=2, seed=42)
    assert [sequence.request_id for sequence in admitted.sequences] == [
        "cmpl-1-0",
        "cmpl-1-1",
        "cmpl-1-2",
        "cmpl-1-3",
    ]
    assert [sequence.prompt_token_ids for sequence in admitted.sequences] == [[1, 2], [1, 2], [3], [3]]
    seeds = [sequence.sampling.seed for sequence in admitted.sequences]
    assert seeds[0] == seeds[2] == 42
    assert seeds[1] == seeds[3] != 42
    assert admitted.num_prompt_tokens == 3


@given(seed=st.integers(-(2**63), 2**63 - 1), choice=st.integers(0, 127))
def test_a_seed_of_a_choice_fits_an_engine_and_is_always_the_same(seed: int, choice: int) -> None:
    assert 0 <= seed_of_choice(seed, choice) < 2**63
    assert seed_of_choice(seed, choice) == seed_of_choice(seed, choice)


@given(seed=st.integers(0, 2**63 - 1))
def test_the_first_choice_keeps_the_seed_and_no_two_share_one(seed: int) -> None:
    seeds = [seed_of_choice(seed, choice) for choice in range(32)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 32
