"""Recordings across processes: what the gateway asks is what the engine does, errors included."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeless.core.errors import RecordingError, RequestError
from moeless.core.recording import RecordingOptions
from moeless.deployments.rpc import RemoteRecordings, answer_recording
from moeless.engine.observing import RowSpan, StepObservers
from moeless.engine.recording_service import LocalRecordings, Recordings
from moeless.engine.text import TokenTexts
from moeless.engine.transformers.sequence import Sequence
from moeless_predictors.traces import RoutingTrace, TraceMetadata
from tests.families import make_tokenizer
from tests.unit.engine.support import request


class Engine:
    """An engine's deployment, called as its handle calls it."""

    def __init__(self) -> None:
        self.observers = StepObservers()
        metadata = TraceMetadata(model="m", num_experts=8, top_k=2, num_layers=1, hidden_size=4)
        self.recordings = LocalRecordings(Recordings(self.observers, metadata))

    async def call(self, method: str, *args: Any, timeout_s: float = 10.0) -> bytes:
        assert method == "recording"
        return await answer_recording(self.recordings, *args)

    def compute(self) -> None:
        sequence = Sequence(request("r", [1, 2, 3]), eos_ids=frozenset(), texts=TokenTexts(make_tokenizer()))
        with self.observers.step(lambda: [RowSpan(sequence, 0, 3, 0)]):
            experts, weights = np.tile([0, 7], (3, 1)), np.full((3, 2), 0.5, np.float32)
            self.observers.observe_layer(0, torch.zeros(3, 4), experts, weights)


def test_a_recording_is_started_stopped_and_read_from_afar(tmp_path: Path) -> None:
    async def scenario() -> bytes:
        engine = Engine()
        client = RemoteRecordings(engine.call)
        assert (await client.status()).state == "none"
        assert (await client.start(RecordingOptions(max_tokens=9, token_ids=True))).token_ids
        engine.compute()
        assert (await client.stop()).num_tokens == 3
        file = await client.finish()
        content = await client.read(file.file_id, 0)
        assert len(content) == file.num_bytes
        assert await client.read(file.file_id, file.num_bytes) == b""
        assert (await client.discard()).state == "none"
        return content

    (tmp_path / "trace").write_bytes(asyncio.run(scenario()))
    trace = RoutingTrace.open(tmp_path / "trace")
    assert trace.token_ids_T is not None
    assert trace.token_ids_T.tolist() == [1, 2, 3]


def test_the_engines_refusals_are_the_gateways() -> None:
    async def scenario() -> None:
        client = RemoteRecordings(Engine().call)
        with pytest.raises(RecordingError, match="start one first") as caught:
            await client.stop()
        assert caught.value.code == "no_recording"
        with pytest.raises(RequestError, match="got 5") as refused:
            await client.start(RecordingOptions(hidden_layers=(5,)))
        assert refused.value.param == "hidden_layers"

    asyncio.run(scenario())
