"""Shared parts of the gateway's tests: a scripted engine, a small tokenizer, and a real server on the loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import uvicorn
from fastapi import FastAPI
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from moeless.core.generation import (
    EngineStats,
    FinishReason,
    FunctionStatus,
    GenerationDelta,
    GenerationRequest,
    ModelInfo,
    PredictionStatus,
    TokenLogprob,
    WorkerStatus,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODEL_ID = "org/tiny-moe"
Script = Callable[[GenerationRequest], AsyncIterator[GenerationDelta]]


def write_tokenizer(folder: Path, *, chat_template: str | None = CHATML, adds_bos: bool = True) -> Path:
    """A byte-level tokenizer without merges: one token a byte, plus special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")]
    )
    if adds_bos:
        bos_id = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos_id)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_bytes(msgspec.json.encode(config))
    return folder


def model_info(tokenizer_path: Path, *, max_context_tokens: int = 256) -> ModelInfo:
    return ModelInfo(
        model_id=MODEL_ID,
        created_unix_s=1_700_000_000,
        max_context_tokens=max_context_tokens,
        vocab_size=260,
        tokenizer_path=str(tokenizer_path),
        num_layers=2,
        num_experts=4,
        top_k=2,
        hidden_size=64,
        dtype="float32",
        device="cpu",
    )


STATS = EngineStats(
    requests_running=3,
    requests_waiting=2,
    kv_cache_usage=0.25,
    cold_starts=5,
    evictions=2,
    warm_starts=70,
    dispatch_seconds_sum=0.5,
    dispatch_seconds_count=10,
    dispatch_seconds_buckets=[(0.001, 4), (0.01, 9)],
    dispatch_retries=1,
    dispatch_fallbacks=2,
    tokens_per_worker={"worker-0": 40, "worker-1": 60},
    workers=[
        WorkerStatus(name="worker-0", alive=True, transport="shm", instances=2, resident_bytes=200, tokens_served=40),
        WorkerStatus(name="worker-1", alive=False, transport="tcp", instances=1, resident_bytes=100, tokens_served=60),
    ],
    predictions=[
        PredictionStatus(
            layer=2,
            distance=1,
            kind="history",
            reason="history: 0.84, the best",
            active=False,
            recall=0.5,
            load_error=0.75,
            popularity_error=0.625,
            bound_width=1.5,
            popularity_bound_width=2.25,
            coverage=0.875,
            forecasts=40,
            seconds=0.25,
        )
    ],
)

FUNCTIONS = [
    FunctionStatus(
        name=f"L{layer:02d}.E{expert:03d}",
        layer=layer,
        expert=expert,
        state="warm" if expert < 3 else "cold",
        replicas=1 if expert < 3 else 0,
        workers=["worker-0"] if expert < 3 else [],
        bytes=100,
        tokens_served=10 * expert,
    )
    for layer in range(2)
    for expert in range(4)
]


class ScriptedEngine:
    """An EngineClient that says what a test tells it to, and notes what happens to its sequences."""

    def __init__(self, info: ModelInfo, script: Script | None = None) -> None:
        self.info = info
        self.script = script or saying("Hello", " world")
        self.requests: list[GenerationRequest] = []
        self.ended: list[str] = []
        self.cancelled: list[str] = []
        self.num_said = 0
        self.is_closed = False
        self.ready = True
        self.ready_error: Exception | None = None
        self.stats_error: Exception | None = None
        self.recordings: Any = None

    async def model_info(self) -> ModelInfo:
        return self.info

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        self.requests.append(request)
        is_over = False
        try:
            async for delta in self.script(request):
                is_over = delta.finish_reason is not None
                self.num_said += 1
                yield delta
        except Exception:
            is_over = True
            raise
        finally:
            (self.ended if is_over else self.cancelled).append(request.request_id)

    async def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    async def close(self) -> None:
        self.is_closed = True

    async def stats(self) -> EngineStats:
        if self.stats_error is not None:
            raise self.stats_error
        return STATS

    async def functions(self) -> list[FunctionStatus]:
        return FUNCTIONS

    async def is_ready(self) -> bool:
        if self.ready_error is not None:
            raise self.ready_error
        return self.ready


def delta(request: GenerationRequest, text: str, **fields: object) -> GenerationDelta:
    known = {"num_tokens": 1, "num_prompt_tokens": len(request.prompt_token_ids)} | fields
    return GenerationDelta(request_id=request.request_id, text=text, **known)


def saying(*texts: str, reason: FinishReason = "stop") -> Script:
    """Each text as one token, the last with the finish reason; log-probabilities if the request wants them."""

    async def script(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        for position, text in enumerate(texts):
            logprobs = []
            if request.sampling.logprobs is not None:
                offset = sum(map(len, texts[:position]))
                logprobs = [token_logprob(text, request.sampling.logprobs, text_offset=offset)]
            is_last = position == len(texts) - 1
            yield delta(request, text, logprobs=logprobs, finish_reason=reason if is_last else None)

    return script


def token_logprob(text: str, num_top: int, *, text_offset: int = 0) -> TokenLogprob:
    top = [(rank, f"t{rank}", b"t%d" % rank, -0.5 * (rank + 1)) for rank in range(num_top)]
    return TokenLogprob(
        token_id=1, token=text, token_bytes=text.encode(), logprob=-0.5, top=top, text_offset=text_offset
    )


def failing(error: Exception, *before: str) -> Script:
    async def script(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        for text in before:
            yield delta(request, text)
        raise error

    return script


def never_ending(text: str = "x") -> Script:
    async def script(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        while True:
            yield delta(request, text)
            await asyncio.sleep(0.005)

    return script


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    """A real HTTP server on a free port; yields its address."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws="none", lifespan="on")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started or task.done())
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


async def until(condition: Callable[[], bool], *, deadline_s: float = 20.0) -> None:
    """Wait for a condition, looking every few milliseconds."""
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(0.005)


async def until_ready(client: httpx.AsyncClient, *, deadline_s: float = 20.0) -> None:
    async with asyncio.timeout(deadline_s):
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.01)


class Gateway:
    """Clients for a running gateway."""

    def __init__(self, address: str, api_key: str) -> None:
        self.address = address
        headers = {"authorization": f"Bearer {api_key}"}
        self.http = httpx.AsyncClient(base_url=address, headers=headers, timeout=30.0)
        self.openai = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=api_key, max_retries=0, timeout=30.0)

    async def events(self, path: str, body: dict[str, object]) -> list[str]:
        """The data of each event of a stream, as raw text."""
        async with self.http.stream("POST", path, json=body) as response:
            assert response.status_code == 200, await response.aread()
            assert response.headers["content-type"].startswith("text/event-stream")
            text = (await response.aread()).decode()
        assert text.endswith("\n\n")
        return [line.removeprefix("data: ") for line in text.strip().split("\n\n")]


@asynccontextmanager
async def gateway_for(app: FastAPI, *, api_key: str = "unused") -> AsyncIterator[Gateway]:
    """A served gateway whose engine is ready."""
    async with serving(app) as address:
        gateway = Gateway(address, api_key)
        async with gateway.http, gateway.openai:
            await until_ready(gateway.http)
            yield gateway


def chat(content: object = "hi", **fields: object) -> dict[str, object]:
    """A body for /v1/chat/completions."""
    return {"model": MODEL_ID, "messages": [{"role": "user", "content": content}], **fields}


def completion(prompt: object = "hi", **fields: object) -> dict[str, object]:
    """A body for /v1/completions."""
    return {"model": MODEL_ID, "prompt": prompt, **fields}


def chunks_of(events: Sequence[str]) -> list[dict[str, object]]:
    """The JSON chunks of a stream that ended with [DONE]."""
    assert events[-1] == "[DONE]"
    return [msgspec.json.decode(event) for event in events[:-1]]
