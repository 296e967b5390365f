"""Sampling the next token of every sequence of a step: one batch of tensors, each row with its own parameters.

Shapes: B rows (sequences), V vocabulary, K candidates. Order of the filters, as in vLLM: logit bias and penalties,
temperature, top-k, top-p. Log-probabilities are of the unmodified distribution.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeless.core.generation import SamplingParams
from moeless.engine.transformers.randomness import stream_of, uniforms

_CDF_BLOCK = 256
_FIRST_SORTED = 1024
"""How many of the likeliest tokens are looked at for top-k and top-p before all are sorted."""


@dataclass(frozen=True, slots=True)
class RawLogprobs:
    """Log-probabilities of one sampled token: its own, and the likeliest tokens with theirs, likeliest first."""

    token_id: int
    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class RowSampler:
    """What sampling must remember of one sequence: its parameters, its position and the tokens it has generated."""

    __slots__ = (
        "_bias",
        "_counts",
        "_frequency",
        "_num_distinct",
        "_presence",
        "_slots",
        "_token_ids",
        "adjusts_logits",
        "is_plain_greedy",
        "num_logprobs",
        "position",
        "stream",
        "temperature",
        "top_k",
        "top_p",
    )

    def __init__(self, params: SamplingParams) -> None:
        self.temperature = params.temperature
        self.top_k = params.top_k
        self.top_p = params.top_p
        self.num_logprobs = params.logprobs
        self.stream = stream_of(secrets.randbits(64) if params.seed is None else params.seed)
        self.position = 0
        """Index of the token to be sampled, 0 for the first generated one."""
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        self._slots: dict[int, int] | None = {} if self._presence or self._frequency else None
        self._token_ids = np.empty(16, dtype=np.int64)
        self._counts = np.empty(16, dtype=np.float32)
        self._num_distinct = 0
        self._bias: tuple[Tensor, Tensor] | None = None
        if params.logit_bias:
            self._bias = (
                torch.tensor(list(params.logit_bias), dtype=torch.int64),
                torch.tensor(list(params.logit_bias.values()), dtype=torch.float32),
            )
        self.adjusts_logits = self._slots is not None or self._bias is not None
        self.is_plain_greedy = self.temperature == 0 and not self.adjusts_logits and self.num_logprobs is None

    def commit(self, token_id: int) -> None:
        """Note that `token_id` was generated at the current position."""
        self.position += 1
        if self._slots is None:
            return
        slot = self._slots.get(token_id)
        if slot is not None:
            self._counts[slot] += 1
            return
        slot = self._num_distinct
        if slot == len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, np.empty_like(self._token_ids)])
            self._counts = np.concatenate([self._counts, np.empty_like(self._counts)])
        self._token_ids[slot] = token_id
        self._counts[slot] = 1
        self._slots[token_id] = slot
        self._num_distinct += 1

    def adjust(self, logits_V: Tensor) -> None:
        """Add the logit bias and subtract OpenAI's penalties, in place:
        presence x [generated before] + frequency x times generated."""
        if self._bias is not None:
            token_ids, bias = self._bias
            logits_V.index_add_(0, token_ids.to(logits_V.device), bias.to(logits_V.device))
        if self._num_distinct:
            n = self._num_distinct
            penalty = self._counts[:n] * -self._frequency - self._presence
            logits_V.index_add_(
                0,
                torch.from_numpy(self._token_ids[:n]).to(logits_V.device),
                torch.from_numpy(penalty.astype(np.float32, copy=False)).to(logits_V.device),
            )


def sample(logits_BV: Tensor, rows: Sequence[RowSampler]) -> tuple[Tensor, list[RawLogprobs | None] | None]:
    """The next token of every row.

    Args:
        logits_BV: float32, row b belongs to `rows[b]`; left as it is.
    Returns: token ids (B,) int64 on the logits' device, and the log-probabilities of the rows that ask for them
        (None if no row does).
    """
    for row in rows:
        if not row.is_plain_greedy:
            break
    else:
        return _argmax(logits_BV), None

    scores_BV = logits_BV
    if any(row.adjusts_logits for row in rows):
        scores_BV = logits_BV.clone()
        for scores_V, row in zip(scores_BV, rows, strict=True):
            if row.adjusts_logits:
                row.adjust(scores_V)

    drawn = [b for b, row in enumerate(rows) if row.temperature > 0]
    if len(drawn) == len(rows):
        tokens_B = _draw(scores_BV, rows)
    else:
        tokens_B = _argmax(scores_BV)
        if drawn:
            index = torch.tensor(drawn, device=scores_BV.device)
            tokens_B[index] = _draw(scores_BV[index], [rows[b] for b in drawn])

    wanted = [b for b, row in enumerate(rows) if row.num_logprobs is not None]
    return tokens_B, _logprobs(logits_BV, tokens_B, rows, wanted) if wanted else None


def _argmax(scores_BV: Tensor) -> Tensor:
    if scores_BV.device.type == "cpu":
        # numpy's is vectorised, torch's is not: 10 to 50 times as fast.
        return torch.from_numpy(scores_BV.numpy().argmax(axis=-1))
    return scores_BV.argmax(dim=-1)


def _draw(scores_BV: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    """Sample every row at its temperature, its uniform number put through the inverse of its distribution."""
    device = scores_BV.device
    temperature_B1 = torch.tensor([row.temperature for row in rows], dtype=torch.float32, device=device).unsqueeze(1)
    uniform_B = torch.from_numpy(
        uniforms(
            np.array([row.stream for row in rows], dtype=np.uint64),
            np.array([row.position for row in rows], dtype=np.uint64),
        )
    ).to(device)
    # The maximum is taken off before the division, so that a tiny temperature cannot overflow.
    weights_BV = (scores_BV - scores_BV.amax(dim=-1, keepdim=True)).div_(temperature_B1).exp_()

    vocab_size = scores_BV.shape[-1]
    filtered = [b for b, row in enumerate(rows) if row.top_p < 1 or 0 < row.top_k < vocab_size]
    if filtered:
        index = torch.tensor(filtered, device=device)
        weights_BV[index] = _filter(weights_BV[index], [rows[b] for b in filtered])
    return _invert_blocked(weights_BV, uniform_B)


def _invert_blocked(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Index at which the cumulated weights pass `uniform` of their total.

    In two levels (sums of blocks, then one block): a running sum over the whole vocabulary costs several times as
    much as the softmax.
    """
    batch, vocab_size = weights_BV.shape
    if vocab_size % _CDF_BLOCK:
        weights_BV = torch.nn.functional.pad(weights_BV, (0, _CDF_BLOCK - vocab_size % _CDF_BLOCK))
    blocks = weights_BV.view(batch, -1, _CDF_BLOCK)
    ends = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    target_B1 = (uniform_B * ends[:, -1]).unsqueeze(1)
    block_B1 = torch.searchsorted(ends, target_B1, right=True).clamp_(max=ends.shape[1] - 1)
    inside = blocks.gather(1, block_B1.unsqueeze(-1).expand(-1, -1, _CDF_BLOCK)).squeeze(1)
    inside_ends = inside.cumsum(dim=-1, dtype=torch.float64)
    before_B1 = ends.gather(1, block_B1) - inside_ends[:, -1:]
    offset_B1 = torch.searchsorted(inside_ends, target_B1 - before_B1, right=True)
    # Rounding may push the target past the block's end; the last token with any weight is then the right one.
    last_B1 = _CDF_BLOCK - 1 - (inside > 0).flip(-1).int().argmax(dim=-1, keepdim=True)
    return (block_B1 * _CDF_BLOCK + torch.minimum(offset_B1, last_B1)).squeeze(1)


def _filter(weights_NV: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    """Set to zero what top-k and top-p leave out. Tokens that tie with the last one kept are kept too."""
    vocab_size = weights_NV.shape[1]
    totals_N = weights_NV.sum(dim=-1).tolist()
    thresholds: list[float | None] = [None] * len(rows)
    for num_sorted in (_FIRST_SORTED, vocab_size):
        pending = [n for n, threshold in enumerate(thresholds) if threshold is None]
        if not pending:
            break
        candidates = weights_NV if len(pending) == len(rows) else weights_NV[pending]
        largest_NK = _largest(candidates, min(num_sorted, vocab_size))
        for n, largest_K in zip(pending, largest_NK, strict=True):
            thresholds[n] = _threshold(largest_K, rows[n], total=totals_N[n], is_all=num_sorted >= vocab_size)
    thresholds_N1 = torch.tensor(thresholds, dtype=torch.float32, device=weights_NV.device).unsqueeze(1)
    return weights_NV.masked_fill(weights_NV < thresholds_N1, 0.0)


def _largest(weights_NV: Tensor, count: int) -> NDArray[np.float32]:
    """The `count` largest of each row, in descending order, (N, count)."""
    if weights_NV.device.type != "cpu":
        found: NDArray[np.float32] = weights_NV.topk(count, dim=-1).values.cpu().numpy()
        return found
    # numpy's sort and partition are 4 to 25 times as fast as torch's on a CPU.
    values = weights_NV.numpy()
    if count < values.shape[1]:
        values = np.partition(values, values.shape[1] - count, axis=-1)[:, -count:]
    return np.sort(values, axis=-1)[:, ::-1]


def _threshold(largest_K: NDArray[np.float32], row: RowSampler, *, total: float, is_all: bool) -> float | None:
    """The smallest weight that top-k and top-p keep, or None if it is not among the `largest_K`."""
    top_k = row.top_k or None
    if top_k is not None and top_k > len(largest_K) and not is_all:
        return None
    kept = largest_K[:top_k]
    num_kept = len(kept)
    if row.top_p < 1:
        ends = kept.cumsum(dtype=np.float64)
        mass = row.top_p * (total if top_k is None and not is_all else ends[-1])
        if ends[-1] < mass:
            return None
        num_kept = int(np.searchsorted(ends, mass)) + 1
    return float(kept[num_kept - 1])


def _logprobs(
    logits_BV: Tensor, tokens_B: Tensor, rows: Sequence[RowSampler], wanted: list[int]
) -> list[RawLogprobs | None]:
    index = torch.tensor(wanted, device=logits_BV.device)
    logprobs_NV = logits_BV[index].log_softmax(dim=-1)
    tokens_N1 = tokens_B[index].unsqueeze(1)
    own = logprobs_NV.gather(1, tokens_N1).squeeze(1).tolist()
    most = min(max(rows[b].num_logprobs or 0 for b in wanted), logits_BV.shape[1])
    top_values, top_ids = logprobs_NV.topk(most, dim=-1)
    values, ids = top_values.tolist(), top_ids.tolist()
    result: list[RawLogprobs | None] = [None] * len(rows)
    for n, b in enumerate(wanted):
        count = rows[b].num_logprobs or 0
        result[b] = RawLogprobs(int(tokens_N1[n, 0]), own[n], ids[n][:count], values[n][:count])
    return result
