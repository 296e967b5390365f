from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.core.arrays import IntArray
from moeless.planning.scale import Stabiliser


def stabiliser(*, up_s: float = 0.0, down_s: float = 0.0, ready_s: float = 0.0, window_s: float = 1.0) -> Stabiliser:
    return Stabiliser(
        up_window_s_LE=np.full((1, 1), up_s),
        down_window_s_LE=np.full((1, 1), down_s),
        ready_s=ready_s,
        window_s=window_s,
    )


def run(stabiliser: Stabiliser, wanted: list[int], *, tick_s: float = 1.0) -> list[int]:
    """The counts there are, tick by tick."""
    current: IntArray | None = None
    counts = []
    for tick, count in enumerate(wanted):
        current = stabiliser.stabilise(np.array([[count]]), time_s=tick * tick_s, current_LE=current)
        counts.append(int(current[0, 0]))
    return counts


def test_without_windows_what_is_wanted_is_had() -> None:
    assert run(stabiliser(), [1, 5, 2, 0, 3]) == [1, 5, 2, 0, 3]


def test_replicas_go_once_they_were_not_wanted_for_the_window() -> None:
    assert run(stabiliser(down_s=3), [4, 1, 1, 1, 1, 1]) == [4, 4, 4, 1, 1, 1]


def test_of_what_was_wanted_in_the_window_the_most_stays() -> None:
    assert run(stabiliser(down_s=3), [4, 1, 3, 1, 1, 1, 1]) == [4, 4, 4, 3, 3, 1, 1]


def test_replicas_come_once_they_were_wanted_for_the_window() -> None:
    assert run(stabiliser(up_s=3), [1, 4, 4, 4, 4]) == [1, 1, 1, 4, 4]
    assert run(stabiliser(up_s=3), [1, 4, 1, 4, 4, 4]) == [1, 1, 1, 1, 1, 4]


@pytest.mark.parametrize(("waited_s", "count"), [(2.999, 1), (3.0, 4), (3.001, 4)])
def test_replicas_come_when_the_window_is_exactly_over(waited_s: float, count: int) -> None:
    # What was wanted before is remembered with the moment that its part of the window begins.
    rising = stabiliser(up_s=3)
    held = rising.stabilise(np.array([[1]]), time_s=10.0, current_LE=np.array([[1]]))
    held = rising.stabilise(np.array([[4]]), time_s=10.05, current_LE=held)
    assert held.tolist() == [[1]]
    held = rising.stabilise(np.array([[4]]), time_s=10.0 + waited_s, current_LE=held)
    assert held.tolist() == [[count]]


def test_what_would_be_ready_too_late_is_started_only_if_the_forecast_lasts() -> None:
    assert run(stabiliser(ready_s=3, window_s=1), [1, 4, 1, 4, 4, 4]) == [1, 1, 1, 1, 4, 4]
    assert run(stabiliser(ready_s=1, window_s=1), [1, 4, 1]) == [1, 4, 1]


def test_what_was_there_at_first_is_held_like_what_was_wanted() -> None:
    steady = stabiliser(down_s=2)
    current = np.array([[5]])
    counts = []
    for tick in range(3):
        current = steady.stabilise(np.array([[1]]), time_s=float(tick), current_LE=current)
        counts.append(int(current[0, 0]))
    assert counts == [5, 5, 1]


def test_nothing_hosted_is_a_new_beginning() -> None:
    steady = stabiliser(down_s=10)
    steady.stabilise(np.array([[9]]), time_s=0.0, current_LE=None)
    assert steady.stabilise(np.array([[2]]), time_s=1.0, current_LE=None).tolist() == [[2]]


def test_functions_have_windows_of_their_own() -> None:
    steady = Stabiliser(
        up_window_s_LE=np.array([[0.0, 300.0]]), down_window_s_LE=np.array([[300.0, 0.0]]), ready_s=0.0, window_s=1.0
    )
    current = steady.stabilise(np.array([[2, 2]]), time_s=0.0, current_LE=None)
    assert steady.stabilise(np.array([[4, 4]]), time_s=1.0, current_LE=current).tolist() == [[4, 2]]
    assert steady.stabilise(np.array([[1, 1]]), time_s=2.0, current_LE=np.array([[4, 4]])).tolist() == [[4, 1]]


def test_a_long_window_of_short_ticks_forgets_in_time() -> None:
    counts = run(stabiliser(down_s=16), [9, *[1] * 200], tick_s=0.1)
    held = counts.index(1) * 0.1
    assert 16 <= held <= 17.1
    assert set(counts[counts.index(1) :]) == {1}


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=30),
    st.sampled_from([0.0, 1.0, 3.5]),
    st.sampled_from([0.0, 2.0, 40.0]),
    st.sampled_from([0.3, 1.0]),
)
def test_asking_again_changes_nothing(wanted: list[int], up_s: float, down_s: float, tick_s: float) -> None:
    steady = stabiliser(up_s=up_s, down_s=down_s)
    current: IntArray | None = None
    for tick, count in enumerate(wanted):
        once = steady.stabilise(np.array([[count]]), time_s=tick * tick_s, current_LE=current)
        current = steady.stabilise(np.array([[count]]), time_s=tick * tick_s, current_LE=once)
        assert current.tolist() == once.tolist()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 8), st.integers(1, 8))
def test_a_count_stays_within_what_was_wanted_lately(wanted: list[int], up: int, down: int) -> None:
    counts = run(stabiliser(up_s=up, down_s=down), wanted)
    for tick, count in enumerate(counts[1:], start=1):
        high = max(wanted[max(0, tick + 1 - down) : tick + 1])
        low = min(wanted[max(0, tick + 1 - up) : tick + 1])
        # Whole ticks: parts of a window are no longer than a tick here.
        assert count == max(low, min(counts[tick - 1], high))
