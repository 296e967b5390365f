"""Checks what hooks.py relies on in transformers. A failure here names what a new version has changed."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Iterator

import pytest
import torch
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching import continuous_api, model_runner, requests, scheduler
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from moeless.engine.text import TokenTexts
from moeless.engine.transformers.hooks import PagedBatcher, SequenceState, kv_bytes_per_token
from moeless.engine.transformers.sampling import Sampled
from moeless.engine.transformers.sequence import Sequence
from tests.families import make_tokenizer
from tests.unit.engine.support import eager_model, prompt_of, request

MODEL = eager_model("gpt_oss")
TEXTS = TokenTexts(make_tokenizer())


@pytest.fixture
def batcher() -> Iterator[PagedBatcher]:
    config = ContinuousBatchingConfig(
        page_size=4,
        num_blocks=64,
        max_batch_tokens=16,
        max_requests_per_batch=4,
        max_blocks_per_request=0,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,
    )
    batcher = PagedBatcher(MODEL, config)
    with torch.inference_mode():
        yield batcher
    batcher.close()


def sequence(request_id: str, length: int, max_tokens: int = 5) -> Sequence:
    return Sequence(request(request_id, prompt_of(length), max_tokens=max_tokens), eos_ids=frozenset(), texts=TEXTS)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (continuous_api.ContinuousBatchingManager.switch_to_cb_friendly_attn, ["model", "auto_switch_to_flash"]),
        (continuous_api.ContinuousBatchingManager._create_batch_processor, []),
        (continuous_api.ContinuousBatchProcessor.prepare_next_batch, []),
        (continuous_api.ContinuousBatchProcessor._generation_step, ["model"]),
        (continuous_api.ContinuousBatchProcessor.update_batch, []),
        (continuous_api.OutputRouter.deliver_batch, ["outputs"]),
        (model_runner.ModelRunner.compute_batch, ["model", "batch_data"]),
        (model_runner.ModelRunner._sample, ["scores", "output_ids"]),
        (requests.RequestState.update_and_check_completion, ["token_id", "logprob"]),
        (requests.RequestState.to_generation_output, []),
        (requests.RequestState.create_equivalent_initial_request, []),
        (PagedAttentionCache.search_prefix_match, ["request_id", "prompt_ids"]),
        (PagedAttentionCache.count_new_complete_blocks, ["state", "request_len"]),
        (PagedAttentionCache.free_blocks, ["request_id", "no_cache"]),
        (
            PagedAttentionCache.extend_read_and_write_indices,
            ["request_id", "past_length", "query_length", "read_index", "write_index"],
        ),
        (scheduler.Scheduler.add_waiting_request, ["state"]),
        (scheduler.Scheduler.set_request_cancellation, ["request_id"]),
        (scheduler.Scheduler.clear_cancelled_requests, []),
    ],
)
def test_what_is_overridden_or_called_takes_the_same_arguments(function: object, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == ["self", *parameters]  # type: ignore[arg-type]


def test_a_requests_state_has_the_fields_we_set_and_read() -> None:
    fields = {field.name for field in dataclasses.fields(requests.RequestState)}
    used = {"request_id", "initial_tokens", "max_new_tokens", "streaming", "generated_tokens", "tokens_to_process"}
    assert used | {"position_offset", "num_children"} <= fields


def test_the_allocators_have_what_the_attention_reads(batcher: PagedBatcher) -> None:
    allocators = batcher._cache.cache_allocators
    assert list(allocators) == ["sliding_attention", "full_attention"]
    assert [allocator.index for allocator in allocators.values()] == [0, 1]
    for allocator in allocators.values():
        assert allocator.tokens_per_page == 4
        assert allocator.block_physical_stride == 2 * 4 * len(allocator.layer_indices)
        assert allocator.block_table == {}
        assert set(allocator._kv_token_views) == set(allocator.layer_indices)
        # The padding of our reads: nothing ever writes there.
        assert allocator.read_trash_index == 0
        assert allocator.read_trash_index != allocator.write_trash_index
    assert allocators["sliding_attention"].sliding_window == 8


def test_inputs_have_what_sampling_and_planning_read(batcher: PagedBatcher) -> None:
    ios = batcher._processor.inputs_and_outputs
    assert ios.compute_stream is None  # on a CPU
    assert (ios.model_dtype, ios.device) == (torch.float32, torch.device("cpu"))
    batcher.add(sequence("r", 20))
    batcher.step()
    (future,) = ios.requests_in_batch
    assert (future.has_new_token, future.query_length, future.state.position_offset) == (False, 16, 16)


def test_making_a_batcher_starts_no_thread() -> None:
    before = threading.active_count()
    batcher = PagedBatcher(MODEL, ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=8, use_cuda_graph=False))
    assert threading.active_count() == before
    batcher.close()


def test_a_step_gives_one_delta_for_each_sequence_with_a_token(batcher: PagedBatcher) -> None:
    batcher.add(sequence("short", 3))
    batcher.add(sequence("long", 30))
    # 16 tokens a step: the long prompt takes three, the short one decodes beside it.
    steps = []
    while batcher.has_work():
        steps.append([delta.request_id for delta in batcher.step()])
    assert steps[:3] == [["short"], ["short"], ["short", "long"]]
    assert sum(step.count("short") for step in steps) == 5
    assert sum(step.count("long") for step in steps) == 5
    assert batcher.num_active == 0
    assert batcher.free_share() == 1


def test_an_end_frees_the_pages_within_the_step(batcher: PagedBatcher) -> None:
    batcher.add(sequence("r", 6, max_tokens=2))
    batcher.step()
    assert batcher.free_share() < 1
    (delta,) = batcher.step()
    assert delta.finish_reason == "length"
    assert batcher.free_share() == 1


def test_a_soft_reset_request_keeps_its_sequence_and_its_tokens() -> None:
    ours = sequence("r", 6, max_tokens=9)
    state = SequenceState.of(ours)
    state.status = requests.RequestStatus.DECODING
    state.sampled = Sampled([40])
    assert not state.update_and_check_completion(40, None)
    successor = state.create_equivalent_initial_request()
    assert successor.sequence is ours
    assert successor.initial_tokens == [*prompt_of(6), 40]
    assert successor.remaining_prefill_tokens == successor.initial_tokens


def test_a_failure_before_a_batch_is_made_fails_what_has_begun(
    batcher: PagedBatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, waiting = sequence("begun", 3), sequence("waiting", 3)
    batcher.add(begun)
    batcher.step()
    batcher.add(waiting)
    with monkeypatch.context() as patch:
        patch.setattr(batcher._scheduler, "schedule_batch", lambda *budgets: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            batcher.step()
        assert batcher.fail_batch() == [begun]
        with pytest.raises(ZeroDivisionError):
            batcher.step()
        assert batcher.fail_batch() == [waiting]
    assert not batcher.has_work()
    assert batcher.free_share() == 1


def test_bytes_of_a_token_are_those_of_the_cache(batcher: PagedBatcher) -> None:
    pages = batcher._cache.num_sectors * batcher._cache.bytes_per_sector
    assert kv_bytes_per_token(MODEL) * 4 * batcher.num_blocks == pages
