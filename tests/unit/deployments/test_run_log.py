"""Warnings of a run's processes reach the terminal of the process that started it, one line each."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from moeless.deployments.run_log import SOCKET_VARIABLE, LogLine, TerminalHandler, lines_of_run, set_up_logging
from tests.support.waiting import wait_until


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.Logger("moeless.test")
    logger.setLevel(logging.INFO)
    yield logger
    for handler in logger.handlers:
        handler.close()


def test_a_warning_arrives_and_an_event_does_not(logger: logging.Logger) -> None:
    lines: list[LogLine] = []
    with lines_of_run(lines.append):
        logger.addHandler(TerminalHandler(os.environ[SOCKET_VARIABLE], "engine"))
        logger.info("engine started")
        logger.warning("worker lost name=%s", "worker-0")
        wait_until(lambda: bool(lines))
    assert [str(line) for line in lines] == ["warning: engine: worker lost name=worker-0"]
    assert SOCKET_VARIABLE not in os.environ


def test_an_exception_is_one_line_without_its_traceback(logger: logging.Logger) -> None:
    lines: list[LogLine] = []
    with lines_of_run(lines.append):
        logger.addHandler(TerminalHandler(os.environ[SOCKET_VARIABLE], "gateway"))
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logger.exception("call failed")
        wait_until(lambda: bool(lines))
    assert str(lines[0]) == "error: gateway: call failed (ValueError: two lines)"


def test_a_terminal_that_is_gone_or_lags_behind_costs_the_process_nothing(logger: logging.Logger) -> None:
    with lines_of_run(lambda _: None):
        handler = TerminalHandler(os.environ[SOCKET_VARIABLE], "engine")
    logger.addHandler(handler)
    logger.warning("nobody listens")


def test_a_line_that_is_no_unicode_arrives_escaped(logger: logging.Logger) -> None:
    lines: list[LogLine] = []
    with lines_of_run(lines.append):
        logger.addHandler(TerminalHandler(os.environ[SOCKET_VARIABLE], "engine"))
        logger.warning("no such file name=%s", os.fsdecode(b"model-\xff"))
        wait_until(lambda: bool(lines))
    assert lines[0].text == r"no such file name=model-\udcff"


def test_a_line_that_cannot_be_formatted_is_no_error_of_its_writer(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    with lines_of_run(lambda _: None):
        logger.addHandler(TerminalHandler(os.environ[SOCKET_VARIABLE], "engine"))
        logger.warning("%d layers", "three")
    assert "Logging error" in capsys.readouterr().err


def test_a_long_line_is_cut(logger: logging.Logger) -> None:
    lines: list[LogLine] = []
    with lines_of_run(lines.append):
        logger.addHandler(TerminalHandler(os.environ[SOCKET_VARIABLE], "engine"))
        logger.warning("x" * 100_000)
        wait_until(lambda: bool(lines))
    assert len(lines[0].text) == 1024


def test_logging_outside_a_replica_stays_as_it_is() -> None:
    before = list(logging.getLogger("moeless").handlers)
    set_up_logging()
    assert logging.getLogger("moeless").handlers == before
