"""Popularity: each token is expected to go where tokens went until now. The distribution-only baseline.

Shapes: n tokens, F features, E experts.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from moeless_predictors.arrays import FloatArray
from moeless_predictors.base import LoadPredictor, capped_to_sum


class PopularityPredictor(LoadPredictor):
    """The running share of each expert, the same for every token; the values of X are not looked at.

    Args:
        half_life_tokens: a token counts half as much as one that came this many tokens later; None: all count alike.
        top_k: experts per token; None takes the mean number of experts of a token in the first y.

    Fitted attributes: `counts_`, shape (E,): tokens that went to each expert, the old ones counting less.
    Source: the distribution-only prediction of MoE-GPS (arXiv 2506.07366).
    """

    counts_: FloatArray

    def __init__(self, *, half_life_tokens: float | None = None, top_k: int | None = None) -> None:
        self.half_life_tokens = half_life_tokens
        self.top_k = top_k

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Learn from tokens in the order in which they came. Forgets what was learned before."""
        return self._learn(X, y, reset=True)

    def partial_fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Learn from the tokens that came since; the first call is a `fit`."""
        return self._learn(X, y, reset=not hasattr(self, "counts_"))

    def _learn(self, X: ArrayLike, y: ArrayLike, *, reset: bool) -> Self:
        _, y_nE = self._start_fit(X, y, top_k=self.top_k, reset=reset)
        age_n, fade = decay(len(y_nE), self.half_life_tokens)
        counts_E = age_n @ y_nE.astype(np.float64)
        self.counts_ = counts_E if reset else self.counts_ * fade + counts_E
        return self

    def predict_load(self, X: ArrayLike) -> FloatArray:
        """The expected number of the tokens that go to each expert, shape (E,); sums to n × k."""
        load_E: FloatArray = len(self._validated(X)) * capped_to_sum(self.counts_[np.newaxis], self.top_k_)[0]
        return load_E

    def _probabilities(self, X_nF: FloatArray) -> FloatArray:
        return np.broadcast_to(self.counts_, (len(X_nF), self.n_experts_))


def decay(num_tokens: int, half_life_tokens: float | None) -> tuple[FloatArray, float]:
    """How much each of the newest tokens counts, shape (n,), the last one 1; and what is left of all before them.

    Raises: ValueError unless `half_life_tokens` is None or > 0.
    """
    if half_life_tokens is None:
        return np.ones(num_tokens), 1.0
    if not half_life_tokens > 0:
        raise ValueError(f"half_life_tokens must be > 0 or None, got {half_life_tokens}")
    weight_n: FloatArray = np.exp2(-np.arange(num_tokens - 1, -1, -1) / half_life_tokens)
    return weight_n, float(2.0 ** (-num_tokens / half_life_tokens))
