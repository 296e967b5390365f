"""`make demo`: serve the bundled model on Ray with two workers, ask it a few things over HTTP, show where they ran.

Starts `moeless serve` as a user would, streams the answers with the openai client, prints the table of expert
functions and how each prompt's tokens spread over the workers, and stops everything it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
from rich.console import Console

from moeless.cli.experts import experts_table
from moeless.deployments.runtime import free_port

MODEL = "moeless-mini"
CHATS = (
    "What is 5 + 8?",
    "Continue the scene: ROMEO:",
)
COMPLETIONS = (
    ("Python", "def __init__(self, name"),
    ("Italian", "«Signor curato», disse"),
    ("drama", "KING HENRY:\n"),
)
_READY_TIMEOUT_S = 300.0
_console = Console(highlight=False)


def main() -> int:
    """Run the demo; returns the exit code."""
    started_s = time.monotonic()
    _console.print(f"serving {MODEL} on Ray with two workers ...")
    with _server() as url:
        _console.print(f"ready after {time.monotonic() - started_s:.0f} s on {url}\n")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none-needed")
        for question in CHATS:
            _console.print(f"[bold]chat[/bold]  {question}", markup=True)
            _stream_chat(client, question)
        for domain, prompt in COMPLETIONS:
            _console.print(f"[bold]completion[/bold]  ({domain})", markup=True)
            _stream_completion(client, prompt)
        answer = httpx.get(f"{url}/v1/experts", timeout=30, trust_env=False)
        answer.raise_for_status()
        functions = answer.json()["data"]
        _console.print(experts_table(functions))
        for worker in answer.json()["workers"]:
            _console.print(
                f"{worker['name']:10} {worker['instances']:4} instances  {worker['resident_bytes'] / 1e6:6.1f} MB  "
                f"{worker['tokens_served']:7} tokens  over {worker['transport']}"
            )
        if not functions or not any(row["tokens_served"] for row in functions):
            _console.print("no expert function has served a token: something is wrong")
            return 1
    _console.print(f"\nstopped; nothing is left running ({time.monotonic() - started_s:.0f} s in all)")
    return 0


def _stream_chat(client: openai.OpenAI, question: str) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        max_tokens=80,
        temperature=0.7,
        seed=1,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            _write(chunk.choices[0].delta.content)
    _write("\n\n")


def _stream_completion(client: openai.OpenAI, prompt: str) -> None:
    _write(prompt)
    stream = client.completions.create(model=MODEL, prompt=prompt, max_tokens=80, temperature=0.7, seed=1, stream=True)
    for chunk in stream:
        if chunk.choices:
            _write(chunk.choices[0].text)
    _write("\n\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def _server() -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "moeless.cli", "serve", MODEL, "--workers", "2", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "MOELESS_API_KEY"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise SystemExit(f"moeless serve ended with {process.returncode}")
        try:
            if httpx.get(f"{url}/ready", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # not listening yet
        time.sleep(0.2)
    raise SystemExit(f"not ready within {_READY_TIMEOUT_S:g} s")


if __name__ == "__main__":
    sys.exit(main())
