"""Attention over transformers' paged KV cache, each sequence against its own keys only.

transformers' own CPU path packs a batch into one row and hides the other sequences' keys with a mask, so B decoding
sequences cost B times the work. Here the sequences that decode are gathered into a padded batch (in groups of
similar length), and the ones that prefill are computed one by one. No mask over the whole cache is needed either.

Shapes: Q query tokens of the step, N sequences of a group, S keys, Hq and Hkv heads, G = Hq / Hkv, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "moeless_paged"

_MIN_GROUP_KEYS = 64
"""Sequences shorter than this share a group: the padding costs less than another call."""


_CHANGES_SCORES = ("softcap", "position_bias")
"""Arguments of transformers' attention interface that would change the result, were they given."""


@dataclass(frozen=True, slots=True)
class SpanPlan:
    """A sequence of the step, as the scheduler made it."""

    request_id: str
    past: int
    """Tokens in the cache before the step."""
    length: int
    """Tokens of the step."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one new token each, which is in the cache by the time they are computed."""

    rows_N: Tensor | None
    """Their query tokens; None when they are all of the step's, in order."""
    cells: Tensor
    """(N * S,) where their keys are in the cache, padded."""
    mask_N11S: Tensor | None
    """0 for keys and -inf for padding; None without padding."""
    num_keys: int


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """A sequence with several new tokens."""

    start: int
    stop: int
    past_cells: Tensor | None
    """Cells of the keys before the new ones; None if there are none. Read before the new ones are written, which
    may take their place in a sliding window."""
    mask_QS: Tensor | None
    """None when plain causality over the new tokens is all."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Work of the layers of one attention type in one step."""

    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillSpan, ...]


def plan_attention(
    spans: Sequence[SpanPlan], allocator: Any, *, dtype: torch.dtype, device: torch.device
) -> AttentionPlan:
    """Args:
    spans: in the order of their query tokens.
    allocator: transformers' cache allocator of the attention type; holds each request's pages already.
    """
    window: int | None = getattr(allocator, "sliding_window", None)
    starts = np.cumsum([0, *(span.length for span in spans)])
    prefill = tuple(
        _plan_prefill(span, int(start), allocator, window, dtype, device)
        for span, start in zip(spans, starts, strict=False)
        if span.length > 1
    )
    decoding = [(span, int(start)) for span, start in zip(spans, starts, strict=False) if span.length == 1]
    decode: list[DecodeGroup] = []
    lengths = [span.past + 1 if window is None else min(span.past + 1, window) for span, _ in decoding]
    for members in _group_by_length(lengths):
        every = len(members) == len(spans)
        if every:
            members = sorted(members)
        table, valid = _cell_table(
            [decoding[i][0].request_id for i in members], [lengths[i] for i in members], allocator
        )
        mask = None
        if not valid.all():
            mask = torch.zeros(valid.shape, dtype=dtype).masked_fill_(~torch.from_numpy(valid), float("-inf"))
            mask = mask[:, None, None, :].to(device)
        decode.append(
            DecodeGroup(
                rows_N=None if every else torch.tensor([decoding[i][1] for i in members], device=device),
                cells=torch.from_numpy(table.reshape(-1)).to(device),
                mask_N11S=mask,
                num_keys=table.shape[1],
            )
        )
    return AttentionPlan(tuple(decode), prefill)


def _group_by_length(lengths: list[int]) -> list[list[int]]:
    """Indices in groups whose longest is at most twice the shortest, or at most _MIN_GROUP_KEYS."""
    groups: list[list[int]] = []
    limit = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if lengths[i] > limit:
            groups.append([])
            limit = max(2 * lengths[i], _MIN_GROUP_KEYS)
        groups[-1].append(i)
    return groups


def _cell_table(
    request_ids: list[str], lengths: list[int], allocator: Any
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The cache cells of each request's first tokens, padded to the longest, and which are not padding.

    The padding is transformers' read trash, which stays zero: what a finished request left in a page could be NaN.
    """
    page_size: int = allocator.tokens_per_page
    num_pages = -(-max(lengths) // page_size)
    pages = np.zeros((len(request_ids), num_pages), dtype=np.int64)
    for row, request_id in enumerate(request_ids):
        blocks = allocator.block_table[request_id][:num_pages]
        pages[row, : len(blocks)] = blocks
    pages *= allocator.block_physical_stride
    cells = (pages[:, :, None] + np.arange(page_size)).reshape(len(request_ids), -1)
    cells = cells[:, : max(lengths)]
    valid = np.arange(cells.shape[1]) < np.array(lengths)[:, None]
    return np.where(valid, cells, allocator.read_trash_index), valid


def _plan_prefill(
    span: SpanPlan, start: int, allocator: Any, window: int | None, dtype: torch.dtype, device: torch.device
) -> PrefillSpan:
    num_past = span.past if window is None else min(span.past, window - 1)
    past_cells = None
    if num_past:
        positions = np.arange(span.past - num_past, span.past)
        cells, _ = _cell_table([span.request_id], [span.past if window is None else min(span.past, window)], allocator)
        past_cells = torch.from_numpy(cells[0, positions if window is None else positions % window]).to(device)
    mask = None
    if num_past or (window is not None and span.length > window):
        query = torch.arange(num_past, num_past + span.length)[:, None]
        key = torch.arange(num_past + span.length)[None, :]
        hidden = key > query
        if window is not None:
            hidden |= key <= query - window
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).to(device)
    return PrefillSpan(start, start + span.length, past_cells, mask)


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query (1, Hq, Q, D), key and value (1, Hkv, Q, D) → (1, Q, Hq, D).

    `s_aux` holds gpt-oss's attention sinks, (Hq,).
    """
    cache, layer = kwargs.get("cache"), module.layer_idx
    if cache is None:
        raise ValueError(f"attention {NAME!r} must be given a paged cache: the model belongs to a running engine")
    changed = [name for name in _CHANGES_SCORES if kwargs.get(name) is not None]
    if attention_mask is not None or changed:
        raise NotImplementedError(f"attention {NAME!r} knows causal and sliding attention, not {changed or 'a mask'}")
    allocator = cache.layer_to_allocator[layer]
    plan: AttentionPlan = kwargs["moeless_plan"][allocator.index]
    write_index = kwargs["write_index"][allocator.index]
    keys_SHD, values_SHD = allocator._kv_token_views[layer]
    new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)

    pasts = [
        None
        if span.past_cells is None
        else (keys_SHD.index_select(0, span.past_cells), values_SHD.index_select(0, span.past_cells))
        for span in plan.prefill
    ]
    keys_SHD.index_copy_(0, write_index, new_keys)
    values_SHD.index_copy_(0, write_index, new_values)

    query_QHD = query[0].transpose(0, 1)
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    if len(plan.decode) == 1 and plan.decode[0].rows_N is None:
        return _decode(query_QHD, keys_SHD, values_SHD, plan.decode[0], scaling, s_aux)[None], None

    output_QHD = query.new_empty(query.shape[2], num_heads, value.shape[-1])
    for group in plan.decode:
        output_QHD[group.rows_N] = _decode(query_QHD[group.rows_N], keys_SHD, values_SHD, group, scaling, s_aux)
    for span, past in zip(plan.prefill, pasts, strict=True):
        k, v = new_keys[span.start : span.stop], new_values[span.start : span.stop]
        if past is not None:
            k, v = torch.cat([past[0], k]), torch.cat([past[1], v])
        q_HQD = query[0, :, span.start : span.stop]
        k_HSD, v_HSD = k.transpose(0, 1), v.transpose(0, 1)
        if num_heads != num_kv_heads:
            k_HSD = k_HSD.repeat_interleave(num_heads // num_kv_heads, dim=0)
            v_HSD = v_HSD.repeat_interleave(num_heads // num_kv_heads, dim=0)
        if s_aux is None:
            out = scaled_dot_product_attention(
                q_HQD[None],
                k_HSD[None],
                v_HSD[None],
                attn_mask=span.mask_QS,
                is_causal=span.mask_QS is None,
                scale=scaling,
            )[0]
        else:
            mask = span.mask_QS
            if mask is None:
                mask = torch.full((q_HQD.shape[1],) * 2, float("-inf"), dtype=q_HQD.dtype, device=q_HQD.device).triu_(1)
            out = _attend_with_sinks(q_HQD, k_HSD, v_HSD, mask, scaling, s_aux[:, None, None])
        output_QHD[span.start : span.stop] = out.transpose(0, 1)
    return output_QHD[None], None


def _decode(
    query_NHD: Tensor, keys: Tensor, values: Tensor, group: DecodeGroup, scaling: float | None, sinks: Tensor | None
) -> Tensor:
    """One query token for each sequence of the group. The heads that share keys are one matrix, so that grouped
    queries need no copies of the keys."""
    num_rows, num_heads, head_size = query_NHD.shape
    num_kv_heads = keys.shape[1]
    shape = (num_rows, group.num_keys, num_kv_heads, -1)
    k_NHSD = keys.index_select(0, group.cells).view(shape).transpose(1, 2)
    v_NHSD = values.index_select(0, group.cells).view(shape).transpose(1, 2)
    q_NHGD = query_NHD.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_size)
    if sinks is None:
        out = scaled_dot_product_attention(q_NHGD, k_NHSD, v_NHSD, attn_mask=group.mask_N11S, scale=scaling)
    else:
        sinks = sinks.view(num_kv_heads, -1, 1)
        out = _attend_with_sinks(q_NHGD, k_NHSD, v_NHSD, group.mask_N11S, scaling, sinks)
    return out.reshape(num_rows, num_heads, -1)


def _attend_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, sinks: Tensor
) -> Tensor:
    """Softmax with one more logit per head that takes probability and gives nothing (gpt-oss)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = torch.matmul(query, key.transpose(-2, -1)) * scale
    if mask is not None:
        logits = logits + mask
    sinks = sinks.to(logits.dtype).expand(*logits.shape[:-1], 1)
    weights = torch.cat([logits, sinks], dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :-1]
    return torch.matmul(weights.to(value.dtype), value)


def register_attention() -> None:
    """Make `NAME` known to transformers. May be called again."""
    AttentionInterface.register(NAME, paged_attention_forward)
