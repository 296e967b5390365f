"""Many streams share a bound of writes a second; a few are written to at every token."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from moeless.gateway.streams import WritePacer


@pytest.mark.parametrize("num_streams", [1, 4, 5, 16, 64])
def test_the_writes_of_many_streams_stay_within_the_bound(num_streams: int) -> None:
    pacer = WritePacer(300)
    with ExitStack() as stack:
        for _ in range(num_streams):
            stack.enter_context(pacer.stream())
        pause_s = pacer.pause_s()
    assert (pause_s == 0) == (num_streams <= 4)
    if pause_s:
        assert (num_streams - 4) / pause_s == pytest.approx(300)
    assert pacer.pause_s() == 0, "streams that have ended do not count"
