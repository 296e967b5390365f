"""Tokens per second over HTTP against transformers' own batching in process.

`python -m benchmarks http_throughput` serves a model with its experts in the engine's process, streams 16 completions
at once over HTTP, and compares with transformers' continuous batching called in process (the best of one and two
threads and of its two kinds of attention) and with static `generate`, on the same prompts and lengths, in turns. Each
way has a process of its own, idle while another runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing as mp
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moeless.deployments.runtime import free_port

PROMPT = "The old man looked at the sea and said that the storm would come before the night was over. "

WAYS = {
    "continuous batching, 1 thread": ("manager", 1, "sdpa"),
    "continuous batching, 2 threads": ("manager", 2, "sdpa"),
    "continuous batching, 1 thread, paged|eager": ("manager", 1, "paged|eager"),
    "continuous batching, 2 threads, paged|eager": ("manager", 2, "paged|eager"),
    "generate, 1 thread": ("generate", 1, ""),
    "generate, 2 threads": ("generate", 2, ""),
}
"""Name → (kind, threads, attention implementation)."""


def main(argv: list[str] | None = None) -> None:
    """Print the table; with --json, write the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="moeless-mini", help="checkpoint folder or moeless-mini")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="new tokens of each stream")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few repeats")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.repeats = 3
    result = measure(arguments.model, arguments.streams, arguments.tokens, arguments.repeats, arguments.workers)
    _print(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


def measure(model: str, streams: int, tokens: int, repeats: int, workers: int) -> dict[str, Any]:
    """Tokens per second of each way, `repeats` times in turns."""
    checkpoint = _checkpoint(model)
    context = mp.get_context("spawn")
    lines: dict[str, Connection] = {}
    for way in WAYS:
        lines[way], theirs = context.Pipe()
        context.Process(target=_in_process, args=(theirs, way, str(checkpoint), streams, tokens), daemon=True).start()
    rates: dict[str, list[float]] = {way: [] for way in [*WAYS, "http"]}
    port = free_port()
    command = [sys.executable, "-m", "moeless.cli", "serve", model, "--port", str(port), "--workers", str(workers)]
    server = subprocess.Popen([*command, "--served-model-name", "bench"], stdout=subprocess.DEVNULL)
    try:
        started_s = time.perf_counter()
        _wait_ready(port, server)
        ready_s = time.perf_counter() - started_s
        for repeat in range(repeats + 1):
            for way, line in [*lines.items(), ("http", None)]:
                if line is None:
                    rate = asyncio.run(_stream_all(port, streams, tokens))
                else:
                    line.send(None)
                    rate = line.recv()
                if repeat:  # the first one warms up
                    rates[way].append(rate)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)
        for child in mp.active_children():
            child.kill()
    return {"streams": streams, "tokens": tokens, "ready_s": ready_s, "tokens_per_s": rates}


def _print(result: dict[str, Any]) -> None:
    rates: dict[str, list[float]] = result["tokens_per_s"]
    best = max((way for way in rates if way.startswith("continuous")), key=lambda way: statistics.median(rates[way]))
    base = statistics.median(rates[best])
    table = Table("way", "tok/s (median)", "spread", f"ratio to {best}", title=f"{result['streams']} streams")
    for way, values in rates.items():
        median = statistics.median(values)
        table.add_row(way, f"{median:.0f}", f"{min(values):.0f}-{max(values):.0f}", f"{median / base:.2f}")
    Console().print(table)
    Console().print(f"ready after {result['ready_s']:.1f} s")


def _in_process(pipe: Connection, way: str, checkpoint: str, streams: int, tokens: int) -> None:
    """Child: runs one of transformers' own ways on request and answers with tokens per second."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

    kind, num_threads, attention = WAYS[way]
    torch.set_num_threads(num_threads)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="grouped_mm").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    prompt: list[int] = tokenizer(PROMPT)["input_ids"]
    if kind == "generate":
        inputs = torch.tensor([prompt] * streams)
        arguments = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        while True:
            pipe.recv()
            started_s = time.perf_counter()
            with torch.inference_mode():
                model.generate(inputs, attention_mask=torch.ones_like(inputs), **arguments)
            pipe.send(streams * tokens / (time.perf_counter() - started_s))
    model.set_attn_implementation(attention)
    batching = ContinuousBatchingConfig(
        page_size=32,
        num_blocks=512,
        max_batch_tokens=512,
        max_requests_per_batch=64,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,
    )
    generation = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=-1)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=batching
    ) as manager:
        while True:
            pipe.recv()
            started_s = time.perf_counter()
            manager.add_requests([prompt] * streams, max_new_tokens=tokens)
            left = streams
            while left:
                left -= manager.get_result(timeout=600).is_finished()
            pipe.send(streams * tokens / (time.perf_counter() - started_s))


async def _stream_all(port: int, streams: int, tokens: int) -> float:
    """All streams at once; tokens per second from the first request sent to the last token received."""
    started_s = time.perf_counter()
    counts = await asyncio.gather(*(_stream(port, tokens) for _ in range(streams)))
    if counts != [tokens] * streams:
        raise RuntimeError(f"streams must bring {tokens} tokens each, got {counts}")
    return sum(counts) / (time.perf_counter() - started_s)


async def _stream(port: int, tokens: int) -> int:
    """One streamed completion over a plain socket: a client that costs the server's cores next to nothing."""
    body = json.dumps(
        {
            "model": "bench",
            "prompt": PROMPT,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    await writer.drain()
    answer = bytearray()
    while chunk := await reader.read(65536):
        answer += chunk
    writer.close()
    marker = b'"completion_tokens":'
    if not answer.startswith(b"HTTP/1.1 200") or marker not in answer:
        raise RuntimeError(f"unexpected answer: {bytes(answer[:500])!r}")
    return int(answer.rsplit(marker, 1)[1].split(b",")[0].split(b"}")[0])


def _checkpoint(model: str) -> Path:
    if model == "moeless-mini":
        from moeless.bundled import bundled_model_path

        return bundled_model_path()
    return Path(model)


def _wait_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    while True:
        if server.poll() is not None:
            raise RuntimeError(f"moeless serve ended with {server.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
