"""Lines that strangers cause are written at a bounded rate, and none is left out silently."""

from __future__ import annotations

import logging

import pytest

from moeless.dispatch.rate_limited_log import RateLimitedLog


def test_one_line_of_a_kind_in_ten_seconds_with_the_number_left_out(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    log = RateLimitedLog(logging.getLogger("strangers"), logging.WARNING, clock=lambda: now_s)
    for number in range(1000):
        now_s = number * 0.02  # 20 s
        log.log("refused address=%s", number)
    assert [record.getMessage() for record in caplog.records] == [
        "refused address=0",
        "refused address=500 similar_lines_left_out=499",
    ]


def test_another_kind_is_written_at_once(caplog: pytest.LogCaptureFixture) -> None:
    log = RateLimitedLog(logging.getLogger("strangers"), logging.WARNING, clock=lambda: 0.0)
    log.log("refused address=%s", "a")
    log.log("timed out address=%s", "b")
    assert [record.getMessage() for record in caplog.records] == ["refused address=a", "timed out address=b"]
