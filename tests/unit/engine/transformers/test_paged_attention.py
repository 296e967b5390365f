"""Our attention over pages against plain attention over each sequence's own keys."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeless.engine.transformers.paged_attention import SpanPlan, paged_attention_forward, plan_attention

PAGE, HEAD = 4, 8
NUM_PAGES = 200
TRASH = 0


class FakeAllocator:
    """One layer's pages: keys and values by slot, pages in no order."""

    def __init__(self, num_kv_heads: int, window: int | None, seed: int) -> None:
        self.index = 0
        self.tokens_per_page = PAGE
        self.block_physical_stride = PAGE
        self.read_trash_index = TRASH
        if window is not None:
            self.sliding_window = window
        self.window = window
        self.block_table: dict[str, list[int]] = {}
        # What earlier requests left behind must never be looked at. The last page takes what slid out of a window.
        self.keys = torch.full((NUM_PAGES * PAGE, num_kv_heads, HEAD), float("nan"))
        self.values = self.keys.clone()
        self.keys[TRASH] = self.values[TRASH] = 0
        self._kv_token_views = {0: (self.keys, self.values)}
        self._free = (1 + torch.randperm(NUM_PAGES - 2, generator=torch.Generator().manual_seed(seed))).tolist()

    def slot(self, request_id: str, position: int) -> int:
        place = position if self.window is None else position % self.window
        return self.block_table[request_id][place // PAGE] * PAGE + place % PAGE

    def give_pages(self, request_id: str, length: int) -> None:
        kept = length if self.window is None else min(length, self.window)
        self.block_table[request_id] = [self._free.pop() for _ in range(-(-kept // PAGE))]

    def remember(self, request_id: str, keys: Tensor, values: Tensor) -> None:
        for position in range(len(keys)):
            if self.window is None or position >= len(keys) - self.window:
                self.keys[self.slot(request_id, position)] = keys[position]
                self.values[self.slot(request_id, position)] = values[position]

    def write_index(self, spans: list[SpanPlan]) -> Tensor:
        index = []
        for span in spans:
            for position in range(span.past, span.past + span.length):
                lost = self.window is not None and position < span.past + span.length - self.window
                index.append(NUM_PAGES * PAGE - 1 if lost else self.slot(span.request_id, position))
        return torch.tensor(index)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """q (L, Hq, D) are the last L of the S tokens whose keys are k (S, Hkv, D)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * 0.3
    query = torch.arange(len(k) - len(q), len(k))[:, None]
    key = torch.arange(len(k))[None, :]
    hidden = key > query if window is None else (key > query) | (key <= query - window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", weights, v)


spans_strategy = st.lists(
    st.tuples(st.integers(0, 40), st.one_of(st.just(1), st.integers(1, 20))), min_size=1, max_size=6
)


@settings(max_examples=150, deadline=None)
@given(
    shapes=spans_strategy,
    window=st.sampled_from([None, None, 4, 7, 12]),
    num_kv_heads=st.sampled_from([1, 2, 4]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 10),
)
def test_every_sequence_attends_to_its_own_keys(
    shapes: list[tuple[int, int]], window: int | None, num_kv_heads: int, with_sinks: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    num_heads = 4
    allocator = FakeAllocator(num_kv_heads, window, seed)
    spans = [SpanPlan(str(n), past, length) for n, (past, length) in enumerate(shapes)]
    sinks = random(num_heads) if with_sinks else None
    keys = [random(span.past + span.length, num_kv_heads, HEAD) for span in spans]
    values = [random(span.past + span.length, num_kv_heads, HEAD) for span in spans]
    queries = [random(span.length, num_heads, HEAD) for span in spans]
    for n, span in enumerate(spans):
        allocator.give_pages(span.request_id, span.past + span.length)
        allocator.remember(span.request_id, keys[n][: span.past], values[n][: span.past])

    plan = plan_attention(spans, allocator, dtype=torch.float32, device=torch.device("cpu"))
    output = call(
        allocator,
        plan,
        spans,
        torch.cat(queries),
        torch.cat([k[span.past :] for k, span in zip(keys, spans, strict=True)]),
        torch.cat([v[span.past :] for v, span in zip(values, spans, strict=True)]),
        sinks,
    )

    start = 0
    for n, span in enumerate(spans):
        expected = plain_attention(queries[n], keys[n], values[n], window, sinks)
        torch.testing.assert_close(output[start : start + span.length], expected, atol=1e-5, rtol=1e-5)
        start += span.length


def call(
    allocator: FakeAllocator, plan: Any, spans: list[SpanPlan], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
) -> Tensor:
    def to_heads(x: Tensor) -> Tensor:
        return x.transpose(0, 1).unsqueeze(0)

    output, _ = paged_attention_forward(
        SimpleNamespace(layer_idx=0),  # type: ignore[arg-type]
        to_heads(q),
        to_heads(k),
        to_heads(v),
        None,
        scaling=0.3,
        s_aux=sinks,
        cache=SimpleNamespace(layer_to_allocator={0: allocator}),
        moeless_plan=[plan],
        write_index=[allocator.write_index(spans)],
    )
    return output[0]


def test_decoding_sequences_of_like_length_are_one_group_and_others_are_not_padded_to_the_longest() -> None:
    allocator = FakeAllocator(2, None, 0)
    lengths = {"a": 3, "b": 60, "c": 500, "d": 400}
    for request_id, length in lengths.items():
        allocator.block_table[request_id] = list(range(1, 2 + length // PAGE))
    spans = [SpanPlan(request_id, length - 1, 1) for request_id, length in lengths.items()]
    plan = plan_attention(spans, allocator, dtype=torch.float32, device=torch.device("cpu"))
    assert sorted((group.num_keys, len(group.cells) // group.num_keys) for group in plan.decode) == [(60, 2), (500, 2)]
    assert plan.prefill == ()


def test_a_decoding_batch_of_one_length_needs_no_mask_and_no_gather_of_queries() -> None:
    allocator = FakeAllocator(2, None, 0)
    allocator.block_table = {"a": [1, 2], "b": [3, 4]}
    spans = [SpanPlan("a", 6, 1), SpanPlan("b", 6, 1)]
    (group,) = plan_attention(spans, allocator, dtype=torch.float32, device=torch.device("cpu")).decode
    assert group.rows_N is None
    assert group.mask_N11S is None
    assert group.cells.tolist() == [4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17, 18]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_have_the_models_dtype(dtype: torch.dtype) -> None:
    allocator = FakeAllocator(2, None, 0)
    allocator.block_table = {"a": [1, 2], "b": [3, 4]}
    spans = [SpanPlan("a", 6, 1), SpanPlan("b", 3, 1), SpanPlan("a", 2, 3)]
    plan = plan_attention(spans, allocator, dtype=dtype, device=torch.device("cpu"))
    assert plan.decode[0].mask_N11S is not None
    assert plan.prefill[0].mask_QS is not None
    assert {plan.decode[0].mask_N11S.dtype, plan.prefill[0].mask_QS.dtype} == {dtype}
