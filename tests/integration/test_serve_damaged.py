"""`moeless serve` with a damaged package: refused at once, in one line with the file and both checksums."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moeless.deployments.runtime import free_port
from moeless.packages.source import resolve_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(200)]


@pytest.mark.parametrize("file", ["functions/L03.E007.safetensors", "backbone/config.json", "backbone/tokenizer.json"])
def test_a_flipped_bit_is_refused_in_one_line(file: str, tmp_path: Path) -> None:
    folder = shutil.copytree(resolve_model("moeless-mini").path, tmp_path / "packed")
    damaged = folder / file
    promised = hashlib.sha256(damaged.read_bytes()).hexdigest()
    data = bytearray(damaged.read_bytes())
    data[-2] ^= 1
    damaged.write_bytes(data)
    command = [sys.executable, "-m", "moeless.cli", "serve", str(folder), "--workers", "2", "--port", str(free_port())]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        said = {line.rstrip("\n"): time.monotonic() for line in process.stderr}
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 2
    lines = [line for line in said if line.startswith("moeless: ")]
    assert len(lines) == 1, said
    assert str(damaged) in lines[0]
    assert promised in lines[0]
    assert hashlib.sha256(data).hexdigest() in lines[0]
    assert "Traceback" not in rest + "\n".join(said)
    assert len(said) < 10, said
