"""Latency of /health while clients send long prompts.

`python -m benchmarks gateway_health` starts the gateway of a model of 131,072 tokens in a process of its own, with an
engine that answers at once, and has 32 clients send chats of 2 MB in a loop: half of them too long for the context,
half just under it. The model's chat template takes most of a second of processor time. A prober asks for /health every
few milliseconds, first while nothing else happens, then while the clients send. Percentiles in milliseconds, and how
the chats ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing as mp
import os
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moeless.core.generation import EngineStats, FunctionStatus, GenerationDelta, GenerationRequest, ModelInfo

CONTEXT_TOKENS = 131_072
BODY_BYTES = 2 * 1024 * 1024 - 4096
_WORDS = ("responsibilities", "internationally", "characteristics", "acknowledgement", "misunderstanding")
_SHORT = "The old man looked at the sea and said that the storm would come before the night was over. "


def main(argv: list[str] | None = None) -> None:
    """Print the table; with --json, write the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0, help="of load; as long again idle, at most ten")
    parser.add_argument("--template-seconds", type=float, default=0.7, help="what the template takes, of a core")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a few seconds of load")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.seconds = 15.0
    result = measure(arguments.clients, arguments.seconds, arguments.template_seconds)
    _print(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


def measure(clients: int, seconds: float, template_s: float) -> dict[str, Any]:
    """Latencies of /health in milliseconds, idle and loaded, and the statuses of the chats."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        _write_model(Path(folder), template_s)
        sock = socket.create_server(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        server = context.Process(target=_serve, args=(sock, folder))
        server.start()
        sock.close()
        try:
            asyncio.run(_until_ready(port))
            assert server.pid is not None
            memory_mb = [_resident_mb(server.pid)]
            idle = asyncio.run(_probe(port, min(seconds, 10.0)))
            results, theirs = context.Pipe(duplex=False)
            load = context.Process(target=_load, args=(theirs, port, clients, seconds), daemon=True)
            load.start()
            results.recv()  # the bodies are made
            loaded = asyncio.run(_probe(port, seconds))
            memory_mb.append(_resident_mb(server.pid))
            outcomes: dict[str, int] = results.recv()
            load.join()
            asyncio.run(_probe(port, 2.0))
            memory_mb.append(_resident_mb(server.pid))
        finally:
            server.terminate()
            server.join()
    return {"idle_ms": idle, "loaded_ms": loaded, "outcomes": outcomes, "gateway_memory_mb": memory_mb}


def _print(result: dict[str, Any]) -> None:
    table = Table("", "p50", "p99", "maximum", "probes", title="/health, ms")
    for name in ("idle", "loaded"):
        values = sorted(result[f"{name}_ms"])
        p99 = values[min(len(values) - 1, int(0.99 * len(values)))]
        table.add_row(name, f"{statistics.median(values):.1f}", f"{p99:.1f}", f"{values[-1]:.1f}", str(len(values)))
    Console().print(table)
    Console().print("chats: " + ", ".join(f"{number} × {outcome}" for outcome, number in result["outcomes"].items()))
    before, during, after = result["gateway_memory_mb"]
    Console().print(f"gateway's memory: {before:.0f} MB before, {during:.0f} at the end, {after:.0f} two seconds later")


async def _probe(port: int, seconds: float) -> list[float]:
    """Milliseconds that each of many GET /health took, one after another on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    latencies_ms = []
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        started_s = time.perf_counter()
        writer.write(b"GET /health HTTP/1.1\r\nHost: bench\r\n\r\n")
        answer = await reader.readuntil(b"}")
        latencies_ms.append((time.perf_counter() - started_s) * 1e3)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"unexpected answer: {answer!r}")
        await asyncio.sleep(0.005)
    writer.close()
    return latencies_ms


def _load(pipe: Connection, port: int, clients: int, seconds: float) -> None:
    """Child: all clients."""
    fitting = _chat(_fitting_text())
    too_long = _chat((_SHORT * (BODY_BYTES // len(_SHORT)))[:BODY_BYTES])
    pipe.send(None)
    outcomes: Counter[str] = Counter()

    async def send_all() -> None:
        end_s = time.monotonic() + seconds
        await asyncio.gather(
            *(_client(port, (fitting, too_long)[i % 2], end_s, outcomes) for i in range(clients)),
        )

    asyncio.run(send_all())
    pipe.send(dict(outcomes))


async def _client(port: int, body: bytes, end_s: float, outcomes: Counter[str]) -> None:
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    while (left_s := end_s - time.monotonic()) > 0:
        outcome = "unanswered at the end"
        try:
            async with asyncio.timeout(left_s):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                answer = await reader.read()
                writer.close()
                status = answer.split(b" ", 2)[1].decode()
                code = json.loads(answer.partition(b"\r\n\r\n")[2]).get("error", {}).get("code", "")
                outcome = f"{status} {code}".strip()
        except TimeoutError:
            pass
        outcomes[outcome] += 1


async def _until_ready(port: int) -> None:
    async with asyncio.timeout(60):
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /ready HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
            answer = await reader.read()
            writer.close()
            if answer.startswith(b"HTTP/1.1 200"):
                return
            await asyncio.sleep(0.1)


def _chat(text: str) -> bytes:
    return json.dumps({"model": "bench", "max_tokens": 1, "messages": [{"role": "user", "content": text}]}).encode()


def _fitting_text() -> str:
    """A body's worth of long words, each a token, with room in the context for the template's own."""
    words = [_WORDS[i % len(_WORDS)] for i in range(CONTEXT_TOKENS - 64)]
    return " ".join(words)[:BODY_BYTES].rpartition(" ")[0]


def _write_model(folder: Path, template_s: float) -> None:
    """A byte-level tokenizer that knows the long words, and a template that counts for `template_s`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    from moeless.text.chat_template import ChatTemplate

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken("<end>", special=True, normalized=False)],
        show_progress=False,
    )
    tokenizer.train_from_iterator([" " + " ".join(_WORDS) + " " + _SHORT] * 5, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}<end>{% endfor %}"
        "{% for i in range(100) %}{% for j in range(COUNT) %}{% set x = i * j %}{% endfor %}{% endfor %}"
    )
    count = 100
    started_s = time.process_time()
    ChatTemplate(template.replace("COUNT", str(count)), {}).render([])
    count = int(count * template_s / (time.process_time() - started_s))
    (folder / "chat_template.jinja").write_text(template.replace("COUNT", str(count)))


def _serve(sock: socket.socket, folder: str) -> None:
    """Child: the gateway alone."""
    import uvicorn

    from moeless.gateway import GatewayConfig, create_app

    info = ModelInfo(
        model_id="bench",
        created_unix_s=0,
        max_context_tokens=CONTEXT_TOKENS,
        vocab_size=2000,
        tokenizer_path=folder,
        num_layers=1,
        num_experts=1,
        top_k=1,
        hidden_size=1,
        dtype="float32",
        device="cpu",
    )
    app = create_app(_Engine(info), GatewayConfig())
    uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", lifespan="on")).run(sockets=[sock])


class _Engine:
    """Answers every request with one token, at once."""

    recordings: Any = None

    def __init__(self, info: ModelInfo) -> None:
        self._info = info

    async def model_info(self) -> ModelInfo:
        return self._info

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        yield GenerationDelta(request_id=request.request_id, text="x", num_tokens=1, finish_reason="length")

    async def cancel(self, request_id: str) -> None:
        """Nothing runs on."""

    async def stats(self) -> EngineStats:
        raise NotImplementedError

    async def functions(self) -> list[FunctionStatus]:
        return []

    async def is_ready(self) -> bool:
        return True

    async def close(self) -> None:
        """Nothing is open."""


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
