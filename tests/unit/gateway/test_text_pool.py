"""Bodies are read beside the event loop, within limits, whatever template and tokenizer a model brings."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from moeless.core.errors import ConfigError, ContextLengthError, ModelNotFoundError, QueueFullError, RequestError
from moeless.core.generation import ModelInfo
from moeless.gateway import GatewayConfig
from moeless.gateway.admission import AdmittedRequest
from moeless.gateway.text_pool import TextPool, TextProcessError
from tests.unit.gateway.support import CHATML, chat, completion, model_info, until, write_tokenizer

pytestmark = pytest.mark.anyio

COUNTING = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
DOUBLING = "{% set ns = namespace(s='x' * 1000) %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
ONE_LONG_STEP = "{{ 9 ** ((messages | length + 8) ** 9) }}"
"""A single operation of the interpreter, which no exception can interrupt."""


@asynccontextmanager
async def pool_for(info: ModelInfo, config: GatewayConfig | None = None) -> AsyncIterator[TextPool]:
    pool = TextPool(config or GatewayConfig())
    try:
        await pool.load(info)
        yield pool
    finally:
        await pool.close()


@pytest.fixture
async def pool(tokenizer_folder: Path) -> AsyncIterator[TextPool]:
    async with pool_for(model_info(tokenizer_folder)) as pool:
        yield pool


def admit_chat(pool: TextPool, content: object = "hi", **fields: object) -> Coroutine[Any, Any, AdmittedRequest]:
    return pool.admit("chat", msgspec.json.encode(chat(content, **fields)), "chatcmpl-1")


def admit(pool: TextPool, prompt: object = "hi", **fields: object) -> Coroutine[Any, Any, AdmittedRequest]:
    return pool.admit("completion", msgspec.json.encode(completion(prompt, **fields)), "cmpl-1")


def children_of(pool: TextPool) -> list[psutil.Process]:
    assert pool._parent is not None
    return psutil.Process(pool._parent._process.pid).children()


# -- what comes out ----------------------------------------------------------------------------------------------------


async def test_a_chat_is_admitted_with_its_tokens(pool: TextPool) -> None:
    admitted = await admit_chat(pool, "é", n=2, seed=7, max_tokens=5)
    first, second = admitted.sequences
    assert admitted.num_prompt_tokens == len(first.prompt_token_ids)
    assert first.sampling.seed == 7
    assert (first.request_id, second.request_id) == ("chatcmpl-1-0", "chatcmpl-1-1")


async def test_choices_share_one_prompt(pool: TextPool) -> None:
    admitted = await admit(pool, ["first", "second"], n=3)
    prompts = [sequence.prompt_token_ids for sequence in admitted.sequences]
    assert prompts[0] is prompts[1] is prompts[2]
    assert prompts[3] is prompts[4] is prompts[5]
    assert prompts[0] != prompts[3]


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"model": "other"}, ModelNotFoundError, "model"),
        ({"temperature": 3}, RequestError, "temperature"),
        ({"prompt": [1] * 300}, ContextLengthError, "prompt"),
    ],
)
async def test_errors_keep_their_kind_and_field(
    pool: TextPool, fields: dict[str, object], kind: type[RequestError], param: str
) -> None:
    with pytest.raises(kind) as raised:
        await pool.admit("completion", msgspec.json.encode(completion() | fields), "cmpl-1")
    assert type(raised.value) is kind
    assert raised.value.param == param


async def test_what_cannot_be_json_is_the_clients_fault(pool: TextPool) -> None:
    with pytest.raises(RequestError, match="not valid JSON"):
        await pool.admit("chat", b"[" * 100_000, "chatcmpl-1")


async def test_a_text_too_long_by_its_length_is_not_tokenized(pool: TextPool) -> None:
    with pytest.raises(ContextLengthError, match="at least 2000000 tokens"):
        await admit(pool, "7" * 2_000_000)


async def test_a_missing_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        async with pool_for(model_info(tmp_path)):
            pass


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "code"),
    [
        (COUNTING, "chat_template_limit"),
        (ONE_LONG_STEP, "chat_template_limit"),
        ("{{ 'x' * (messages | length * 4000000000) }}", "text_memory_limit"),
        (DOUBLING, "text_memory_limit"),
    ],
    ids=["loops", "one long step", "a long string", "a growing string"],
)
async def test_a_template_that_takes_too_much_is_an_error(tmp_path: Path, template: str, code: str) -> None:
    source = "{% if messages[-1].content == 'bad' %}" + template + "{% endif %}" + CHATML
    async with pool_for(model_info(write_tokenizer(tmp_path, chat_template=source))) as pool:
        for _ in range(2):  # the second one in what replaced the first one's process
            with pytest.raises(RequestError) as raised:
                await admit_chat(pool, "bad")
            assert raised.value.code == code
        assert (await admit_chat(pool, "good")).num_prompt_tokens > 4


async def test_what_a_template_computes_when_it_is_compiled_is_limited(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, chat_template="{{ 9 ** (9 ** 9) }}")
    with pytest.raises(TextProcessError, match="compiling the template may take 0.85 s"):
        async with pool_for(model_info(folder)):
            pass


@pytest.mark.parametrize("template", [COUNTING, ONE_LONG_STEP])
async def test_a_template_that_always_takes_too_much_leaves_completions_alone(tmp_path: Path, template: str) -> None:
    async with pool_for(model_info(write_tokenizer(tmp_path, chat_template=template))) as pool:
        with pytest.raises(RequestError):
            await admit_chat(pool)
        assert (await admit(pool)).num_prompt_tokens == 3


async def test_an_endless_template_ends_within_a_second(tmp_path: Path) -> None:
    source = "{% if messages[-1].content == 'bad' %}" + COUNTING + "{% endif %}" + CHATML
    async with pool_for(model_info(write_tokenizer(tmp_path, chat_template=source))) as pool:
        await admit_chat(pool)
        [child] = children_of(pool)
        started = child.cpu_times()
        refused = asyncio.create_task(admit_chat(pool, "bad"))
        used_s, resident = 0.0, 0
        while not refused.done():
            try:
                now, resident = child.cpu_times(), max(resident, child.memory_info().rss)
                used_s = now.user + now.system - started.user - started.system
            except psutil.NoSuchProcess:
                break
            await asyncio.sleep(0.01)
        with pytest.raises(RequestError):
            await refused
    # Of its own processor: how long that takes on the clock is for the other processes to say.
    assert used_s <= 1.0
    assert resident < 200 * 2**20


BLOWS_UP = Regex(r"(a|a)*(a|aa)*b|(?=(a+a+)+c)x")


@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
async def test_a_tokenizer_that_panics_is_an_error(tmp_path: Path, part: str) -> None:
    folder = write_tokenizer(tmp_path)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if part == "normalizer":
        backend.normalizer = normalizers.Replace(BLOWS_UP, "b")
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(BLOWS_UP, "isolated"), backend.pre_tokenizer]
        )
    backend.save(str(folder / "tokenizer.json"))
    async with pool_for(model_info(folder)) as pool:
        for prompt in ("a" * 36, "a" * 240):  # the longer one is normalized to bound its length first
            with pytest.raises(RequestError, match="tokenizer cannot encode this text") as raised:
                await admit(pool, prompt)
            assert raised.value.code == "tokenizer_failed"
        assert (await admit(pool, "hi")).num_prompt_tokens == 3


async def test_more_bodies_than_the_limit_are_refused(tokenizer_folder: Path) -> None:
    config = GatewayConfig(max_waiting_texts=3)
    async with pool_for(model_info(tokenizer_folder), config) as pool:
        results = await asyncio.gather(*(admit(pool) for _ in range(5)), return_exceptions=True)
        assert [type(result) for result in results] == [AdmittedRequest] * 3 + [QueueFullError] * 2
        assert isinstance(await admit(pool), AdmittedRequest)


async def test_small_bodies_do_not_wait_for_large_ones(tmp_path: Path) -> None:
    source = "{% if messages[-1].content | length > 99 %}" + COUNTING + "{% endif %}" + CHATML
    async with pool_for(model_info(write_tokenizer(tmp_path, chat_template=source))) as pool:
        large = [asyncio.create_task(admit_chat(pool, "x" * 100_000)) for _ in range(4)]
        await asyncio.sleep(0)
        await admit_chat(pool, "small")
        assert not any(task.done() for task in large)
        for task in large:
            task.cancel()
        await asyncio.wait(large)


# -- the event loop ----------------------------------------------------------------------------------------------------


async def max_step_s(work: Callable[[], Coroutine[Any, Any, Any]]) -> float:
    """Most processor time that this thread spent between two looks, while `work` ran."""
    task = asyncio.create_task(work())
    longest_s = 0.0
    while not task.done():
        before_s = time.thread_time()
        await asyncio.sleep(0)
        longest_s = max(longest_s, time.thread_time() - before_s)
    await asyncio.wait([task])
    return longest_s


LONG_PROMPT = " ".join(["beta"] * 26_000)
BODIES = {
    "a prompt that fills the context": completion(LONG_PROMPT),
    "as many choices as there may be": completion(LONG_PROMPT, n=32),
    "a prompt that is too long": completion("7 a" * 300_000),
    "token ids": completion(list(range(200)) * 650),
    "too many token ids": completion([100] * 300_000),
    "unknown fields": completion() | {f"k{i}": i for i in range(30_000)},
    "many messages": chat(messages=[{"role": "user", "content": "x"}] * 10_000),
    "one long message": chat(LONG_PROMPT),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
async def test_no_body_holds_up_the_event_loop(tokenizer_folder: Path, body: dict[str, object]) -> None:
    endpoint = "chat" if "messages" in body else "completion"
    data = msgspec.json.encode(body)
    async with pool_for(model_info(tokenizer_folder, max_context_tokens=131_072)) as pool:

        async def work() -> None:
            await asyncio.gather(*(pool.admit(endpoint, data, "r") for _ in range(2)), return_exceptions=True)

        await work()  # what is imported and compiled at the first time is not the body's
        assert await max_step_s(work) < 0.010


# -- processes ---------------------------------------------------------------------------------------------------------


async def test_memory_of_large_bodies_goes_back(tokenizer_folder: Path) -> None:
    async with pool_for(model_info(tokenizer_folder, max_context_tokens=131_072)) as pool:
        await admit(pool)
        before = psutil.Process().memory_info().rss
        for _ in range(3):
            await asyncio.gather(*(admit(pool, LONG_PROMPT) for _ in range(8)))
        await until(lambda: all(child.memory_info().rss < 100 * 2**20 for child in children_of(pool)))
        assert psutil.Process().memory_info().rss - before < 100 * 2**20


async def test_a_killed_process_fails_its_request_and_no_other(pool: TextPool) -> None:
    await admit(pool)
    [child] = children_of(pool)
    child.suspend()
    failing = asyncio.create_task(admit(pool))
    await asyncio.sleep(0)
    child.kill()
    with pytest.raises(TextProcessError, match="signal 9"):
        await failing
    assert (await admit(pool)).num_prompt_tokens == 3


async def test_the_parent_is_started_again(pool: TextPool) -> None:
    await admit_chat(pool)
    assert pool._parent is not None
    for child in children_of(pool):
        child.kill()
    pool._parent._process.kill()
    with pytest.raises(TextProcessError):
        await admit_chat(pool)
    assert (await admit_chat(pool)).num_prompt_tokens > 3


async def test_a_cancelled_request_gives_up_its_process(tmp_path: Path) -> None:
    source = "{% if messages[-1].content == 'bad' %}" + COUNTING + "{% endif %}" + CHATML
    async with pool_for(model_info(write_tokenizer(tmp_path, chat_template=source))) as pool:
        await admit_chat(pool)
        [child] = children_of(pool)
        running = asyncio.create_task(admit_chat(pool, "bad"))
        used_s = child.cpu_times().user
        await until(lambda: child.cpu_times().user > used_s + 0.1)
        running.cancel()
        await until(lambda: not child.is_running())
        assert (await admit_chat(pool)).num_prompt_tokens > 3


async def test_the_parent_is_started_again_once_for_requests_that_come_together(pool: TextPool) -> None:
    assert pool._parent is not None
    children_of_others = {process.pid for process in psutil.Process().children()} - {pool._parent._process.pid}
    pool._parent._process.kill()
    admitted = await asyncio.gather(*(admit(pool) for _ in range(4)))
    assert [one.num_prompt_tokens for one in admitted] == [3] * 4
    children = {process.pid for process in psutil.Process().children()} - children_of_others
    assert children == {pool._parent._process.pid}


async def test_requests_cancelled_while_their_process_is_forked_leave_none(pool: TextPool) -> None:
    assert pool._parent is not None
    parent = psutil.Process(pool._parent._process.pid)
    await until(lambda: not pool._commands)  # those of the start
    parent.suspend()  # the first command is on its way, the second one waits
    requests = [asyncio.create_task(admit(pool)) for _ in range(2)]
    await until(lambda: len(pool._commands) >= 2)
    for request in requests:
        request.cancel()
    await asyncio.wait(requests)
    reused = [socket.socketpair() for _ in range(4)]  # they take the numbers of descriptors that were closed
    parent.resume()
    await until(lambda: not pool._commands)
    assert children_of(pool) == []
    for pair in reused:
        for end in pair:
            end.close()
    assert (await admit(pool)).num_prompt_tokens == 3


async def test_text_processes_have_no_secrets_and_dump_no_core(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MOELESS_RUN_SECRET", "MOELESS_API_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "very-private")
    async with pool_for(model_info(tokenizer_folder)) as pool:
        await admit(pool)
        [child] = children_of(pool)
        for process in (child.parent(), child):
            assert process is not None
            assert "very-private" not in process.environ().values()
            assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)


async def test_no_process_outlives_a_gateway_that_was_killed(tokenizer_folder: Path) -> None:
    script = (
        "import asyncio, json, os, sys\n"
        "from pathlib import Path\n"
        "from tests.unit.gateway.test_text_pool import *\n"
        "async def main():\n"
        "    pool = TextPool(GatewayConfig())\n"
        "    await pool.load(model_info(Path(sys.argv[1])))\n"
        "    await admit(pool)\n"
        "    print(json.dumps([pool._parent._process.pid, *(c.pid for c in children_of(pool))]), flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(tokenizer_folder), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    pids: list[int] = json.loads(await process.stdout.readline())
    assert len(pids) == 2
    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    await until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


# -- conversations with tools ------------------------------------------------------------------------------------------

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Oslo"}'}}
WITH_TOOLS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "Rain."}]},
]


async def test_past_tool_calls_reach_the_template(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.id }}={{ c.function.arguments }};{% endfor %}"
        "{{ m.role }}:{{ m.content }}({{ m.tool_call_id }}){% endfor %}"
    )
    folder = write_tokenizer(tmp_path, chat_template=template)
    async with pool_for(model_info(folder)) as pool:
        admitted = await admit_chat(pool, messages=WITH_TOOLS)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = backend.decode(admitted.sequences[0].prompt_token_ids, skip_special_tokens=False)
    assert text == 'user:Weather?()c1={"city": "Oslo"};assistant:None()tool:Rain.(c1)'


async def test_a_template_that_cannot_take_tools_is_the_clients_error_in_its_words(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
    async with pool_for(model_info(write_tokenizer(tmp_path, chat_template=template))) as pool:
        with pytest.raises(RequestError, match="refuses these messages: can only concatenate str") as raised:
            await admit_chat(pool, messages=WITH_TOOLS)
    assert raised.value.param == "messages"
