from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.core.errors import ConfigError
from moeless.simulate.batching import Batch, BatchingConfig, Chunk


def make(prompts: list[int], outputs: list[int], *, budget: int = 8, running: int = 4) -> Batch:
    batch = Batch(BatchingConfig(max_batch_tokens=budget, max_running=running), np.array(prompts), np.array(outputs))
    for request in range(len(prompts)):
        batch.add(request)
    return batch


def test_a_long_prompt_is_cut_into_chunks_of_the_budget() -> None:
    batch = make([20], [1])
    chunks = []
    while (step := batch.begin_step()) is not None:
        chunks += step.chunks
        started, finished = batch.end_step(step)
    assert chunks == [Chunk(0, 0, 8), Chunk(0, 8, 8), Chunk(0, 16, 4)]
    assert (started, finished) == ([0], [0])


def test_prompts_get_what_decoding_leaves_of_the_budget() -> None:
    batch = make([3, 20], [5, 1])
    first = batch.begin_step()
    assert first is not None
    assert first.chunks == [Chunk(0, 0, 3), Chunk(1, 0, 5)]
    batch.end_step(first)
    second = batch.begin_step()
    assert second is not None
    assert (second.requests_n.tolist(), second.positions_n.tolist(), second.chunks) == ([0], [3], [Chunk(1, 5, 7)])


def test_no_more_run_than_may() -> None:
    batch = make([1] * 6, [3] * 6, running=2)
    step = batch.begin_step()
    assert step is not None
    assert len(step.chunks) == 2
    assert len(batch.waiting) == 4


def test_contexts_are_the_sums_of_positions() -> None:
    batch = make([3, 20], [5, 1])
    first = batch.begin_step()
    assert first is not None
    assert first.prefill_context == (0 + 1 + 2) + (0 + 1 + 2 + 3 + 4)
    batch.end_step(first)
    second = batch.begin_step()
    assert second is not None
    assert (second.decode_context, second.prefill_context) == (3.0, sum(range(5, 12)))


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 10)), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(0, 20),
)
def test_every_token_is_computed_once_and_every_request_starts_and_finishes_once(
    lengths: list[tuple[int, int]], running: int, spare: int
) -> None:
    prompts, outputs = (list(column) for column in zip(*lengths, strict=True))
    batch = make(prompts, outputs, budget=running + spare, running=running)
    computed: list[tuple[int, int]] = []
    all_started: list[int] = []
    all_finished: list[int] = []
    while (step := batch.begin_step()) is not None:
        assert 0 < step.num_tokens <= running + spare
        assert batch.num_running <= running
        computed += zip(step.requests_n.tolist(), step.positions_n.tolist(), strict=True)
        computed += [(c.request, c.first + i) for c in step.chunks for i in range(c.num_tokens)]
        started, finished = batch.end_step(step)
        all_started += started
        all_finished += finished
    wanted = [(r, i) for r, (prompt, output) in enumerate(lengths) for i in range(prompt + output - 1)]
    assert sorted(computed) == wanted
    assert sorted(all_started) == sorted(all_finished) == list(range(len(lengths)))


@pytest.mark.parametrize(
    ("budget", "running", "rule"),
    [(8, 0, "max_running must be at least 1"), (3, 4, "max_batch_tokens must be at least max_running")],
)
def test_limits_that_cannot_be_kept_are_refused(budget: int, running: int, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        BatchingConfig(max_batch_tokens=budget, max_running=running)
