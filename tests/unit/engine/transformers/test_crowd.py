"""Many requests at once, from several threads, some cancelled, memory too small for all: nothing may leak or hang."""

from __future__ import annotations

import random
import threading

import pytest

from moeless.core.errors import QueueFullError
from moeless.engine.transformers.threaded_engine import ThreadedEngine
from tests.unit.engine.support import Recorder, assert_equal_tokens, eager_model, prompt_of, request, running

NUM_CLIENTS, REQUESTS_EACH = 4, 25


def be_a_client(engine: ThreadedEngine, recorder: Recorder, client: int, kinds: dict[str, tuple[int, int]]) -> None:
    rng = random.Random(client)
    for n in range(REQUESTS_EACH):
        request_id = f"{client}-{n}"
        length, max_tokens = rng.choice([1, 5, 20, 20, 60]), rng.choice([1, 3, 10, 40])
        what = request(
            request_id,
            prompt_of(length),
            max_tokens=max_tokens,
            temperature=rng.choice([0.0, 0.0, 1.0]),
            stop=rng.choice([(), (), ("e",)]),
            presence_penalty=rng.choice([0.0, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
        )
        while True:
            # What makes the queue full now, or is submitted now, takes part in a step after these.
            num_steps = len(recorder.steps)
            try:
                engine.submit(what)
                break
            except QueueFullError:
                recorder.wait_for_step(num_steps + 1)
        if what.sampling.temperature == 0 and not what.sampling.presence_penalty and not what.sampling.stop:
            kinds[request_id] = (length, max_tokens)
        if rng.random() < 0.2:
            recorder.wait_for_step(num_steps + 1)
            engine.cancel(f"{client}-{rng.randint(0, n)}")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_a_crowd_is_served_to_the_last_and_leaves_nothing_behind(family: str) -> None:
    model = eager_model(family)
    recorder = Recorder()
    kinds: dict[str, tuple[int, int]] = {}
    # About 300 tokens of keys and values, for eight sequences of up to 100.
    bytes_per_token = {"mixtral": 256, "gpt_oss": 512, "deepseek_v3": 288, "qwen3_next": 256}[family]
    with running(model, recorder, kv_cache_bytes=300 * bytes_per_token, page_size=8, max_waiting=10) as engine:
        clients = [
            threading.Thread(target=be_a_client, args=(engine, recorder, client, kinds))
            for client in range(NUM_CLIENTS)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        everything = [f"{client}-{n}" for client in range(NUM_CLIENTS) for n in range(REQUESTS_EACH)]
        answers = dict(zip(everything, recorder.wait_for(*everything), strict=True))
        counters = engine.counters()
        assert (counters.requests_running, counters.requests_waiting, counters.kv_cache_usage) == (0, 0, 0)
    assert {answer.finish_reason for answer in answers.values()} <= {"stop", "length", "cancelled"}
    assert sum(answer.finish_reason == "cancelled" for answer in answers.values()) < len(everything) / 2
    for request_id, (length, max_tokens) in kinds.items():
        answer = answers[request_id]
        if answer.finish_reason == "length":
            assert len(answer.token_ids) == max_tokens
            assert_equal_tokens(model, prompt_of(length), answer.token_ids)
