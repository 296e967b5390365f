"""One recording at a time, from its start to the file that it becomes."""

from __future__ import annotations

import errno
import gc
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeless.core.errors import RecordingError, RequestError
from moeless.core.recording import RecordingOptions
from moeless.engine import recording_service as module
from moeless.engine.observing import RowSpan, StepObservers
from moeless.engine.recording_service import Recordings
from moeless.engine.text import TokenTexts
from moeless.engine.transformers.sequence import Sequence
from moeless_predictors.traces import RoutingTrace, TraceMetadata
from tests.families import make_tokenizer
from tests.support.waiting import wait_until
from tests.unit.engine.support import request

METADATA = TraceMetadata(model="m", num_experts=8, top_k=2, num_layers=2, hidden_size=4)
TEXTS = TokenTexts(make_tokenizer())
ROW_BYTES = 2 * 2 * 5 + 2 * 4 + 8


@pytest.fixture
def observers() -> StepObservers:
    return StepObservers()


@pytest.fixture
def recordings(observers: StepObservers) -> Iterator[Recordings]:
    made = Recordings(observers, METADATA, max_bytes=200_000)
    yield made
    made.close()


def compute(observers: StepObservers, num_tokens: int, *, weight: float = 0.5) -> None:
    """A step of a new sequence."""
    sequence = Sequence(request("r", list(range(num_tokens))), eos_ids=frozenset(), texts=TEXTS)
    with observers.step(lambda: [RowSpan(sequence, 0, num_tokens, 0)]):
        if observers.is_watching:
            for layer in range(2):
                experts = np.tile([layer, 7], (num_tokens, 1))
                weights = np.full((num_tokens, 2), weight, np.float32)
                observers.observe_layer(layer, torch.full((num_tokens, 4), 2.0), experts, weights)
    observers.forget(["r"])


def read_all(recordings: Recordings, path: Path) -> RoutingTrace:
    file = recordings.finish()
    content = b""
    while chunk := recordings.read(file.file_id, len(content)):
        content += chunk
    assert len(content) == file.num_bytes
    path.write_bytes(content)
    return RoutingTrace.open(path)


def test_what_is_computed_between_start_and_stop_is_in_the_file(
    recordings: Recordings, observers: StepObservers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 100)
    compute(observers, 3)
    assert recordings.start(RecordingOptions(max_tokens=50, hidden_layers=(1,))).state == "recording"
    compute(observers, 4)
    assert recordings.status().num_tokens == 4
    assert recordings.stop().state == "stopped"
    compute(observers, 5)
    trace = read_all(recordings, tmp_path / "trace")
    assert trace.metadata == METADATA
    assert trace.positions_T.tolist() == [0, 1, 2, 3]
    assert trace.experts_TLk[:, 1].tolist() == [[1, 7]] * 4
    assert (trace.hidden[1] == 2).all()
    assert recordings.finish() == recordings.finish()


def test_a_full_recording_can_be_read_without_being_stopped(
    recordings: Recordings, observers: StepObservers, tmp_path: Path
) -> None:
    recordings.start(RecordingOptions(max_tokens=5))
    compute(observers, 4)
    compute(observers, 4)
    assert recordings.status().state == "full"
    assert read_all(recordings, tmp_path / "trace").num_tokens == 4


def test_the_file_has_no_name_and_is_closed_when_another_recording_begins(
    recordings: Recordings, observers: StepObservers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(os.listdir("/proc/self/fd"))
    recordings.start(RecordingOptions(max_tokens=50))
    compute(observers, 4)
    recordings.stop()
    file = recordings.finish()
    assert os.listdir(tmp_path) == []
    recordings.start(RecordingOptions(max_tokens=50))
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before
    with pytest.raises(RecordingError, match="file is gone"):
        recordings.read(file.file_id, 0)


def test_discarding_frees_the_recording(recordings: Recordings, observers: StepObservers) -> None:
    recordings.start(RecordingOptions(max_tokens=50))
    assert recordings.discard().state == "none"
    with observers.step(lambda: pytest.fail("still watching")):
        assert not observers.is_watching


@pytest.mark.parametrize("action", ["stop", "discard", "finish"])
def test_without_a_recording_there_is_nothing_to_do(recordings: Recordings, action: str) -> None:
    with pytest.raises(RecordingError, match="there is no recording") as caught:
        getattr(recordings, action)()
    assert caught.value.code == "no_recording"


def test_a_running_recording_is_not_finished_nor_replaced(recordings: Recordings) -> None:
    recordings.start(RecordingOptions(max_tokens=50))
    with pytest.raises(RecordingError, match="stop it first"):
        recordings.finish()
    with pytest.raises(RecordingError, match="stop it first"):
        recordings.start(RecordingOptions(max_tokens=1))


def test_an_empty_recording_has_no_file(recordings: Recordings) -> None:
    recordings.start(RecordingOptions(max_tokens=50))
    recordings.stop()
    with pytest.raises(RecordingError, match="no tokens"):
        recordings.finish()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": 10, "hidden_layers": (0, 2)}, "hidden_layers must be from 0 to 1, got 2"),
        ({"max_tokens": 10, "hidden_layers": (1, 1)}, r"hidden_layers must differ, got \[1, 1\]"),
        ({"max_tokens": 10_000}, f"max_tokens must be at most {200_000 // ROW_BYTES} with rows of {ROW_BYTES} bytes"),
        ({"max_tokens": 5000, "hidden_layers": (0,)}, f"max_tokens must be at most {200_000 // (ROW_BYTES + 8)}"),
    ],
)
def test_options_out_of_range_are_refused_by_name(recordings: Recordings, options: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told) as caught:
        recordings.start(RecordingOptions(**options))
    assert caught.value.param in told
    assert recordings.status().state == "none"


def test_a_recording_that_breaks_a_rule_of_traces_has_failed(recordings: Recordings, observers: StepObservers) -> None:
    recordings.start(RecordingOptions(max_tokens=50))
    compute(observers, 4, weight=-1.0)
    recordings.stop()
    for _ in range(2):
        with pytest.raises(RecordingError, match="column 'weights', row 0"):
            recordings.finish()
    assert recordings.status().state == "failed"


def test_a_file_that_could_not_be_written_may_be_tried_again(
    recordings: Recordings, observers: StepObservers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, failures = RoutingTrace.save, [OSError(errno.ENOSPC, "No space left on device")]

    def fail_once(trace: RoutingTrace, path: Path) -> None:
        if failures:
            raise failures.pop()
        save(trace, path)

    monkeypatch.setattr(RoutingTrace, "save", fail_once)
    recordings.start(RecordingOptions(max_tokens=50))
    compute(observers, 4)
    recordings.stop()
    with pytest.raises(RecordingError, match="No space left on device"):
        recordings.finish()
    assert read_all(recordings, tmp_path / "trace").num_tokens == 4


def test_starting_and_stopping_beside_a_running_engine_loses_no_step(
    recordings: Recordings, observers: StepObservers, tmp_path: Path
) -> None:
    is_over = threading.Event()

    def generate() -> None:
        while not is_over.is_set():
            compute(observers, 3)

    engine = threading.Thread(target=generate)
    engine.start()
    try:
        for round_number in range(20):
            recordings.start(RecordingOptions(max_tokens=3000))
            wait_until(lambda: recordings.status().num_steps >= 2)
            recordings.stop()
            trace = read_all(recordings, tmp_path / f"{round_number}")
            assert trace.num_tokens == 3 * trace.num_sequences
    finally:
        is_over.set()
        engine.join()
