"""`moeless serve` on real Ray: workers, a killed worker, a killed engine, one deployment for each function."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from moeless.deployments.runtime import free_port
from moeless_predictors.fitting import FitConfig, fit_predictors
from moeless_predictors.traces import RoutingTrace
from moeless_predictors.traces.synthetic import synthetic_trace
from tests.families import VOCAB_SIZE, make_tokenizer
from tests.support.served import Served, serving, wait_until
from tests.unit.engine.routed import reference_routing

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of 2 layers x 4 experts."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-mixtral"
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = MixtralForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> tuple[MixtralForCausalLM, AutoTokenizer]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fit predictors of the checkpoint's shape on other routing."""
    path = tmp_path_factory.mktemp("predictors") / "tiny.safetensors"
    trace = synthetic_trace(num_sequences=12, tokens_per_sequence=30, num_layers=2, num_experts=4, top_k=2)
    config = FitConfig(kinds=("history",), distances=(1,), history={"epochs": 1, "min_steps": 1}, batch_sizes=(1, 8))
    fit_predictors(trace, config).save(path)
    return path


@pytest.fixture(scope="module")
def two_workers(checkpoint: Path, predictors: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("logs") / "serve.log"
    options = ("--workers", "2", "--served-model-name", "tiny")
    options += ("--predictors", str(predictors), "--predict-overhead", "1")
    with serving(checkpoint, *options, log=log) as served:
        yield served


def assert_is_greedy(reference: tuple[MixtralForCausalLM, AutoTokenizer], served: Served, num_tokens: int = 12) -> None:
    """Each token is the argmax of the reference on that very prefix, or within 1e-3 of its logit."""
    model, tokenizer = reference
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0)
    prompt_ids = tokenizer(PROMPT)["input_ids"]
    answer = client.completions.create(
        model="tiny",
        prompt=prompt_ids,
        max_tokens=num_tokens,
        temperature=0,
        logprobs=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == num_tokens
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    ids = list(prompt_ids)
    for got in logprobs.token_logprobs:
        with torch.inference_mode():
            expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].float(), dim=-1)
        assert abs(got - float(expected.max())) < 2e-3
        ids.append(int(expected.argmax()))


def test_two_workers_hold_each_function_once_and_answer_like_transformers(
    two_workers: Served, reference: tuple[MixtralForCausalLM, AutoTokenizer]
) -> None:
    assert_is_greedy(reference, two_workers)
    rows = two_workers.experts()
    assert len(rows) == 8
    assert all(row["state"] == "warm" and row["replicas"] == 1 for row in rows.values())
    assert {worker for row in rows.values() for worker in row["workers"]} == {"worker-0", "worker-1"}  # type: ignore[attr-defined]
    assert sum(int(str(row["tokens_served"])) for row in rows.values()) > 0


def test_streaming_through_serve_gives_the_same_text(two_workers: Served) -> None:
    client = openai.OpenAI(base_url=f"{two_workers.url}/v1", api_key="unused", max_retries=0)
    arguments = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 0.0}
    whole = client.completions.create(**arguments).choices[0].text  # type: ignore[call-overload]
    chunks = list(client.completions.create(**arguments, stream=True))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


def test_metrics_count_the_workers_tokens(two_workers: Served) -> None:
    two_workers.complete("tiny", PROMPT)
    text = httpx.get(f"{two_workers.url}/metrics").text
    assert 'moeless_worker_tokens_total{model_name="tiny",worker="worker-0"}' in text
    assert 'moeless_worker_tokens_total{model_name="tiny",worker="worker-1"}' in text


def test_forecasts_are_made_and_measured_beside_serving(two_workers: Served) -> None:
    two_workers.complete("tiny", PROMPT, max_tokens=40)
    (row,) = httpx.get(f"{two_workers.url}/v1/predictors").json()["data"]
    assert (row["layer"], row["distance"], row["kind"]) == (1, 1, "history")
    assert row["forecasts"] >= 40
    assert 0 < row["recall"] <= 1
    assert 'moeless_forecasts_total{layer="1",model_name="tiny"}' in httpx.get(f"{two_workers.url}/metrics").text


def test_a_recording_of_a_chat_is_the_models_routing(
    two_workers: Served, reference: tuple[MixtralForCausalLM, AutoTokenizer], tmp_path: Path
) -> None:
    url = f"{two_workers.url}/v1/traces/recording"
    started = httpx.post(url, json={"max_tokens": 1000, "hidden_layers": [1], "token_ids": True}, timeout=30)
    assert started.json()["state"] == "recording", started.text
    client = openai.OpenAI(base_url=f"{two_workers.url}/v1", api_key="unused", max_retries=0)
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": PROMPT}], max_tokens=9, extra_body={"ignore_eos": True}
    )
    assert httpx.get(f"{url}/file", timeout=30).status_code == 409
    stopped = httpx.post(f"{url}/stop", timeout=30).json()
    assert answer.usage is not None
    assert stopped["num_tokens"] == answer.usage.total_tokens - 1  # the last token is never computed
    (tmp_path / "trace").write_bytes(httpx.get(f"{url}/file", timeout=60).content)
    assert httpx.delete(url, timeout=30).json()["state"] == "none"

    trace = RoutingTrace.open(tmp_path / "trace")
    assert trace.metadata.model == "tiny"
    assert trace.num_sequences == 1
    assert trace.token_ids_T is not None
    for row, layers in enumerate(reference_routing(reference[0], trace.token_ids_T.tolist())):
        for layer, (experts, _, hidden) in enumerate(layers):
            assert set(trace.experts_TLk[row, layer].tolist()) == set(experts.tolist())
            if layer == 1:
                assert np.allclose(trace.hidden[1][row], hidden, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("own_id", [None, "mine-42"])
@pytest.mark.parametrize("stream", [False, True])
def test_one_request_id_reaches_the_client(two_workers: Served, own_id: str | None, stream: bool) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2, "stream": stream}
    headers = {} if own_id is None else {"x-request-id": own_id}
    responses = [
        httpx.post(f"{two_workers.url}/v1/completions", json=body, headers=headers, timeout=30),
        httpx.get(f"{two_workers.url}/nowhere", headers=headers, timeout=30),
    ]
    for response in responses:
        ids = response.headers.get_list("x-request-id")
        assert len(ids) == 1
        assert ids[0]
        assert own_id is None or ids == [own_id]


def exchange(served: Served, request: bytes, *, timeout_s: float = 15) -> bytes:
    """The answer to raw bytes, at least to the beginning of its body."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
        connection.sendall(request)
        answer = b""
        while not answer.partition(b"\r\n\r\n")[2]:
            part = connection.recv(65536)
            assert part, f"the connection was closed after {answer!r}"
            answer += part
        return answer


@pytest.mark.parametrize("connections", [("Upgrade", "keep-alive"), ("keep-alive", "Upgrade"), ("Upgrade",)])
def test_a_body_with_an_upgrade_to_websocket_is_answered(two_workers: Served, connections: tuple[str, ...]) -> None:
    head = "".join(f"Connection: {value}\r\n" for value in connections)
    answer = exchange(
        two_workers,
        (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}Upgrade: websocket\r\n"
            "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
        ).encode(),
    )
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"unsupported_upgrade" in answer


@pytest.mark.parametrize(("num_chars", "status"), [(9_000, b"414"), (60_000, b"414"), (70_000, b"400")])
def test_a_long_url_is_answered(two_workers: Served, num_chars: int, status: bytes) -> None:
    answer = exchange(two_workers, b"GET /" + b"a" * num_chars + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 " + status)


def test_clients_that_leave_while_they_send_their_body_write_little_to_the_terminal(two_workers: Served) -> None:
    num_lines = len(two_workers.log.read_bytes().splitlines())
    host, port = two_workers.url.removeprefix("http://").split(":")
    num_clients = 5
    for _ in range(num_clients):
        with socket.create_connection((host, int(port)), timeout=15) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b'Content-Length: 1000\r\n\r\n{"model":'
            )
    # Behind them an exchange that fails in a way that the log shows would come after what they caused.
    for _ in range(num_clients):
        assert httpx.get(f"{two_workers.url}/v1/models", timeout=30).status_code == 200
    assert len(two_workers.log.read_bytes().splitlines()) - num_lines <= num_clients


def test_a_client_that_leaves_frees_its_sequence(two_workers: Served) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 450, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{two_workers.url}/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        while not next(lines).startswith("data:"):
            pass
        assert _gauge(two_workers, "moeless_num_requests_running") == 1
    wait_until(
        lambda: _gauge(two_workers, "moeless_num_requests_running") == 0, timeout_s=10, what="the sequence is cancelled"
    )
    assert _gauge(two_workers, "moeless_kv_cache_usage_perc") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_all_leave_at_once_leave_nothing_running(two_workers: Served, stream: bool) -> None:
    num_clients = 200
    hung_up_s = asyncio.run(_hang_up_together(two_workers, num_clients, stream=stream))
    wait_until(lambda: _num_held(two_workers) == 0, timeout_s=20, what="nothing is generated for nobody")
    assert time.monotonic() - hung_up_s < 5  # 1 s on a machine of its own


async def _hang_up_together(served: Served, num_clients: int, *, stream: bool) -> float:
    """Have `num_clients` ask for long completions, wait until all are held, hang up. Returns when they did."""
    url = httpx.URL(served.url)
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 450, "stream": stream, "ignore_eos": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    connections = await asyncio.gather(*(asyncio.open_connection(url.host, url.port) for _ in range(num_clients)))
    for _, writer in connections:
        writer.write(request)
    async with asyncio.timeout(60):
        while await asyncio.to_thread(_num_held, served) < 0.9 * num_clients:
            await asyncio.sleep(0.05)
    for _, writer in connections:
        writer.transport.abort()
    return time.monotonic()


def test_nothing_listens_beyond_loopback(two_workers: Served) -> None:
    two_workers.complete("tiny", PROMPT, max_tokens=4)  # every channel is open
    run = psutil.Process(two_workers.process.pid)
    listening: dict[str, set[str]] = {}
    for process in [run, *run.children(recursive=True)]:
        try:
            name = process.cmdline()[0].rpartition("/")[2]
            sockets = process.net_connections(kind="inet")
        except (psutil.NoSuchProcess, IndexError):
            continue
        for each in sockets:
            if each.status == psutil.CONN_LISTEN or (each.type == socket.SOCK_DGRAM and not each.raddr):
                listening.setdefault(name, set()).add(each.laddr.ip)
    beyond = {name: found - {"127.0.0.1", "::1", "::ffff:127.0.0.1"} for name, found in listening.items()}
    assert {name: found for name, found in beyond.items() if found} == {}
    for part in ("gcs_server", "raylet", "ray::ProxyActor", "ray::ServeReplica:moeless:gateway"):
        assert part in listening, f"{part} was not looked at: {sorted(listening)}"


def _num_held(served: Served) -> float:
    return _gauge(served, "moeless_num_requests_running") + _gauge(served, "moeless_num_requests_waiting")


def _gauge(served: Served, name: str) -> float:
    lines = httpx.get(f"{served.url}/metrics", timeout=30).text.splitlines()
    found = [line for line in lines if line.startswith(name + "{")]
    if len(found) != 1:
        raise LookupError(f"one line of {name} expected, got {found}")
    return float(found[0].split()[-1])


def test_a_killed_worker_under_load_fails_no_request_and_comes_back(
    two_workers: Served, reference: tuple[MixtralForCausalLM, AutoTokenizer]
) -> None:
    expected = two_workers.complete("tiny", PROMPT, max_tokens=32)
    answers: list[str] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            answers.append(two_workers.complete("tiny", PROMPT, max_tokens=32))

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        wait_until(lambda: len(answers) >= 2, timeout_s=30, what="load runs")
        (victim,) = two_workers.replicas("worker-0")
        victim.kill()
        before = len(answers)
        wait_until(lambda: len(answers) > before + 3, timeout_s=60, what="requests are answered after the kill")

        def worker_is_back() -> bool:
            replicas = two_workers.replicas("worker-0")
            return bool(replicas) and replicas[0].pid != victim.pid and _worker_alive(two_workers, "worker-0")

        wait_until(worker_is_back, timeout_s=60, what="worker-0 is back and connected")
    finally:
        stop.set()
        asking.join()
    assert set(answers) == {expected}
    assert_is_greedy(reference, two_workers)


def test_a_killed_engine_ends_its_streams_with_an_error_and_is_replaced(two_workers: Served) -> None:
    client = openai.OpenAI(base_url=f"{two_workers.url}/v1", api_key="unused", max_retries=0, timeout=60)
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    iterator = iter(stream)
    next(iterator)
    (engine,) = two_workers.replicas("engine")
    engine.kill()
    with pytest.raises(openai.APIError, match="engine"):
        for _ in iterator:
            pass
    wait_until(
        lambda: httpx.get(f"{two_workers.url}/ready").status_code == 200, timeout_s=120, what="the engine is back"
    )
    assert two_workers.complete("tiny", PROMPT, max_tokens=4)


def _worker_alive(served: Served, worker: str) -> bool:
    response = httpx.get(f"{served.url}/v1/experts", timeout=30).json()
    return any(row["name"] == worker and row["alive"] for row in response["workers"])


def test_an_interrupt_while_starting_ends_at_once_and_leaves_nothing(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "moeless.cli", "serve", str(checkpoint), "--port", str(free_port())]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    started: list[psutil.Process] = []

    def has_begun() -> bool:
        started[:] = psutil.Process(process.pid).children(recursive=True)
        return any("raylet" in child.name() for child in started)

    wait_until(has_begun, timeout_s=60, what="Ray is starting")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive


@pytest.fixture(scope="module")
def isolated(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("logs") / "isolated.log"
    options = ("--isolation", "function", "--function-idle", "20", "--served-model-name", "tiny")
    with serving(checkpoint, *options, log=log) as served:
        yield served


def _replicas(served: Served) -> int:
    return sum(int(str(row["replicas"])) for row in served.experts().values())


def _completes_on_functions_alone(served: Served) -> bool:
    """Return whether a completion needed none of the engine's own copies. Its counts may be late while much starts."""
    try:
        before = _gauge(served, "moeless_dispatch_fallbacks_total")
        served.complete("tiny", PROMPT, max_tokens=8)
        return _gauge(served, "moeless_dispatch_fallbacks_total") == before
    except LookupError:
        return False


@pytest.mark.timeout(500)
def test_isolated_functions_scale_from_zero_and_back_and_survive_a_kill(
    isolated: Served, reference: tuple[MixtralForCausalLM, AutoTokenizer]
) -> None:
    wait_until(lambda: _replicas(isolated) == 0, timeout_s=60, what="every function begins at zero replicas")
    assert_is_greedy(reference, isolated)  # by the engine's own copies, while the functions start
    wait_until(lambda: _completes_on_functions_alone(isolated), timeout_s=180, what="the functions have started")

    expected = isolated.complete("tiny", PROMPT, max_tokens=8)
    served_most = max(isolated.experts().values(), key=lambda row: int(str(row["tokens_served"])))
    answers: list[str] = []
    asking = threading.Thread(
        target=lambda: answers.extend(isolated.complete("tiny", PROMPT, max_tokens=8) for _ in range(6))
    )
    asking.start()
    victims = isolated.replicas(str(served_most["name"]))
    assert victims
    for victim in victims:
        victim.kill()
    asking.join()
    assert answers == [expected] * 6
    wait_until(lambda: _completes_on_functions_alone(isolated), timeout_s=180, what="the killed function is back")

    wait_until(lambda: _replicas(isolated) == 0, timeout_s=120, what="every function is back at zero replicas")
    assert_is_greedy(reference, isolated, num_tokens=4)
