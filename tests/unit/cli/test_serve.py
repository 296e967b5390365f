"""The command line as a user meets it: one line and an exit code for what is wrong."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from moeless.cli.serve import BreakableStart
from tests.families import make_checkpoint


def moeless(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moeless.cli", *arguments], capture_output=True, text=True, timeout=100, check=False
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("checkpoint") / "mixtral")


def assert_one_line(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("moeless: ")
    for word in words:
        assert word in lines[0]


def test_version_is_printed() -> None:
    from moeless import __version__

    result = moeless("version")
    assert (result.returncode, result.stdout.strip()) == (0, __version__)


def test_pack_writes_every_function_and_says_so(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    result = moeless("pack", str(checkpoint), str(out))
    assert result.returncode == 0, result.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert f"{len(manifest['functions'])} functions" in " ".join(result.stdout.split())
    assert len(list((out / "functions").iterdir())) == len(manifest["functions"]) > 0


@pytest.mark.parametrize("option", ["--allow-tracing", "--no-allow-tracing"])
def test_an_option_of_an_old_name_is_refused_with_the_new_one(option: str) -> None:
    assert_one_line(moeless("serve", "moeless-mini", option), 2, "--allow-tracing", "--allow-recording")


def test_a_model_that_is_nowhere_is_one_line_and_code_2() -> None:
    assert_one_line(moeless("serve", "/nowhere/at/all"), 2, "/nowhere/at/all")


def test_a_checkpoint_that_is_not_moe_is_one_line_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    assert_one_line(moeless("serve", str(tmp_path)), 2)
    assert_one_line(moeless("pack", str(tmp_path), str(tmp_path / "out")), 2)


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--isolation", "process", "isolation"),
        ("--dtype", "int4", "dtype"),
        ("--workers", "-3", "workers"),
        ("--device", "tpu", "device"),
        ("--kv-cache-gb", "0", "kv-cache-gb"),
    ],
)
def test_a_bad_option_is_one_line_that_names_it(checkpoint: Path, option: str, value: str, word: str) -> None:
    assert_one_line(moeless("serve", str(checkpoint), option, value), 2, word, value)


def test_a_port_that_is_taken_is_one_line_before_anything_starts(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        assert_one_line(moeless("serve", str(checkpoint), "--port", port), 2, "127.0.0.1", port)


def test_a_key_with_a_space_is_refused_without_showing_it(checkpoint: Path) -> None:
    result = moeless("serve", str(checkpoint), "--api-key", "two words")
    assert_one_line(result, 2, "api-key")
    assert "two words" not in result.stderr


def test_experts_of_a_server_that_is_not_there_is_one_line() -> None:
    assert_one_line(moeless("experts", "--url", "http://127.0.0.1:9"), 1, "http://127.0.0.1:9")


@pytest.mark.parametrize(("is_serving", "breaks"), [(False, True), (True, False)])
def test_an_interrupt_breaks_off_a_start_but_not_a_server_that_answers(is_serving: bool, breaks: bool) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        start = BreakableStart(lambda phase: None, is_serving=lambda: is_serving)
        start.begin_phase("starting engine, workers and gateway")
        with pytest.raises(KeyboardInterrupt) if breaks else nullcontext():
            signal.raise_signal(signal.SIGINT)
        assert start.asked_to_stop.is_set()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
