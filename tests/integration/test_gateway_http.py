"""The gateway over a real engine: HTTP on the loopback, the openai package, tokens from a tiny random model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moeless.core.generation import ModelInfo
from moeless.engine.config import EngineConfig
from moeless.engine.local_client import LocalEngineClient
from moeless.engine.protocol import Engine
from moeless.engine.transformers.build import build_engine
from moeless.gateway.app import create_app
from moeless.gateway.config import GatewayConfig
from moeless.text.tokenizer import Tokenizer
from tests.families import VOCAB_SIZE, make_model, make_tokenizer
from tests.unit.gateway.support import Gateway, gateway_for, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

MODEL_ID = "tiny-mixtral"
CONTEXT = 512
MAX_RUNNING, MAX_WAITING = 4, 4


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    # As many checkpoints of byte-level tokenizers have it; the class alone would decode as SentencePiece does.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    model = make_model("mixtral")
    model.set_experts_implementation("eager")
    model.generation_config.eos_token_id = -1  # so that the tokenizer alone names the end
    config = EngineConfig(
        kv_cache_bytes=1 << 22, max_running=MAX_RUNNING, max_waiting=MAX_WAITING, max_batch_tokens=64,
        max_model_len=CONTEXT, num_threads=1,
    )  # fmt: skip
    engine = build_engine(model, Tokenizer.load(folder, with_template=False), config)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
async def gateway(anyio_backend: str, engine: Engine, folder: Path) -> AsyncIterator[Gateway]:
    info = ModelInfo(
        model_id=MODEL_ID,
        created_unix_s=1_700_000_000,
        max_context_tokens=CONTEXT,
        vocab_size=VOCAB_SIZE,
        tokenizer_path=str(folder),
        num_layers=2,
        num_experts=4,
        top_k=2,
        hidden_size=32,
        dtype="float32",
        device="cpu",
    )
    client = LocalEngineClient(engine, info)
    engine.start()
    async with gateway_for(create_app(client, GatewayConfig())) as gateway:
        yield gateway


def chat(**fields: object) -> dict[str, object]:
    body = {"model": MODEL_ID, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "ignore_eos": True}
    return body | fields


def text_of(events: list[str]) -> str:
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])


async def test_a_stream_gives_the_text_of_the_whole_answer(gateway: Gateway) -> None:
    whole = await gateway.openai.chat.completions.create(
        model=MODEL_ID,
        messages=[{"role": "user", "content": "hi"}],
        temperature=0,
        max_tokens=12,
        extra_body={"ignore_eos": True},
    )
    events = await gateway.events("/v1/chat/completions", chat(temperature=0, stream=True))
    assert text_of(events) == whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12


def only(token: str) -> dict[str, int]:
    """A logit bias that leaves nothing but `token`."""
    return {str(make_tokenizer().convert_tokens_to_ids(token)): 100}


@pytest.mark.parametrize("stream", [False, True])
async def test_text_is_what_the_tokenizers_file_says_whatever_its_class(gateway: Gateway, stream: bool) -> None:
    body = chat(temperature=0, logit_bias=only("Ġexperts"), max_tokens=3, stream=stream)
    if stream:
        text = text_of(await gateway.events("/v1/chat/completions", body))
    else:
        response = await gateway.http.post("/v1/chat/completions", json=body)
        text = response.json()["choices"][0]["message"]["content"]
    assert text == " experts experts experts"


async def test_a_chat_ends_where_the_tokenizer_and_the_template_end_a_turn(gateway: Gateway) -> None:
    body = chat(temperature=0, logit_bias=only("<|end|>"), ignore_eos=False)
    answer = (await gateway.http.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 1


async def test_a_special_token_as_a_stop_string_is_matched(gateway: Gateway) -> None:
    body = chat(temperature=0, logit_bias=only("<|user|>"), stop="<|user|>")
    answer = (await gateway.http.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["message"]["content"] == ""
    assert answer["usage"]["completion_tokens"] == 1


async def test_the_logprobs_of_a_completion_belong_to_its_text(gateway: Gateway) -> None:
    answer = await gateway.openai.completions.create(
        model=MODEL_ID, prompt="hello there", temperature=0, logprobs=3, max_tokens=8, extra_body={"ignore_eos": True}
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 8
    # Greedy: the sampled token is the likeliest.
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == pytest.approx(max(top.values()))


async def test_a_seed_repeats_an_answer_and_its_choices_differ(gateway: Gateway) -> None:
    body = chat(seed=7, n=3, temperature=1.5)
    first, second = [(await gateway.http.post("/v1/chat/completions", json=body)).json() for _ in range(2)]
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert texts == [choice["message"]["content"] for choice in second["choices"]]
    assert len(set(texts)) == 3
    alone = (await gateway.http.post("/v1/chat/completions", json=body | {"n": 1})).json()
    assert alone["choices"][0]["message"]["content"] == texts[0]


async def test_a_stop_string_ends_the_text_before_it(gateway: Gateway) -> None:
    body = chat(temperature=0, max_tokens=40)
    whole = (await gateway.http.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 :][:3]
    events = await gateway.events("/v1/chat/completions", body | {"stop": [stop, "never this"], "stream": True})
    assert text_of(events) == whole[: whole.index(stop)]
    assert '"finish_reason":"stop"' in events[-2]


async def content_of(gateway: Gateway, **fields: object) -> str:
    response = await gateway.http.post("/v1/chat/completions", json=chat(**fields))
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


async def test_the_sampling_fields_of_vllm_reach_the_engine(gateway: Gateway) -> None:
    greedy = await content_of(gateway, temperature=0, max_tokens=40)
    assert await content_of(gateway, temperature=1.5, min_p=1, max_tokens=40) == greedy
    assert await content_of(gateway, temperature=0, repetition_penalty=100, max_tokens=40) != greedy
    stop = greedy[len(greedy) // 2 :][:3]
    end = greedy.index(stop) + len(stop)
    assert (
        await content_of(gateway, temperature=0, max_tokens=40, stop=stop, include_stop_str_in_output=True)
        == (greedy[:end])
    )
    assert len(await content_of(gateway, temperature=0, max_tokens=40, stop=greedy[:2], min_tokens=20)) >= 20


async def test_a_stop_token_ends_the_answer_and_is_named(gateway: Gateway) -> None:
    body = {"model": MODEL_ID, "prompt": [10, 11, 12], "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    scored = {"prompt_logprobs": 0, "stop_token_ids": [300], "logit_bias": {"300": 100}}
    [choice] = (await gateway.http.post("/v1/completions", json=body | scored)).json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"], choice["text"]) == ("stop", 300, "")
    assert [list(row) for row in choice["prompt_logprobs"][1:]] == [["11"], ["12"]]


async def test_streams_at_once_get_what_each_gets_alone(gateway: Gateway) -> None:
    bodies = [chat(seed=seed, temperature=1.0, stream=True) for seed in range(MAX_RUNNING + MAX_WAITING)]
    alone = [text_of(await gateway.events("/v1/chat/completions", body)) for body in bodies]
    together = await asyncio.gather(*(gateway.events("/v1/chat/completions", body) for body in bodies))
    assert [text_of(events) for events in together] == alone


async def test_a_full_queue_is_429_and_the_others_are_served(gateway: Gateway) -> None:
    body = chat(max_tokens=60)
    sent = 3 * (MAX_RUNNING + MAX_WAITING)
    responses = await asyncio.gather(*(gateway.http.post("/v1/chat/completions", json=body) for _ in range(sent)))
    codes = [response.status_code for response in responses]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= MAX_WAITING
    assert all(int(response.headers["retry-after"]) >= 1 for response in responses if response.status_code == 429)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_frees_its_place_and_its_pages(
    gateway: Gateway, engine: Engine, stream: bool
) -> None:
    async with httpx.AsyncClient(base_url=gateway.address) as leaving:
        body = chat(max_tokens=450, n=MAX_RUNNING, stream=stream)
        sending = [asyncio.create_task(leaving.post("/v1/chat/completions", json=body)) for _ in range(2)]
        await until(lambda: engine.counters().requests_running == MAX_RUNNING)
        for task in sending:
            task.cancel()
        await until(lambda: engine.counters().requests_running + engine.counters().requests_waiting == 0)
    await until(lambda: engine.counters().kv_cache_usage == 0)


async def test_metrics_tell_what_was_served(gateway: Gateway) -> None:
    def total(text: str, name: str) -> float:
        families = text_string_to_metric_families(text)
        return sum(sample.value for family in families for sample in family.samples if sample.name == f"moeless_{name}")

    before = (await gateway.http.get("/metrics")).text
    await gateway.http.post("/v1/chat/completions", json=chat(n=2))
    after = (await gateway.http.get("/metrics")).text
    assert total(after, "generation_tokens_total") - total(before, "generation_tokens_total") == 24
    assert total(after, "request_success_total") - total(before, "request_success_total") == 2
    assert total(after, "engine_up") == 1
