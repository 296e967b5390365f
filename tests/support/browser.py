"""A page in headless Chromium, driven over a pipe by the DevTools protocol: no library, no port."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_DEADLINE_S = 60.0
_WITH_PIPES_AS_3_AND_4 = """
import os, sys
for number, given in ((103, sys.argv[1]), (104, sys.argv[2])):
    os.dup2(int(given), number)
os.dup2(103, 3)
os.dup2(104, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
"""The browser reads commands from the one and writes answers to the other."""


class Browser:
    """One page. Notes what it asks for and what goes wrong in it."""

    def __init__(self, profile: Path, *, dark: bool = False) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        """Errors and warnings of the console, and exceptions that nobody caught."""
        self._answers: dict[int, dict[str, Any]] = {}
        self._is_loaded = False
        self._last_id = 0
        self._buffer = b""
        to_browser, self._write_fd = os.pipe()
        self._read_fd, from_browser = os.pipe()

        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", _WITH_PIPES_AS_3_AND_4, str(to_browser), str(from_browser)),
                *("chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
                *("--no-first-run", "--disable-extensions", "--disable-background-networking", "--hide-scrollbars"),
                *("--window-size=1200,900", f"--user-data-dir={profile}", "about:blank"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(to_browser, from_browser),
        )
        os.close(to_browser)
        os.close(from_browser)
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session = None
        self.call("Browser.close")
        self._process.wait(_DEADLINE_S)
        os.close(self._write_fd)
        os.close(self._read_fd)

    def open(self, url: str) -> None:
        """Load a page and wait for it."""
        self._is_loaded = False
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + _DEADLINE_S
        while not self._is_loaded:
            self._take(deadline)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its answer."""
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _DEADLINE_S
        while self._last_id not in self._answers:
            self._take(deadline)
        answer = self._answers.pop(self._last_id)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _take(self, deadline: float) -> None:
        while b"\0" not in self._buffer:
            readable, _, _ = select.select([self._read_fd], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, "the browser says nothing"
            received = os.read(self._read_fd, 1 << 20)
            assert received, "the browser has hung up"
            self._buffer += received
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(raw)
        if "id" in message:
            self._answers[message["id"]] = message
            return
        parameters = message.get("params", {})
        match message["method"]:
            case "Page.loadEventFired":
                self._is_loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.complaints.append(parameters["entry"]["text"])
