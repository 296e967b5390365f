"""Popularity: every token is expected to go where recent tokens went. The distribution-only baseline.

`PopularityPredictor` is the estimator, `OnlinePopularity` the same learning from the loads of batches: what a server
falls back on, and what an evaluation judges the other predictors against.

Shapes: n tokens, F features, E experts, B batches, k experts per token.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from moeless_predictors.arrays import FloatArray
from moeless_predictors.base import LoadPredictor, capped_to_sum, top_k_of
from moeless_predictors.metrics import checked_loads, recall_at_k

HALF_LIFE_TOKENS = 256.0
"""Default half-life. Chosen on held-out subjects by `python -m benchmarks.popularity`: shorter ones follow a change of
subject sooner, longer ones are steadier while nothing changes."""


class PopularityPredictor(LoadPredictor):
    """The running share of each expert, the same for every token; the values of X are ignored.

    Args:
        half_life_tokens: a token counts half as much as one that came this many tokens later; None: all count alike.
        top_k: experts per token; None takes the mean number of experts of a token in the first y.

    Fitted attributes: `counts_`, shape (E,): tokens that went to each expert, old ones discounted.
    Source: the distribution-only prediction of MoE-GPS (arXiv 2506.07366).
    """

    counts_: FloatArray

    def __init__(self, *, half_life_tokens: float | None = HALF_LIFE_TOKENS, top_k: int | None = None) -> None:
        self.half_life_tokens = half_life_tokens
        self.top_k = top_k

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Learn from tokens in the order in which they came. Forgets what was learned before."""
        return self._learn(X, y, reset=True)

    def partial_fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Learn from the tokens that came since; the first call is a `fit`."""
        return self._learn(X, y, reset=not hasattr(self, "counts_"))

    def fit_recording(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Learn from tokens whose order means nothing, as that of a recording's sequences.

        All tokens count alike. `OnlinePopularity` discounts their weight to that of an endless stream and goes on from
        there at the pace of the half-life.
        """
        half_life_tokens, self.half_life_tokens = self.half_life_tokens, None
        try:
            self._learn(X, y, reset=True)
        finally:
            self.half_life_tokens = half_life_tokens
        return self

    def _learn(self, X: ArrayLike, y: ArrayLike, *, reset: bool) -> Self:
        _, y_nE = self._start_fit(X, y, top_k=self.top_k, reset=reset)
        weight_n, fade = decay(len(y_nE), self.half_life_tokens)
        counts_E = weight_n @ y_nE.astype(np.float64)
        self.counts_ = counts_E if reset else self.counts_ * fade + counts_E
        return self

    def predict_load(self, X: ArrayLike) -> FloatArray:
        """The expected number of the tokens that go to each expert, shape (E,); sums to n × k."""
        load_E: FloatArray = len(self._validated(X)) * capped_to_sum(self.counts_[np.newaxis], self.top_k_)[0]
        return load_E

    def _probabilities(self, X_nF: FloatArray) -> FloatArray:
        return np.broadcast_to(self.counts_, (len(X_nF), self.n_experts_))


class OnlinePopularity:
    """Popularity that learns from the load of each batch, starting from a fitted predictor's shares.

    Args:
        popularity: fitted; its counts are copied.
        half_life_tokens: overrides the predictor's; what it learned is discounted to one that fits.
    """

    def __init__(self, popularity: PopularityPredictor, *, half_life_tokens: float | None = None) -> None:
        self.half_life_tokens = popularity.half_life_tokens if half_life_tokens is None else half_life_tokens
        self.top_k = popularity.top_k_
        counts_E = popularity.counts_
        self.counts_E: FloatArray = counts_E * weight_left(float(counts_E.sum()) / self.top_k, self.half_life_tokens)

    def load(self, num_tokens: int) -> FloatArray:
        """Expected load of a batch, shape (E,), in [0, num_tokens]."""
        expected_E: FloatArray = self.counts_E * (num_tokens * self.top_k / max(float(self.counts_E.sum()), 1e-9))
        return np.minimum(expected_E, num_tokens)

    def learn(self, load_E: FloatArray, num_tokens: int) -> None:
        """Take a batch's true load into account; older batches fade."""
        fade = 1.0 if self.half_life_tokens is None else 0.5 ** (num_tokens / self.half_life_tokens)
        self.counts_E = self.counts_E * fade + load_E

    def loads(self, load_BE: FloatArray, num_tokens_B: ArrayLike) -> FloatArray:
        """Expected loads of batches that follow each other, each learned from once it was expected; shape (B, E).

        Raises: ValueError for loads that are not finite and >= 0.
        """
        checked_loads("load_BE", load_BE)
        expected = []
        for load_E, num_tokens in zip(load_BE, np.asarray(num_tokens_B).tolist(), strict=True):
            expected.append(self.load(num_tokens))
            self.learn(load_E, num_tokens)
        return np.array(expected).reshape(load_BE.shape)

    def recall(self, routing_nE: FloatArray, *, batch_tokens: int = 64) -> float:
        """Recall of the top k on tokens in the order in which they came, learning after each batch of them."""
        found = 0.0
        for begin in range(0, len(routing_nE), batch_tokens):
            batch_nE = routing_nE[begin : begin + batch_tokens]
            topk_1k = top_k_of(self.counts_E[np.newaxis], self.top_k)
            found += len(batch_nE) * recall_at_k(np.repeat(topk_1k, len(batch_nE), axis=0), batch_nE)
            self.learn(batch_nE.sum(axis=0, dtype=np.float64), len(batch_nE))
        return found / len(routing_nE)


def weight_left(num_tokens: float, half_life_tokens: float | None) -> float:
    """Factor that brings the weight of `num_tokens` to at most that of an endless stream under this half-life."""
    if half_life_tokens is None:
        return 1.0
    _, fade = decay(1, half_life_tokens)
    return min(1.0, 1 / (1 - fade) / max(num_tokens, 1e-9))


def decay(num_tokens: int, half_life_tokens: float | None) -> tuple[FloatArray, float]:
    """Weights of the newest tokens, shape (n,), the last one 1; and the factor on all before them.

    Raises: ValueError unless `half_life_tokens` is None or > 0.
    """
    if half_life_tokens is None:
        return np.ones(num_tokens), 1.0
    if not half_life_tokens > 0:
        raise ValueError(f"half_life_tokens must be > 0 or None, got {half_life_tokens}")
    weight_n: FloatArray = np.exp2(-np.arange(num_tokens - 1, -1, -1) / half_life_tokens)
    return weight_n, float(2.0 ** (-num_tokens / half_life_tokens))
