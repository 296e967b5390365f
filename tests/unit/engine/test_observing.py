"""Routing that observers receive, against that of transformers' own model on the whole sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moeless.engine.observing import RowSpan, StepObservers
from moeless.engine.transformers.continuous import ContinuousEngine
from moeless.engine.transformers.hooks import kv_bytes_per_token
from moeless.engine.transformers.static_batch import StaticBatchEngine
from moeless.engine.transformers.threaded_engine import ThreadedEngine
from moeless.packages.backbone import experts_modules
from tests.unit.engine.routed import PAGED, STATIC, Family, LoadFamily, Routing, dispatched, reference_routing
from tests.unit.engine.support import Recorder, prompt_of, request

LENGTHS = (1, 2, 7, 30, 63, 64, 65, 150)
KINDS = {PAGED: ContinuousEngine, STATIC: StaticBatchEngine}


class Watcher:
    """Keeps what it is told, by sequence, position and layer."""

    def __init__(self) -> None:
        self.routing: dict[tuple[str, int], list[Routing]] = {}
        self.tokens: dict[tuple[str, int], int] = {}
        self.num_computed: dict[tuple[str, int], int] = {}
        self.events: list[str] = []
        self.forgotten: list[str] = []
        self._spans: list[RowSpan] = []
        self.kept: list[tuple[np.ndarray, np.ndarray]] = []
        """Arrays as they were told, and copies made then."""

    def begin_step(self, spans: list[RowSpan]) -> None:
        self.events.append("begin")
        self._spans = spans
        for span in spans:
            ids = span.sequence.token_ids(span.first_position, span.num_rows)
            assert len(ids) == span.num_rows
            for position, token in enumerate(ids, span.first_position):
                key = span.sequence.request_id, position
                self.tokens[key] = token
                self.num_computed[key] = self.num_computed.get(key, 0) + 1
                self.routing[key] = []

    def observe_layer(self, layer: int, hidden_TH: Tensor, experts_Tk: np.ndarray, weights_Tk: np.ndarray) -> None:
        self.events.append(f"layer {layer}")
        self.kept += [(experts_Tk, experts_Tk.copy()), (weights_Tk, weights_Tk.copy())]
        for span in self._spans:
            for i in range(span.num_rows):
                row = span.first_row + i
                found = self.routing[span.sequence.request_id, span.first_position + i]
                assert len(found) == layer
                found.append((experts_Tk[row].copy(), weights_Tk[row].copy(), hidden_TH[row].numpy().copy()))

    def end_step(self) -> None:
        self.events.append("end")

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)

    def positions(self, request_id: str) -> list[int]:
        return sorted(position for name, position in self.routing if name == request_id)


@contextmanager
def watched(family: Family, recorder: Recorder, watcher: Any, **settings: Any) -> Iterator[ThreadedEngine]:
    with dispatched(family, recorder, **settings) as engine:
        engine.observers.add(watcher)
        yield engine


def assert_routing_is_the_models(family: Family, watcher: Watcher, request_id: str, token_ids: list[int]) -> None:
    expected = reference_routing(family.reference, token_ids)
    for position in watcher.positions(request_id):
        key = request_id, position
        assert watcher.tokens[key] == token_ids[position]
        assert len(watcher.routing[key]) == len(expected[position])
        for (experts, weights, hidden), (experts_r, weights_r, hidden_r) in zip(
            watcher.routing[key], expected[position], strict=True
        ):
            order, order_r = np.argsort(experts), np.argsort(experts_r)
            assert experts[order].tolist() == experts_r[order_r].tolist()
            assert np.allclose(weights[order], weights_r[order_r], atol=1e-4)
            assert np.allclose(hidden, hidden_r, atol=1e-3)


@pytest.mark.parametrize("name", [PAGED, STATIC, "gpt_oss", "qwen3_next"])
def test_each_row_is_told_as_its_sequences_position(name: str, load_family: LoadFamily) -> None:
    family, watcher, recorder = load_family(name), Watcher(), Recorder()
    with watched(family, recorder, watcher) as engine:
        assert isinstance(engine, KINDS.get(name, ThreadedEngine))
        for length in LENGTHS:  # the longest are prefilled in chunks beside those that decode, or left-padded
            engine.submit(request(str(length), prompt_of(length), max_tokens=5 + length % 20))
        answers = recorder.wait_for(*map(str, LENGTHS))
    for length, answer in zip(LENGTHS, answers, strict=True):
        token_ids = [*prompt_of(length), *answer.token_ids]
        # The last token is sampled and never computed.
        assert watcher.positions(str(length)) == list(range(len(token_ids) - 1))
        assert_routing_is_the_models(family, watcher, str(length), token_ids[:-1])
    assert set(watcher.num_computed.values()) == {1}
    assert all(np.array_equal(told, copy) for told, copy in watcher.kept)


@pytest.mark.parametrize("name", KINDS)
def test_a_step_is_begun_told_layer_by_layer_and_ended(name: str, load_family: LoadFamily) -> None:
    family, watcher, recorder = load_family(name), Watcher(), Recorder()
    with watched(family, recorder, watcher) as engine:
        engine.submit(request("r", prompt_of(5), max_tokens=3))
        recorder.wait_for("r")
    layers = [f"layer {layer}" for layer in range(len(list(experts_modules(family.reference))))]
    assert watcher.events == ["begin", *layers, "end"] * 3


@pytest.mark.parametrize("name", KINDS)
def test_ended_and_cancelled_sequences_are_forgotten_once(name: str, load_family: LoadFamily) -> None:
    family, watcher, recorder = load_family(name), Watcher(), Recorder()
    with watched(family, recorder, watcher) as engine:
        engine.submit(request("short", prompt_of(5), max_tokens=2))
        engine.submit(request("long", prompt_of(6), max_tokens=200))
        recorder.wait_for("short")
        engine.cancel("long")
        recorder.wait_for("long")
    assert sorted(watcher.forgotten) == ["long", "short"]


def test_positions_found_in_shared_pages_are_not_told(load_family: LoadFamily) -> None:
    family, watcher, recorder = load_family(PAGED), Watcher(), Recorder()
    prompt = prompt_of(40)
    with watched(family, recorder, watcher, page_size=16) as engine:
        engine.submit(request("first", prompt))
        recorder.wait_for("first")
        engine.submit(request("second", [*prompt[:33], *prompt_of(9, seed=1)]))
        first, second = recorder.wait_for("first", "second")
    assert watcher.positions("first") == list(range(47))
    assert watcher.positions("second") == list(range(32, 49))
    assert_routing_is_the_models(family, watcher, "second", [*prompt[:33], *prompt_of(9, seed=1), *second.token_ids])
    assert first.num_tokens == 8


def test_a_sequence_that_had_to_make_room_is_told_again_from_where_it_begins_anew(load_family: LoadFamily) -> None:
    family, watcher, recorder = load_family(PAGED), Watcher(), Recorder()
    names = [str(n) for n in range(5)]
    pool = 128 * kv_bytes_per_token(family.backbone)
    with watched(family, recorder, watcher, kv_cache_bytes=pool, page_size=4, prefix_sharing=False) as engine:
        for n, name in enumerate(names):
            engine.submit(request(name, prompt_of(20, seed=n), max_tokens=80))
        answers = recorder.wait_for(*names)
    assert max(watcher.num_computed.values()) > 1
    for n, (name, answer) in enumerate(zip(names, answers, strict=True)):
        token_ids = [*prompt_of(20, seed=n), *answer.token_ids]
        assert watcher.positions(name) == list(range(99))
        assert_routing_is_the_models(family, watcher, name, token_ids[:-1])


@pytest.mark.parametrize("method", ["begin_step", "observe_layer", "end_step", "forget"])
def test_an_observer_that_raises_is_taken_out_and_the_others_go_on(
    method: str, load_family: LoadFamily, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, broken, sound, recorder = load_family(PAGED), Watcher(), Watcher(), Recorder()

    def fail(*args: object) -> None:
        broken.events.append("failed")
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(broken, method, fail)
    with watched(family, recorder, broken) as engine:
        engine.observers.add(sound)
        for name in ("a", "b"):
            engine.submit(request(name, prompt_of(4), max_tokens=3))
            (answer,) = recorder.wait_for(name)
            assert answer.finish_reason == "length"
    assert broken.events.count("failed") == 1
    assert "observer taken out observer=Watcher" in caplog.text
    assert sound.positions("b") == list(range(6))
    assert sound.forgotten == ["a", "b"]


def test_a_removed_observer_is_told_no_more(load_family: LoadFamily) -> None:
    family, watcher, recorder = load_family(PAGED), Watcher(), Recorder()
    with watched(family, recorder, watcher) as engine:
        engine.submit(request("a", prompt_of(4), max_tokens=3))
        recorder.wait_for("a")
        engine.observers.remove(watcher)
        told = len(watcher.events)
        engine.submit(request("b", prompt_of(4), max_tokens=3))
        recorder.wait_for("b")
    assert len(watcher.events) == told


@pytest.mark.parametrize("name", KINDS)
def test_a_step_that_fails_is_not_ended_and_the_next_one_is(
    name: str, load_family: LoadFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, watcher, recorder = load_family(name), Watcher(), Recorder()
    compute, failures = family.dispatcher.local.partial_sums, [ZeroDivisionError("a bug")]

    def fail_once(*args: Any) -> Tensor:
        if failures:
            raise failures.pop()
        return compute(*args)

    monkeypatch.setattr(family.dispatcher.local, "partial_sums", fail_once)
    with watched(family, recorder, watcher) as engine:
        for request_id in ("a", "b"):
            engine.submit(request(request_id, prompt_of(4), max_tokens=1))
            recorder.wait_for(request_id)
        assert not engine.observers.is_watching
    assert watcher.events[:3] == ["begin", "layer 0", "begin"]
    assert watcher.events[-1] == "end"
    assert watcher.forgotten == ["a", "b"]


def test_calls_of_the_dispatcher_outside_steps_are_not_told(load_family: LoadFamily) -> None:
    family, watcher = load_family(PAGED), Watcher()
    observers = StepObservers()
    observers.add(watcher)
    family.dispatcher.set_observer(observers)
    with torch.inference_mode():
        family.backbone(torch.tensor([prompt_of(4)]), use_cache=False)
    family.dispatcher.set_observer(None)
    assert watcher.events == []


def test_spans_are_not_looked_for_while_nobody_watches() -> None:
    def find_spans() -> list[RowSpan]:
        raise AssertionError("looked for spans")

    observers = StepObservers()
    with observers.step(find_spans):
        assert not observers.is_watching
