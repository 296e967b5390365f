"""Arrival traces: their rules, and what is saved is what is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeless_predictors.traces import ArrivalTrace, RoutingTrace, TraceFormatError, kind_of
from moeless_predictors.traces.container import write_container


def arrays(**changes: Any) -> dict[str, Any]:
    return {"arrival_s": [10.0, 10.5, 12.0], "prompt_tokens": [5, 6, 7], "output_tokens": [1, 0, 3]} | changes


def test_time_counts_from_the_first_request() -> None:
    trace = ArrivalTrace.from_arrays(**arrays())
    assert trace.arrival_s.tolist() == [0.0, 0.5, 2.0]
    assert (trace.num_requests, trace.duration_s) == (3, 2.0)
    assert trace.blocks_of(0).tolist() == []


def test_what_is_saved_is_what_is_opened(tmp_path: Path) -> None:
    trace = ArrivalTrace.from_arrays(**arrays(block_hashes=[[1, 2], [], [1, 2**60]], source="a file"))
    trace.save(tmp_path / "t")
    assert kind_of(tmp_path / "t") == "arrivals"
    opened = ArrivalTrace.open(tmp_path / "t")
    assert opened.source == "a file"
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "block_hashes", "block_starts"):
        assert getattr(opened, name).dtype == getattr(trace, name).dtype
        np.testing.assert_array_equal(getattr(opened, name), getattr(trace, name))
    assert [opened.blocks_of(request).tolist() for request in range(3)] == [[1, 2], [], [1, 2**60]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrival_s": [1.0, 3.0, 2.0]}, "'arrival_s', row 2: must be at least 2.0, that of the row before, got 1.0"),
        ({"arrival_s": [1.0, np.nan, 2.0]}, "'arrival_s', row 1"),
        ({"arrival_s": []}, "at least one request"),
        ({"prompt_tokens": [1, 2]}, r"'prompt_tokens' must have the shape \[3\], got \[2\]"),
        ({"prompt_tokens": [1, 2, -1]}, "'prompt_tokens', row 2: must be from 0 to 2147483647, got -1"),
        ({"output_tokens": [1.0, 2.0, 3.0]}, "'output_tokens' must hold whole numbers, got float64"),
        ({"block_hashes": [[1]]}, r"'block_hashes' must have the shape \[3\], got \[1\]"),
    ],
)
def test_a_broken_rule_is_told_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceFormatError, match=message):
        ArrivalTrace.from_arrays(**arrays(**change))


def test_a_file_that_lacks_columns_or_has_strange_ones_is_refused(tmp_path: Path) -> None:
    write_container(tmp_path / "few", kind="arrivals", fields={}, columns={"arrival_s": np.zeros(3)})
    with pytest.raises(TraceFormatError, match="columns are missing: output_tokens, prompt_tokens"):
        ArrivalTrace.open(tmp_path / "few")
    columns = {
        "arrival_s": np.zeros(3),
        "prompt_tokens": np.zeros(3, np.int32),
        "output_tokens": np.zeros(3, np.int32),
        "block_hashes": np.zeros(2, np.int64),
        "block_starts": np.array([0, 2, 1, 2]),
    }
    write_container(tmp_path / "falling", kind="arrivals", fields={}, columns=columns)
    with pytest.raises(TraceFormatError, match="'block_starts', row 2: must be at least 2, got 1"):
        ArrivalTrace.open(tmp_path / "falling")
    write_container(tmp_path / "alone", kind="arrivals", fields={}, columns=dict(list(columns.items())[:4]))
    with pytest.raises(TraceFormatError, match="must come together"):
        ArrivalTrace.open(tmp_path / "alone")
    write_container(tmp_path / "odd", kind="arrivals", fields={}, columns=columns | {"colour": np.zeros(3)})
    with pytest.raises(TraceFormatError, match="unknown columns: colour"):
        ArrivalTrace.open(tmp_path / "odd")


def test_routing_columns_that_are_missing_are_named(tmp_path: Path) -> None:
    write_container(tmp_path / "t", kind="routing", fields={}, columns={"phase": np.zeros(3, np.uint8)})
    with pytest.raises(TraceFormatError, match="columns are missing: experts, positions, sequence_starts, weights"):
        RoutingTrace.open(tmp_path / "t")
