"""`moeless trace record`: the routing of what a server computes, or of prompts in a file. docs/serving.md."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from moeless.cli._console import say, stderr
from moeless.cli._extras import require_extra
from moeless.cli._options import from_to, input_file, not_empty, output_file
from moeless.cli._server import DEFAULT_URL, open_server, refusal, server_errors
from moeless.core.errors import ConfigError, MoelessError

_ENDPOINT = "/v1/traces/recording"
_CALL_TIMEOUT_S = 30.0
_FILE_TIMEOUT_S = 180.0
"""Until the server has made the file and sends its first bytes."""
_ASK_EVERY_S = 1.0


class Only(StrEnum):
    """One part of recording from a server, for a script that does the others later."""

    START = "start"
    STOP = "stop"
    DUMP = "dump"


def record_command(
    out: Annotated[
        Path | None, typer.Argument(callback=output_file, help="Trace to write; not needed with --only start or stop.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            callback=input_file, help="Generate from these: a text file with a prompt a line, or .jsonl with 'prompt'."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(callback=not_empty, help="With --prompts: the model, named as for serve.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(callback=from_to(1), help="With --prompts: tokens to generate after each.")
    ] = 64,
    batch: Annotated[
        int, typer.Option(callback=from_to(1), help="With --prompts: sequences that decode together.")
    ] = 16,
    temperature: Annotated[
        float, typer.Option(callback=from_to(0, 2), help="With --prompts: of sampling; 0 is greedy.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="With --prompts: prompt i is sampled with seed + i.")] = 0,
    chat: Annotated[
        bool, typer.Option(help="With --prompts: put each as a user's message in the chat template.")
    ] = False,
    url: Annotated[
        str | None, typer.Option(help=f"Address of the server, with or without /v1; default: {DEFAULT_URL}.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MOELESS_API_KEY", help="Key, if the server requires one.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="How long to record; default: until Ctrl-C.")] = None,
    only: Annotated[Only | None, typer.Option(help="Only start recording, stop it, or dump what it has.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(callback=from_to(1), help="Most tokens to record; default: the server's, or all of the prompts'."),
    ] = None,
    hidden_layers: Annotated[
        str, typer.Option(help="MoE layers whose experts' input is recorded too, as in 0,3.")
    ] = "",
    token_ids: Annotated[
        bool | None, typer.Option(help="Record what the tokens are; default: of prompts yes, of a server no.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Write over OUT if it exists.")] = False,
) -> None:
    """Record a routing trace: of a server's requests while you wait, or of prompts that are run here."""
    layers = _layers(hidden_layers)
    if only in (Only.START, Only.STOP):
        if out is not None:
            raise ConfigError(f"OUT must not be given with --only {only.value}, got {out}")
    elif out is None:
        raise ConfigError("OUT must be given: the file to write the trace to")
    elif out.exists() and not overwrite:
        raise ConfigError(f"OUT must not exist unless --overwrite is given, got {out}")
    if prompts is not None:
        for name, value in (("url", url), ("seconds", seconds), ("only", only)):
            if value is not None:
                raise ConfigError(f"--{name} must not be given with --prompts, which are run here, got {value}")
        assert out is not None
        run = {
            "max_new_tokens": max_new_tokens,
            "batch": batch,
            "temperature": temperature,
            "seed": seed,
            "chat": chat,
        }
        options = {"max_tokens": max_tokens, "hidden_layers": layers, "token_ids": token_ids is not False}
        _record_prompts(out, prompts, model, run, options)
        return
    if model is not None:
        raise ConfigError(f"--model must be given with --prompts only, got {model}")
    if seconds is not None and only is not None:
        raise ConfigError(f"--seconds must not be given with --only {only.value}, got {seconds:g}")
    if seconds is not None and not seconds > 0:
        raise ConfigError(f"--seconds must be above 0, got {seconds:g}")
    body: dict[str, Any] = {"hidden_layers": list(layers), "token_ids": bool(token_ids)}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    with open_server(url or DEFAULT_URL, api_key, timeout_s=_CALL_TIMEOUT_S) as client:
        _record_server(client, out, body, only=only, seconds=seconds)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: the `prompt` of each line's object if it is called .jsonl, else each line; none empty.

    Raises: ConfigError that names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts must be a file of UTF-8 text, got {path}: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    prompts = [line for _, line in numbered] if path.suffix != ".jsonl" else [_prompt(path, *n) for n in numbered]
    if not prompts:
        raise ConfigError(f"prompts must be at least one, got none in {path}")
    return prompts


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {number}: must be JSON: {error.msg} at column {error.colno}") from error
    prompt = found.get("prompt") if isinstance(found, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(f"{path}, line {number}: must be an object with a text under 'prompt', got {line[:60]}")
    return prompt


def _layers(text: str) -> tuple[int, ...]:
    try:
        layers = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise ConfigError(f"--hidden-layers must be numbers with commas between, got {text!r}") from error
    if any(layer < 0 for layer in layers):
        raise ConfigError(f"--hidden-layers must be at least 0, got {text!r}")
    return layers


# -- prompts run here --------------------------------------------------------------------------------------------------


def _record_prompts(out: Path, path: Path, model: str | None, run: dict[str, Any], options: dict[str, Any]) -> None:
    if model is None:
        raise ConfigError("--model must be given with --prompts")
    require_extra("serve", "moeless trace record --prompts")
    texts = read_prompts(path)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from moeless.engine.offline_recording import PromptRun, record_prompts
    from moeless.packages.source import resolve_model

    asked = PromptRun(**run)
    with stderr.status("starting the model") as status:
        packed = resolve_model(model)
        trace = record_prompts(
            packed,
            texts,
            asked,
            source=f"prompts of {path.name}",
            on_progress=lambda done, of: status.update(f"{done} of {of} prompts"),
            **options,
        )
        with _writing(out):
            trace.save(out)
    say(f"{out}: {trace.num_tokens:,} tokens in {trace.num_sequences:,} sequences")


# -- a server's requests -----------------------------------------------------------------------------------------------


def _record_server(
    server: httpx.Client, out: Path | None, body: dict[str, Any], *, only: Only | None, seconds: float | None
) -> None:
    if only is None or only is Only.START:
        _ask(server, "POST", "", json=body)
    if only is None:
        _wait(server, seconds)
    if only is None or only is Only.STOP:
        status = _ask(server, "POST", "/stop")
        say(f"recorded {status['num_tokens']:,} tokens in {status['num_steps']:,} steps")
    if only is None or only is Only.DUMP:
        assert out is not None
        num_bytes = _download(server, out)
        say(f"{out}: {num_bytes:,} bytes")
    if only is None:
        _ask(server, "DELETE", "")
    if only is Only.START:
        say(f"recording on {server.base_url}; stop it with: moeless trace record --only stop")


def _wait(server: httpx.Client, seconds: float | None) -> None:
    """Until the time is over, the recording is full, or Ctrl-C."""
    ends_s = None if seconds is None else time.monotonic() + seconds
    until = "until Ctrl-C" if seconds is None else f"for {seconds:g} s"
    with stderr.status(f"recording {until}") as shown:
        try:
            while True:
                left_s = _ASK_EVERY_S if ends_s is None else min(_ASK_EVERY_S, ends_s - time.monotonic())
                if left_s <= 0:
                    return
                time.sleep(left_s)
                status = _ask(server, "GET", "")
                shown.update(f"recording {until}: {status['num_tokens']:,} of {status['max_tokens']:,} tokens")
                if status["state"] != "recording":
                    return
        except KeyboardInterrupt:
            return


def _download(server: httpx.Client, out: Path) -> int:
    """Write the server's trace to `out`, all or nothing, and check it. Returns its bytes."""
    from moeless_predictors.traces import RoutingTrace, TraceFormatError

    draft = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        with server_errors(server), server.stream("GET", f"{_ENDPOINT}/file", timeout=_FILE_TIMEOUT_S) as response:
            if response.status_code != 200:
                response.read()
                raise refusal(response)
            with _writing(out), draft.open("wb") as file:
                for chunk in response.iter_bytes():
                    file.write(chunk)
        try:
            RoutingTrace.open(draft)
        except TraceFormatError as error:
            raise MoelessError(f"what {server.base_url} sent is no trace: {error}") from error
        num_bytes = draft.stat().st_size
        draft.replace(out)
        return num_bytes
    finally:
        draft.unlink(missing_ok=True)


def _ask(server: httpx.Client, method: str, path: str, **options: Any) -> dict[str, Any]:
    with server_errors(server):
        response = server.request(method, f"{_ENDPOINT}{path}", **options)
    if response.status_code != 200:
        raise refusal(response)
    status: dict[str, Any] = response.json()
    return status


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"OUT must be a file that can be written, got {out}: {error.strerror}") from error
