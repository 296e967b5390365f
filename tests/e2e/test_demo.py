"""`make demo` as a new user runs it, from start to nothing left running."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


def test_the_demo_streams_answers_shows_the_functions_and_leaves_nothing_running() -> None:
    mark = uuid.uuid4().hex
    result = subprocess.run(
        [sys.executable, "-m", "moeless.demo"],
        capture_output=True,
        text=True,
        timeout=380,
        env={**os.environ, "COLUMNS": "200", "MOELESS_TEST_MARK": mark},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "What is 5 + 8?" in result.stdout
    rows = [line for line in result.stdout.splitlines() if "L00.E000" in line or "L05.E015" in line]
    assert len(rows) == 2
    assert all("warm" in row and "worker-" in row for row in rows)
    assert _processes_with(mark) == []


def _processes_with(mark: str) -> list[list[str]]:
    """Command lines of the processes that inherited the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MOELESS_TEST_MARK") == mark:
                found.append(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
