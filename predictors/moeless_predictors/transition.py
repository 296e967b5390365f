"""Transition: which experts of layer l+d follow which experts of layer l. The affinity baseline.

Shapes: n tokens, S experts of the source layer, E experts of the predicted layer.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils import Tags

from moeless_predictors.arrays import FloatArray
from moeless_predictors.base import LoadPredictor
from moeless_predictors.popularity import decay

Combination = Literal["mean", "product"]


class TransitionPredictor(LoadPredictor):
    """P(expert at layer l+d | expert at layer l) from counts, put together over the token's experts at layer l.

    X, shape (n, S), holds amounts >= 0 of the source layer's experts: 1 where chosen, or the gate weights. Only their
    proportions matter. A token with none is predicted by popularity.

    Args:
        half_life_tokens: a token counts half as much as one that came this many tokens later; None: all count alike.
        smoothing: how many tokens' worth of popularity is added to the counts of each source expert, > 0.
        combine: "mean", the published way, is the average of the source experts' probabilities weighted by X.
            "product" takes popularity times the (weighted, geometric) mean factor by which the source experts raise
            or lower it, to the power of `evidence`: as in naive Bayes, experts that agree add up.
        evidence: how many independent witnesses a token's source experts count for in "product", > 0. One is too
            timid and their number too bold, because they depend on one another; 2 or 3 is best on real traces.
        top_k: experts per token; None takes the mean number of experts of a token in the first y.

    Fitted attributes: `transitions_`, shape (S, E): amounts of source expert and target expert met in one token;
    `sources_`, shape (S,): amounts of the source experts; `targets_`, shape (E,): of the target experts;
    `num_tokens_`: the tokens seen. The old ones count less in all of them.
    Source: the inter-layer affinity of ExFlow (arXiv 2401.08383).
    """

    transitions_: FloatArray
    sources_: FloatArray
    targets_: FloatArray
    num_tokens_: float

    def __init__(
        self,
        *,
        half_life_tokens: float | None = None,
        smoothing: float = 1.0,
        combine: Combination = "mean",
        evidence: float = 2.0,
        top_k: int | None = None,
    ) -> None:
        self.half_life_tokens = half_life_tokens
        self.smoothing = smoothing
        self.combine = combine
        self.evidence = evidence
        self.top_k = top_k

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Learn from tokens in the order in which they came. Forgets what was learned before."""
        return self._learn(X, y, reset=True)

    def partial_fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Learn from the tokens that came since; the first call is a `fit`."""
        return self._learn(X, y, reset=not hasattr(self, "transitions_"))

    def _learn(self, X: ArrayLike, y: ArrayLike, *, reset: bool) -> Self:
        self._check_parameters()
        X_nS, y_nE = self._start_fit(X, y, top_k=self.top_k, reset=reset)
        _check_amounts(X_nS)
        weight_n, fade = decay(len(X_nS), self.half_life_tokens)
        weighted_nS = weight_n[:, np.newaxis] * X_nS
        transitions_SE = weighted_nS.T @ y_nE.astype(np.float64)
        sources_S = weighted_nS.sum(axis=0)
        targets_E = weight_n @ y_nE.astype(np.float64)
        num_tokens = float(weight_n.sum())
        if not reset:
            transitions_SE += fade * self.transitions_
            sources_S += fade * self.sources_
            targets_E += fade * self.targets_
            num_tokens += fade * self.num_tokens_
        self.transitions_, self.sources_ = transitions_SE, sources_S
        self.targets_, self.num_tokens_ = targets_E, num_tokens
        self._restore()
        return self

    def _restore(self) -> None:
        """Make the matrix by which a prediction multiplies X: probabilities, or the log of how they raise popularity.

        Raises: ValueError where the counts' shapes do not fit together or a parameter is out of its range.
        """
        self._check_parameters()
        if self.transitions_.shape != (*self.sources_.shape, *self.targets_.shape):
            raise ValueError(
                f"transitions_ must have the shape {(*self.sources_.shape, *self.targets_.shape)} of sources_ and "
                f"targets_, got {self.transitions_.shape}"
            )
        # Never zero, so that no expert is impossible.
        popularity_E = np.maximum(self.targets_ / self.num_tokens_, 1e-6)
        given_SE = (self.transitions_ + self.smoothing * popularity_E) / (self.sources_ + self.smoothing)[:, np.newaxis]
        self._popularity_E, self._log_popularity_E = popularity_E, np.log(popularity_E)
        self._matrix_SE = np.log(given_SE / popularity_E) if self.combine == "product" else given_SE

    def _probabilities(self, X_nS: FloatArray) -> FloatArray:
        _check_amounts(X_nS)
        total_n = X_nS.sum(axis=1, dtype=np.float64, keepdims=True)
        mixed_nE: FloatArray = (X_nS / np.maximum(total_n, np.finfo(np.float64).tiny)) @ self._matrix_SE
        if self.combine == "product":
            logit_nE = self.evidence * mixed_nE + self._log_popularity_E
            odds_nE: FloatArray = np.exp(logit_nE - logit_nE.max(axis=1, keepdims=True))
            return odds_nE
        return mixed_nE if total_n.all() else np.where(total_n > 0, mixed_nE, self._popularity_E)

    def _check_parameters(self) -> None:
        if self.combine not in ("mean", "product"):
            raise ValueError(f"combine must be 'mean' or 'product', got {self.combine!r}")
        if not self.smoothing > 0:
            raise ValueError(f"smoothing must be > 0, got {self.smoothing}")
        if not self.evidence > 0:
            raise ValueError(f"evidence must be > 0, got {self.evidence}")

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = True
        return tags


def _check_amounts(X_nS: FloatArray) -> None:
    lowest = X_nS.min()
    if lowest < 0:
        raise ValueError(f"Negative values in data: X must hold amounts >= 0 of the source experts, got {lowest}")
