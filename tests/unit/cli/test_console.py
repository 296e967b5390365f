"""Output on the terminal of a run: moeless's lines, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import os, sys, warnings
from pathlib import Path
from moeless.cli._console import ReservedTerminal, say, say_aside, waiting

with ReservedTerminal() as terminal:
    say("ours out")
    say_aside("ours err")
    print("library out")
    print("library err", file=sys.stderr)
    os.write(2, b"C++ err\\n")
    terminal.move_to(Path(sys.argv[1]))
    os.write(1, b"C++ out\\n")
    warnings.warn("deprecated")
    with waiting() as show:
        show("starting Ray")
say("after out")
print("library after")
"""


def test_only_our_lines_reach_the_terminal_and_the_rest_a_file(tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(log)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["ours out", "starting Ray ...", "after out", "library after"]
    assert done.stderr.splitlines() == ["ours err"]
    written = log.read_text()
    for line in ("library out", "library err", "C++ err", "C++ out", "deprecated"):
        assert line in written


def test_an_error_after_the_block_is_shown(tmp_path: Path) -> None:
    program = (
        "from moeless.cli._console import ReservedTerminal\nwith ReservedTerminal():\n    raise RuntimeError('a fault')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "RuntimeError: a fault" in done.stderr
