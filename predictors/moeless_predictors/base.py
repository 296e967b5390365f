"""Base of the load predictors: scikit-learn's conventions, and loads and top-k lists made from probabilities.

A predictor answers, for tokens of which something is known (its features), which experts of one MoE layer they will
go to. Subclasses implement `fit` and `_probabilities`.

Shapes: n tokens, F features, E experts, k experts per token.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self, TypeGuard

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data

from moeless_predictors.arrays import FloatArray, IntArray
from moeless_predictors.compiled import compiled
from moeless_predictors.metrics import recall_at_k


class LoadPredictor(BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types
    """Base of the predictors whose input is an array.

    `fit(X, y)` takes the features X, shape (n, F), and the routing y, shape (n, E): 1 where the token goes to the
    expert, else 0 (any amounts >= 0 are taken). Fitted attributes: `n_features_in_`, `n_experts_`, `top_k_`.
    """

    n_features_in_: int
    n_experts_: int
    top_k_: int

    @abstractmethod
    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Learn from tokens whose routing is known. Forgets what was learned before."""

    @abstractmethod
    def _probabilities(self, X_nF: FloatArray) -> FloatArray:
        """Scores >= 0 of shape (n, E), in proportion to the chance that the token goes to the expert."""

    def predict_proba(self, X: ArrayLike) -> FloatArray:
        """The chance that each token goes to each expert, shape (n, E), in [0, 1]; every row sums to k."""
        return self.fast_proba(self._validated(X))

    def fast_proba(self, X_nF: FloatArray) -> FloatArray:
        """`predict_proba` without its checks, for the token path: X a float array of the fitted width."""
        return capped_to_sum(self._probabilities(X_nF), self.top_k_)

    def predict_load(self, X: ArrayLike) -> FloatArray:
        """The expected number of the tokens that go to each expert, shape (E,); sums to n × k."""
        load_E: FloatArray = self.predict_proba(X).sum(axis=0)
        return load_E

    def predict_topk(self, X: ArrayLike) -> IntArray:
        """The k most probable experts of each token, shape (n, k), the most probable first."""
        return top_k_of(self._probabilities(self._validated(X)), self.top_k_)

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """Recall of the top k: the share of the tokens' true experts that are among the predicted k."""
        X_nF = self._validated(X)
        y_nE = as_routing(y, num_tokens=len(X_nF))
        return recall_at_k(top_k_of(self._probabilities(X_nF), self.top_k_), y_nE)

    def _validated(self, X: ArrayLike) -> FloatArray:
        check_is_fitted(self)
        if self._is_valid(X):
            return X
        check_finite(X, "X", "feature")
        X_nF: FloatArray = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        return X_nF

    def _is_valid(self, X: ArrayLike) -> TypeGuard[FloatArray]:
        """Return whether X would pass scikit-learn's validation unchanged, in a tenth of its time."""
        return (
            type(X) is np.ndarray
            and X.dtype in (np.float32, np.float64)
            and X.ndim == 2
            and len(X) > 0
            and X.shape[1] == self.n_features_in_
            and not hasattr(self, "feature_names_in_")
            and bool(np.isfinite(X).all())
        )

    def _restore(self) -> None:
        """Rebuild what is derived from the fitted attributes; `storage` calls it when it has set those.

        Raises: ValueError where the fitted attributes do not fit together.
        """

    def _start_fit(self, X: ArrayLike, y: ArrayLike, *, top_k: int | None, reset: bool = True) -> tuple[Any, Any]:
        """Check X and y and set what every fitted predictor has.

        Args:
            top_k: k where the caller knows it; None takes the mean number of experts of a token in y.
            reset: False for a further `partial_fit`, which must bring as many features and experts as before.
        Returns: X and y as float arrays of shapes (n, F) and (n, E).
        Raises: ValueError.
        """
        if not reset and self._is_valid(X) and type(y) is np.ndarray:
            X_nF, y_n = X, y
        else:
            check_finite(X, "X", "feature")
            check_finite(y, "y", "expert")
            X_nF, y_n = validate_data(
                self, X, y, reset=reset, dtype=[np.float64, np.float32], multi_output=True, y_numeric=True
            )
        y_nE = as_routing(y_n, num_tokens=len(X_nF))
        if not reset and y_nE.shape[1] != self.n_experts_:
            raise ValueError(f"y must have {self.n_experts_} experts as when fitted, got {y_nE.shape[1]}")
        if reset:
            self.n_experts_ = y_nE.shape[1]
            k = max(1, round(float(y_nE.sum()) / max(1, len(y_nE)))) if top_k is None else top_k
            if top_k is not None and not 1 <= top_k <= self.n_experts_:
                raise ValueError(f"top_k must be from 1 to the {self.n_experts_} experts, got {top_k}")
            self.top_k_ = min(k, self.n_experts_)
        return X_nF, y_nE

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.positive_only = True
        tags.target_tags.multi_output = True
        tags.target_tags.single_output = False
        return tags


def as_routing(y: ArrayLike, *, num_tokens: int) -> FloatArray:
    """y as floats of shape (n, E); a vector is one expert's. Raises ValueError for another shape, or values that are
    not finite and >= 0."""
    y_nE = np.asarray(y)
    if y_nE.ndim == 1:
        y_nE = y_nE[:, np.newaxis]
    if y_nE.ndim != 2 or len(y_nE) != num_tokens:
        raise ValueError(f"y must have the shape ({num_tokens}, experts), got {y_nE.shape}")
    if y_nE.dtype not in (np.float32, np.float64):
        y_nE = y_nE.astype(np.float32)
    check_finite(y_nE, "y", "expert")
    if y_nE.size and y_nE.min() < 0:
        token, expert = np.unravel_index(int(y_nE.argmin()), y_nE.shape)
        raise ValueError(f"y must hold values >= 0, got {y_nE[token, expert]} at token {token}, expert {expert}")
    routing_nE: FloatArray = y_nE
    return routing_nE


def check_finite(values: ArrayLike, name: str, column: str) -> None:
    """Raises ValueError that names token and column where an array of floats holds NaN or infinity."""
    if type(values) is not np.ndarray or values.dtype.kind != "f" or not values.size:
        return  # scikit-learn converts and checks what is no array
    is_fault = ~np.isfinite(values)
    if not is_fault.any():
        return
    at = tuple(int(i) for i in np.unravel_index(int(is_fault.argmax()), values.shape))
    kind = "NaN" if np.isnan(values[at]) else "infinity (inf)"
    where = ", ".join(f"{axis} {i}" for axis, i in zip(("token", column), at, strict=False))
    raise ValueError(f"Input {name} contains {kind}: values must be finite, got {values[at]} at {where}")


def one_hot(experts_nk: IntArray, num_experts: int, *, values_nk: FloatArray | None = None) -> FloatArray:
    """Choices of shape (n, k) as a float32 array of shape (n, E): 1, or the choice's value, where chosen."""
    chosen_nE = np.zeros((len(experts_nk), num_experts), dtype=np.float32)
    np.put_along_axis(chosen_nE, experts_nk.astype(np.intp), 1.0 if values_nk is None else values_nk, axis=1)
    return chosen_nE


def top_k_of(scores_nE: FloatArray, top_k: int) -> IntArray:
    """Indices of each row's k highest scores, the highest first; of equal scores the lower index."""
    order_nE: IntArray = np.argsort(-scores_nE, axis=1, kind="stable")
    return order_nE[:, :top_k]


def capped_to_sum(scores_nE: FloatArray, total: int) -> FloatArray:
    """Scale each row to the sum `total` with no value above 1: what is cut off goes to the others in proportion.

    A row of zeros is spread evenly. `total` must be at most the number of columns.
    """
    scaled_nE: FloatArray = np.array(scores_nE, order="C")
    _cap_rows(scaled_nE, total)
    return scaled_nE


@compiled
def _cap_rows(scaled_nE: FloatArray, total: int) -> None:
    """In place. Sums are of doubles, whatever the scores are."""
    num_experts = scaled_nE.shape[1]
    for row_E in scaled_nE:
        highest = row_E.max()
        if highest <= 0:
            highest = row_E[:] = 1.0
        # Zeros become a trillionth of the highest, so that they can grow.
        rest = 0.0
        for expert in range(num_experts):
            row_E[expert] = max(row_E[expert] / highest, 1e-12)
            rest += row_E[expert]
        row_E *= total / rest
        for _ in range(num_experts):
            if row_E.max() <= 1 + 1e-6:
                break
            room, rest = float(total), 0.0
            for expert in range(num_experts):
                if row_E[expert] >= 1:
                    row_E[expert] = 1.0
                    room -= 1
                else:
                    rest += row_E[expert]
            factor = room / max(rest, 1e-30)
            for expert in range(num_experts):
                if row_E[expert] < 1:
                    row_E[expert] *= factor
        for expert in range(num_experts):
            row_E[expert] = min(row_E[expert], 1.0)


@compiled
def num_found(scores_nE: FloatArray, experts_nk: IntArray) -> int:
    """Number of the tokens' true experts among the k with the highest scores; of equal ones the lower index."""
    found = 0
    top_k = experts_nk.shape[1]
    for row in range(len(experts_nk)):
        for expert in experts_nk[row]:
            score, num_better = scores_nE[row, expert], 0
            for other in range(scores_nE.shape[1]):
                better = scores_nE[row, other]
                num_better += better > score or (better == score and other < expert)
            found += num_better < top_k
    return found
