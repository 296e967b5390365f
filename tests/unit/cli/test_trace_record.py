"""`moeless trace record` as a user meets it: from prompts, and from a real server on the loopback."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from typer.testing import CliRunner, Result

from moeless.cli import trace_record
from moeless.cli.app import trace_app
from moeless.core.errors import ConfigError, MoelessError
from moeless.core.generation import ModelInfo
from moeless.engine.assemble import engine_in_process
from moeless.engine.config import EngineConfig
from moeless.engine.local_client import LocalEngineClient
from moeless.gateway.app import create_app
from moeless.gateway.config import GatewayConfig
from moeless.packages.pack import pack_checkpoint
from moeless.packages.packed_model import PackedModel
from moeless_predictors.traces import DECODE, PREFILL, RoutingTrace
from tests.families import make_checkpoint, make_tokenizer
from tests.support.waiting import wait_until
from tests.unit.engine.routed import reference_routing

TEXTS = ["The gate of a layer", "When the words change", "whoever has planned for yesterday has planned"]
KEY = "secret"


def moeless_trace(*arguments: object) -> Result:
    return CliRunner().invoke(trace_app, [str(argument) for argument in arguments])


def assert_refused(result: Result, *words: str, error: type[MoelessError] = ConfigError) -> None:
    assert isinstance(result.exception, error), result.output
    for word in words:
        assert word in str(result.exception)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("record") / "tiny")


@pytest.fixture(scope="module")
def packed(checkpoint: Path) -> Path:
    out = checkpoint.parent / "packed"
    pack_checkpoint(checkpoint, out)
    return out


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(TEXTS) + "\n")
    return path


# -- prompts run here --------------------------------------------------------------------------------------------------


def test_the_trace_of_prompts_is_the_models_routing_of_them(
    checkpoint: Path, packed: Path, prompts: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out.trace"
    result = moeless_trace(
        "record", out, "--prompts", prompts, "--model", packed,
        "--max-new-tokens", 9, "--batch", 2, "--hidden-layers", "1", "--temperature", 0,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    trace = RoutingTrace.open(out)
    assert f"{trace.num_tokens} tokens in 3 sequences" in result.output
    assert trace.metadata.source == "prompts of prompts.txt"
    assert trace.hidden_layers == (1,)
    assert trace.token_ids_T is not None
    model = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager")
    tokenizer = make_tokenizer()
    starts = trace.sequence_starts_S1
    for text, start, stop in zip(TEXTS, starts[:-1], starts[1:], strict=True):
        ids, prompt = trace.token_ids_T[start:stop].tolist(), tokenizer(text)["input_ids"]
        assert ids[: len(prompt)] == prompt
        assert trace.phase_T[start:stop].tolist() == [PREFILL] * len(prompt) + [DECODE] * (len(ids) - len(prompt))
        for row, layers in zip(range(start, stop), reference_routing(model, ids), strict=True):
            for layer, (experts, _, hidden) in enumerate(layers):
                assert set(trace.experts_TLk[row, layer].tolist()) == set(experts.tolist())
                if layer == 1:
                    assert np.allclose(trace.hidden[1][row], hidden, rtol=2e-3, atol=5e-3)


def test_equal_seeds_give_equal_traces_whatever_the_batch(packed: Path, prompts: Path, tmp_path: Path) -> None:
    traces = []
    for batch in (1, 3):
        out = tmp_path / f"{batch}.trace"
        asked = ["record", out, "--prompts", prompts, "--model", packed, "--max-new-tokens", 6, "--batch", batch]
        result = moeless_trace(*asked, "--seed", 7)
        assert result.exit_code == 0, result.output
        traces.append(RoutingTrace.open(out))
    first, second = traces
    assert first.token_ids_T is not None
    assert second.token_ids_T is not None
    assert first.token_ids_T.tolist() == second.token_ids_T.tolist()


def test_prompts_may_be_put_as_chats_and_their_tokens_left_out(packed: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.trace"
    path.write_text("".join(json.dumps({"prompt": text, "id": 1}) + "\n" for text in TEXTS))
    result = moeless_trace(
        "record", out, "--prompts", path, "--model", packed, "--chat", "--no-token-ids", "--max-new-tokens", 1
    )
    assert result.exit_code == 0, result.output
    trace = RoutingTrace.open(out)
    assert trace.token_ids_T is None
    tokenizer = make_tokenizer()
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in TEXTS
    ]
    assert np.diff(trace.sequence_starts_S1).tolist() == [len(tokenizer(text)["input_ids"]) for text in rendered]


def test_no_more_than_max_tokens_are_recorded(packed: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.trace"
    asked = ["record", out, "--prompts", prompts, "--model", packed, "--max-new-tokens", 50, "--batch", 1]
    result = moeless_trace(*asked, "--max-tokens", 30)
    assert result.exit_code == 0, result.output
    assert 20 <= RoutingTrace.open(out).num_tokens <= 30


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("\n \n", "p.txt", ["at least one"]),
        ('{"prompt": "a"}\n{"prompt": 3}\n', "p.jsonl", ["line 2", "'prompt'"]),
        ('{"prompt": "a"}\n\nnope\n', "p.jsonl", ["line 3", "JSON"]),
        ("[1]\n", "p.jsonl", ["line 1", "object"]),
        (b"\xff\xfe", "p.txt", ["UTF-8"]),
        (None, "p.txt", ["p.txt"]),
    ],
)
def test_a_file_without_prompts_is_refused_by_line(
    content: str | bytes | None, name: str, words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert_refused(moeless_trace("record", tmp_path / "out", "--prompts", path, "--model", "m"), *words)


def test_what_does_not_fit_the_model_is_refused_by_name(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("short\n" + "long " * 3000)
    base = ["record", tmp_path / "out", "--prompts", path, "--model", packed]
    assert_refused(moeless_trace(*base), "prompt 2", "context")
    assert_refused(moeless_trace(*base, "--hidden-layers", "0,9"), "hidden_layers", "got 9", error=MoelessError)
    assert_refused(moeless_trace(*base, "--batch", 0), "batch must be at least 1, got 0")
    assert_refused(moeless_trace(*base, "--temperature", 3), "temperature", "got 3.0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["OUT must be given"]),
        (["{here}"], ["OUT must not exist unless --overwrite"]),
        (["out", "--prompts", "{here}", "--url", "http://x"], ["--url must not be given with --prompts"]),
        (["out", "--prompts", "{here}", "--seconds", "3"], ["--seconds"]),
        (["out", "--prompts", "{here}", "--only", "dump"], ["--only"]),
        (["out", "--model", "m"], ["--model must be given with --prompts only"]),
        (["out", "--seconds", "0"], ["--seconds must be above 0"]),
        (["out", "--only", "dump", "--seconds", "1"], ["--seconds must not be given with --only dump"]),
        (["out", "--only", "start"], ["OUT must not be given with --only start"]),
        (["out", "--hidden-layers", "0;1"], ["--hidden-layers must be numbers with commas", "0;1"]),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.touch()
    assert_refused(moeless_trace("record", *(a.format(here=here) for a in arguments)), *words)


# -- a server's requests -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    url: str

    def record(self, *arguments: object) -> Result:
        return moeless_trace("record", *arguments, "--url", self.url, "--api-key", KEY)

    def complete(self, prompt: str, max_tokens: int = 5) -> int:
        """Tokens of prompt and completion."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
        headers = {"Authorization": f"Bearer {KEY}"}
        response = httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=60)
        assert response.status_code == 200, response.text
        return int(response.json()["usage"]["total_tokens"])


@pytest.fixture(scope="module")
def server(packed: Path) -> Iterator[Server]:
    model = PackedModel.open(packed)
    manifest = model.manifest
    info = ModelInfo(
        model_id="tiny",
        created_unix_s=0,
        max_context_tokens=512,
        vocab_size=320,
        tokenizer_path=str(model.backbone_path),
        num_layers=manifest.num_moe_layers,
        num_experts=manifest.num_experts,
        top_k=manifest.top_k,
        hidden_size=manifest.layers[0].layout.hidden_size,
        dtype="float32",
        device="cpu",
    )
    config = EngineConfig(kv_cache_bytes=1 << 22, prefix_sharing=False, num_threads=1)
    with engine_in_process(model, make_tokenizer(), config) as engine:
        app = create_app(LocalEngineClient(engine, info), GatewayConfig(allow_recording=True, api_keys=(KEY,)))
        engine.start()
        served = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws="none"))
        thread = threading.Thread(target=served.run)
        thread.start()
        try:
            wait_until(lambda: served.started)
            url = f"http://127.0.0.1:{served.servers[0].sockets[0].getsockname()[1]}"
            wait_until(lambda: httpx.get(f"{url}/ready").status_code == 200)
            yield Server(url)
        finally:
            served.should_exit = True
            thread.join()


def test_start_stop_and_dump_may_be_three_calls(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out.trace"
    assert server.record("--only", "start", "--max-tokens", 500, "--hidden-layers", "0").exit_code == 0
    num_tokens = server.complete("The gate of a layer") + server.complete("When the words change")
    stopped = server.record("--only", "stop")
    assert f"recorded {num_tokens - 2} tokens" in stopped.output
    server.complete("is not recorded")
    assert server.record(out, "--only", "dump").exit_code == 0
    trace = RoutingTrace.open(out)
    assert (trace.num_tokens, trace.num_sequences) == (num_tokens - 2, 2)  # the last token of each is never computed
    assert trace.metadata.model == "tiny"
    assert trace.hidden_layers == (0,)
    assert trace.token_ids_T is None
    assert server.record(out, "--only", "dump", "--overwrite").exit_code == 0


@pytest.mark.parametrize("how", ["for a while", "until Ctrl-C", "until it is full"])
def test_recording_goes_on_while_it_waits(
    how: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, computed = tmp_path / "out.trace", []

    def wait(seconds: float) -> None:
        """In place of the wait between two looks at the server."""
        assert seconds <= 1.0
        computed.append(server.complete("The gate of a layer") - 1)
        if how == "until Ctrl-C" and len(computed) == 2:
            raise KeyboardInterrupt
        if how == "for a while":
            while time.monotonic() < ends_s:
                server.complete("and on")

    monkeypatch.setattr(trace_record.time, "sleep", wait)
    ends_s = time.monotonic() + 0.3
    options = {"for a while": ["--seconds", 0.3], "until Ctrl-C": [], "until it is full": ["--max-tokens", 14]}[how]
    result = server.record(out, "--token-ids", *options)
    assert result.exit_code == 0, result.output
    trace = RoutingTrace.open(out)
    assert trace.token_ids_T is not None
    if how == "until Ctrl-C":
        assert trace.num_tokens == sum(computed)
    assert_refused(server.record(out, "--only", "dump", "--overwrite"), "409", "no recording", error=MoelessError)


def test_what_the_server_refuses_is_told_with_its_words(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out.trace"
    for arguments, words in [
        (["--only", "stop"], ["409", "start one first"]),
        ([out, "--hidden-layers", "9"], ["400", "hidden_layers", "got 9"]),
        ([out, "--max-tokens", "1000000000000"], ["400", "max_tokens"]),
    ]:
        assert_refused(server.record(*arguments), *words, error=MoelessError)
    wrong = moeless_trace("record", out, "--url", server.url, "--api-key", "other")
    assert_refused(wrong, "401", "API key", error=MoelessError)
    assert not out.exists()


def test_no_server_is_told_in_one_line(tmp_path: Path) -> None:
    assert_refused(
        moeless_trace("record", tmp_path / "o", "--url", "http://127.0.0.1:9"), "127.0.0.1:9", error=MoelessError
    )
    assert_refused(moeless_trace("record", tmp_path / "o", "--url", "nowhere"), "nowhere", error=MoelessError)


@pytest.mark.parametrize("content", [b"", b"not a trace at all", b"cut"])
def test_an_answer_that_is_no_trace_leaves_no_file(
    content: bytes, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.record("--only", "start")
    server.complete("The gate of a layer")
    server.record("--only", "stop")
    iter_bytes = httpx.Response.iter_bytes

    def other(response: httpx.Response, *arguments: Any) -> Iterator[bytes]:
        whole = b"".join(iter_bytes(response, *arguments))
        yield whole[:-5] if content == b"cut" else content

    monkeypatch.setattr(httpx.Response, "iter_bytes", other)
    out = tmp_path / "out.trace"
    out.write_text("an older one")
    result = server.record(out, "--only", "dump", "--overwrite")
    assert_refused(result, "is no trace", error=MoelessError)
    assert [path.name for path in tmp_path.iterdir()] == ["out.trace"]
    assert out.read_text() == "an older one"
