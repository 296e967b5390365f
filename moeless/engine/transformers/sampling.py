"""Sampling the next token of every sequence of a step: one batch of tensors, each row with its own parameters.

By Gumbel-max: the token with the largest logit + temperature x noise, the noise a function of (seed, position, token)
alone. That is sampling from the softmax, and logits that differ in their last bits give another token only where two
are as good as tied, as with greedy decoding.

Order of the steps, as in vLLM: logit bias and penalties, temperature, min-p, top-k, top-p. Log-probabilities are of the
unmodified distribution. A row that fails, or whose logits are not finite, gets an error; the others their tokens.

Shapes: B rows (sequences), N some of them, V vocabulary, K candidates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeless.engine.transformers.randomness import (
    MAX_GUMBEL,
    MIN_GUMBEL,
    keys_of,
    negative_gumbel,
    negative_gumbel_on_device,
    random_bits,
    random_bits_on_device,
)
from moeless.engine.transformers.row_sampler import RowSampler

logger = logging.getLogger(__name__)

_FIRST_SORTED = 1024
"""Number of the likeliest tokens tried for top-k and top-p before all are sorted."""
_MAX_TEMPERATURE = 1e30
_MIN_TEMPERATURE = 1e-30
"""Bounds within which float32 divides differences of logits; below the lower one sampling is greedy."""
_BLOCK_NUMBERS = 1 << 16
"""Number of tokens whose noise is made at a time: it stays in the core's cache."""


@dataclass(frozen=True, slots=True)
class RawLogprobs:
    """Log-probabilities of one token: its own, and the likeliest tokens with theirs, likeliest first."""

    token_id: int
    logprob: float
    rank: int
    """1 for the likeliest token."""
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class Sampled:
    """Results of a step's rows."""

    token_ids: list[int]
    """In the vocabulary, also where a row has an error and its token means nothing."""
    logprobs: list[RawLogprobs | None] | None = None
    """None if no row wants any."""
    errors: dict[int, str] = field(default_factory=dict)
    """Row → why it has no token."""


class Vocabulary:
    """The ids that may be sampled: a model's output can be wider than its tokenizer (padding to a round size)."""

    def __init__(self, token_ids: Iterable[int], num_logits: int) -> None:
        """Args:
        token_ids: ids that stand for a token; those outside [0, num_logits) are ignored.
        num_logits: width of the model's output.
        """
        known = sorted({token_id for token_id in token_ids if 0 <= token_id < num_logits})
        self._size = known[-1] + 1 if known else num_logits
        self._holes = torch.tensor(sorted(set(range(self._size)).difference(known)) if known else [], dtype=torch.int64)

    def restrict(self, logits_BV: Tensor) -> Tensor:
        """The logits without ids that stand for no token: a view, or a copy where there are holes."""
        logits_BV = logits_BV[:, : self._size]
        if not self._holes.numel():
            return logits_BV
        holes = self._holes[self._holes < logits_BV.shape[1]]
        return logits_BV.index_fill(1, holes.to(logits_BV.device), float("-inf"))


def sample(logits_BV: Tensor, rows: Sequence[RowSampler], vocabulary: Vocabulary | None = None) -> Sampled:
    """The next token of every row. Never raises for what one row does; that row gets an error.

    Args:
        logits_BV: float32, row b belongs to `rows[b]`; left as it is.
        vocabulary: None allows every id.
    """
    try:
        return _sample(logits_BV, rows, vocabulary)
    except Exception as error:
        if len(rows) == 1:
            logger.exception("sampling failed error=%s", error)
            return Sampled([0], [None], {0: f"sampling failed: {type(error).__name__}: {error}"})
    alone = [sample(logits_BV[b : b + 1], [row], vocabulary) for b, row in enumerate(rows)]
    return Sampled(
        [each.token_ids[0] for each in alone],
        [each.logprobs[0] if each.logprobs is not None else None for each in alone],
        {b: each.errors[0] for b, each in enumerate(alone) if each.errors},
    )


def _sample(logits_BV: Tensor, rows: Sequence[RowSampler], vocabulary: Vocabulary | None) -> Sampled:
    scores_BV = logits_BV if vocabulary is None else vocabulary.restrict(logits_BV)
    if any(row.adjusts_logits for row in rows):
        scores_BV = scores_BV.clone()
        for scores_V, row in zip(scores_BV, rows, strict=True):
            if row.adjusts_logits:
                row.adjust(scores_V)
    max_B, tokens_B = _max(scores_BV)
    is_finite_B = np.isfinite(max_B)
    errors = {
        b: f"the model's logits for generated token {rows[b].position} are not finite (largest: {max_B[b]})"
        for b in np.flatnonzero(~is_finite_B).tolist()
    }
    drawn = [b for b, row in enumerate(rows) if row.temperature > 0 and is_finite_B[b]]
    if drawn:
        is_all = len(drawn) == len(rows)
        chosen = scores_BV if is_all else scores_BV[torch.tensor(drawn, device=scores_BV.device)]
        tokens_B[drawn] = _draw(chosen, [rows[b] for b in drawn], max_B[drawn])
    token_ids: list[int] = tokens_B.tolist()
    for b in errors:
        token_ids[b] = 0
    wanted = [b for b, row in enumerate(rows) if row.num_logprobs is not None and b not in errors]
    if not wanted:
        return Sampled(token_ids, errors=errors)
    index = torch.tensor(wanted, device=logits_BV.device)
    found = raw_logprobs(logits_BV[index], [token_ids[b] for b in wanted], [rows[b].num_logprobs or 0 for b in wanted])
    logprobs: list[RawLogprobs | None] = [None] * len(rows)
    for b, raw in zip(wanted, found, strict=True):
        logprobs[b] = raw
        if not math.isfinite(raw.logprob):
            errors[b] = f"the log-probability of generated token {rows[b].position} is not finite ({raw.logprob})"
    return Sampled(token_ids, logprobs, errors)


def raw_logprobs(logits_NV: Tensor, token_ids: Sequence[int], nums_top: Sequence[int]) -> list[RawLogprobs]:
    """The log-probabilities of a token in each row, its rank, and the row's likeliest tokens.

    Args:
        logits_NV: float32.
        nums_top: how many of the likeliest tokens each row gets.
    """
    logprobs_NV = logits_NV.log_softmax(dim=-1)
    own_N1 = logprobs_NV.gather(1, torch.tensor(token_ids, device=logits_NV.device).unsqueeze(1))
    ranks = ((logprobs_NV > own_N1).sum(dim=-1) + 1).tolist()
    own = own_N1.squeeze(1).tolist()
    top_values, top_ids = logprobs_NV.topk(min(max(nums_top), logits_NV.shape[1]), dim=-1)
    values, ids = top_values.tolist(), top_ids.tolist()
    return [
        RawLogprobs(token_ids[n], own[n], ranks[n], ids[n][:count], values[n][:count])
        for n, count in enumerate(nums_top)
    ]


def _max(scores_BV: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Each row's largest score, NaN if there is one, and where it is."""
    if scores_BV.device.type == "cpu":
        # numpy's argmax is vectorised, torch's is not: 10 to 50 times as fast.
        scores = scores_BV.numpy()
        tokens_B: NDArray[np.int64] = scores.argmax(axis=-1)
        return scores[np.arange(len(scores)), tokens_B], tokens_B
    values, tokens = scores_BV.max(dim=-1)
    return values.cpu().numpy(), tokens.cpu().numpy()


def _draw(scores_BV: Tensor, rows: Sequence[RowSampler], max_B: NDArray[np.float32]) -> NDArray[np.int64]:
    """Sample every row at its temperature. All rows' largest scores are finite."""
    keys_2B = keys_of(
        np.array([row.stream for row in rows], dtype=np.uint64),
        np.array([row.position for row in rows], dtype=np.uint64),
    )
    temperature_B = np.clip([row.temperature for row in rows], _MIN_TEMPERATURE, _MAX_TEMPERATURE).astype(np.float32)
    floor_B = _floors(scores_BV, rows, max_B, temperature_B)
    if scores_BV.device.type != "cpu":
        return _argmax_with_noise_on_device(scores_BV, keys_2B, temperature_B, floor_B)
    scores, vocab_size = scores_BV.numpy(), scores_BV.shape[1]
    tokens_B = np.empty(len(rows), dtype=np.int64)
    is_sparse_B = floor_B > max_B - temperature_B * np.float32(MAX_GUMBEL - MIN_GUMBEL)
    dense = np.flatnonzero(~is_sparse_B)
    num_rows = max(1, _BLOCK_NUMBERS // vocab_size)
    token_ids_V = np.arange(vocab_size, dtype=np.uint32)
    for start in range(0, len(dense), num_rows):
        block = dense[start : start + num_rows]
        noise = negative_gumbel(random_bits(token_ids_V, keys_2B[:, block, None]))
        noise *= -temperature_B[block, None]
        noise += scores[block] if len(block) < len(scores) else scores
        tokens_B[block] = noise.argmax(axis=-1)
    sparse = np.flatnonzero(is_sparse_B)
    if len(sparse):
        tokens_B[sparse] = _argmax_of_few(scores[sparse], keys_2B[:, sparse], temperature_B[sparse], floor_B[sparse])
    return tokens_B


def _argmax_of_few(
    scores_NV: NDArray[np.float32],
    keys_2N: NDArray[np.uint32],
    temperature_N: NDArray[np.float32],
    floor_N: NDArray[np.float32],
) -> NDArray[np.int64]:
    """Add noise to the scores that reach the row's floor only."""
    rows_C, tokens_C = np.divmod(np.flatnonzero(scores_NV >= floor_N[:, None]), scores_NV.shape[1])
    noise_C = negative_gumbel(random_bits(tokens_C.astype(np.uint32), keys_2N[:, rows_C]))
    noise_C *= -temperature_N[rows_C]
    noise_C += scores_NV[rows_C, tokens_C]
    starts = np.searchsorted(rows_C, np.arange(len(scores_NV) + 1))
    best = [int(start) + int(noise_C[start:stop].argmax()) for start, stop in pairwise(starts)]
    chosen: NDArray[np.int64] = tokens_C[best]
    return chosen


def _argmax_with_noise_on_device(
    scores_BV: Tensor, keys_2B: NDArray[np.uint32], temperature_B: NDArray[np.float32], floor_B: NDArray[np.float32]
) -> NDArray[np.int64]:
    """The same on an accelerator, over all tokens at once."""
    device = scores_BV.device
    token_ids_V = torch.arange(scores_BV.shape[1], dtype=torch.int32, device=device)
    noise_BV = negative_gumbel_on_device(random_bits_on_device(token_ids_V, keys_2B))
    noise_BV.mul_(torch.from_numpy(-temperature_B).to(device).unsqueeze(1)).add_(scores_BV)
    noise_BV.masked_fill_(scores_BV < torch.from_numpy(floor_B).to(device).unsqueeze(1), float("-inf"))
    tokens_B: NDArray[np.int64] = noise_BV.argmax(dim=-1).cpu().numpy()
    return tokens_B


def _floors(
    scores_BV: Tensor, rows: Sequence[RowSampler], max_B: NDArray[np.float32], temperature_B: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The smallest score of each row that min-p, top-k and top-p keep; -inf where they keep all.

    Tokens that tie with the last one kept are kept too.
    """
    vocab_size = scores_BV.shape[1]
    floor_B = np.array(
        [
            high + temperature * np.float32(math.log(row.min_p)) if row.min_p > 0 else -np.inf
            for row, high, temperature in zip(rows, max_B, temperature_B, strict=True)
        ],
        dtype=np.float32,
    )
    pending = [b for b, row in enumerate(rows) if row.top_p < 1 or 0 < row.top_k < vocab_size]
    for num_sorted in (_FIRST_SORTED, vocab_size):
        if not pending:
            break
        scores_NV = scores_BV if len(pending) == len(rows) else scores_BV[pending]
        largest_NK = _largest(scores_NV, min(num_sorted, vocab_size))
        high_N1, temperature_N1 = max_B[pending, None], temperature_B[pending, None]
        weights_NK = np.exp((largest_NK - high_N1) / temperature_N1)
        is_all = num_sorted >= vocab_size
        totals: list[float] | None = None
        if not is_all and any(rows[b].top_p < 1 and not rows[b].top_k for b in pending):
            totals = _total_weights(scores_NV, high_N1, temperature_N1, floor_B[pending, None])
        left = []
        for n, b in enumerate(pending):
            total = None if totals is None else totals[n]
            found = _smallest_kept(largest_NK[n], weights_NK[n], rows[b], float(floor_B[b]), total, is_all=is_all)
            if found is None:
                left.append(b)
            else:
                floor_B[b] = max(floor_B[b], found)
        pending = left
    return floor_B


def _total_weights(
    scores_NV: Tensor, high_N1: NDArray[np.float32], temperature_N1: NDArray[np.float32], floor_N1: NDArray[np.float32]
) -> list[float]:
    """Sums of the softmax before it is normalised (the likeliest token weighs 1), without what min-p leaves out."""
    device = scores_NV.device
    weights_NV = scores_NV - torch.from_numpy(high_N1).to(device)
    weights_NV.div_(torch.from_numpy(temperature_N1).to(device)).exp_()
    if np.isfinite(floor_N1).any():
        weights_NV.masked_fill_(scores_NV < torch.from_numpy(floor_N1).to(device), 0)
    totals: list[float] = weights_NV.sum(dim=-1).tolist()
    return totals


def _smallest_kept(
    largest_K: NDArray[np.float32],
    weights_K: NDArray[np.float32],
    row: RowSampler,
    floor: float,
    total: float | None,
    *,
    is_all: bool,
) -> np.float32 | None:
    """The smallest score that top-k and top-p keep, or None if it is not among the `largest_K`.

    Args:
        largest_K: in descending order.
        weights_K: theirs.
        floor: what min-p keeps.
        total: weight of all tokens.
        is_all: there are no others.
    """
    num_kept = len(largest_K)
    is_complete = is_all
    if 0 < row.top_k <= num_kept:
        num_kept, is_complete = row.top_k, True
    if floor > largest_K[num_kept - 1]:
        num_kept, is_complete = int(np.searchsorted(-largest_K, -floor, side="right")), True
    if row.top_p >= 1:
        return largest_K[num_kept - 1] if is_complete else None
    ends = weights_K[:num_kept].cumsum(dtype=np.float64)
    if is_complete:
        total = ends[-1]
    if total is None or row.top_p * total > ends[-1]:
        return None
    smallest: np.float32 = largest_K[int(np.searchsorted(ends, row.top_p * total))]
    return smallest


def _largest(scores_NV: Tensor, count: int) -> NDArray[np.float32]:
    """The `count` largest of each row, in descending order, (N, count)."""
    if scores_NV.device.type != "cpu":
        found: NDArray[np.float32] = scores_NV.topk(count, dim=-1).values.cpu().numpy()
        return found
    # numpy's sort and partition are 4 to 25 times as fast as torch's on a CPU.
    values = scores_NV.numpy()
    if count < values.shape[1]:
        values = np.partition(values, values.shape[1] - count, axis=-1)[:, -count:]
    return np.sort(values, axis=-1)[:, ::-1]
