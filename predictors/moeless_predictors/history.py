"""The learned predictor: a small neural network from features of a token's past routing to its next experts.

`features.py` makes the features; this estimator takes any. Training is scikit-learn's; prediction is our own, because a
decoding step has no time for an estimator's checks and products with zeros.

Shapes: n tokens, F features, E experts, U hidden units.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit
from sklearn.neural_network import MLPClassifier
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from moeless_predictors.arrays import FloatArray, IntArray
from moeless_predictors.base import LoadPredictor
from moeless_predictors.compiled import compiled

_NUM_WEIGHTS = 110_000
_MIN_UNITS, _MAX_UNITS = 96, 512
_MAX_SPARSE_ROWS = 48
"""Batches up to this size skip the zeros of X: 3 to 8 times as fast as BLAS for one token, about even at 32 tokens, and
half as fast at 128."""


class HistoryPredictor(LoadPredictor):
    """A multi-label perceptron with one hidden layer, averaged over its last epochs.

    Averaging the weights of the last half of the epochs stands in for a falling learning rate (Polyak and Juditsky,
    1992), which scikit-learn's Adam does not have, and halves the noise of the last steps.

    Args:
        hidden_units: U; None takes as many as make some 110,000 weights, at least 96: the cost of a prediction is in
            proportion to the weights, which come from memory each time.
        epochs: passes over the tokens; more where they are few, see min_steps.
        min_steps: steps of Adam that are taken at least, up to five times the epochs.
        learning_rate: Adam's.
        alpha: L2 penalty; more for fewer tokens.
        batch_size: tokens of one step of Adam.
        top_k: k; None takes it from y.
        random_state: seed of the initial weights and of the order of the tokens.
    """

    weights_in_FU_: FloatArray
    bias_U_: FloatArray
    weights_out_UE_: FloatArray
    bias_E_: FloatArray

    def __init__(
        self,
        *,
        hidden_units: int | None = None,
        epochs: int = 16,
        min_steps: int = 1500,
        learning_rate: float = 1e-3,
        alpha: float = 1e-4,
        batch_size: int = 256,
        top_k: int | None = None,
        random_state: int | None = 0,
    ) -> None:
        self.hidden_units = hidden_units
        self.epochs = epochs
        self.min_steps = min_steps
        self.learning_rate = learning_rate
        self.alpha = alpha
        self.batch_size = batch_size
        self.top_k = top_k
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        for name in ("epochs", "hidden_units", "batch_size"):
            if (1 if getattr(self, name) is None else getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        X_nF, y_nE = self._start_fit(X, y, top_k=self.top_k)
        X_nF = X_nF.astype(np.float32, copy=False)
        chosen_nE = _as_labels(y_nE)
        network = self._network(len(X_nF))
        steps_an_epoch = -(-len(X_nF) // self.batch_size)
        num_epochs = max(self.epochs, min(5 * self.epochs, -(-self.min_steps // steps_an_epoch)))
        first_averaged = num_epochs // 2
        for epoch in range(num_epochs):
            network.partial_fit(X_nF, chosen_nE, classes=np.arange(chosen_nE.shape[1]))
            if epoch == first_averaged:
                sums = [array.copy() for array in (*network.coefs_, *network.intercepts_)]
            elif epoch > first_averaged:
                for total, array in zip(sums, (*network.coefs_, *network.intercepts_), strict=True):
                    total += array
        num_averaged = num_epochs - first_averaged
        self._take([total / num_averaged for total in sums])
        return self

    def partial_fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """One more pass over new tokens, from where the weights are."""
        if not hasattr(self, "weights_in_FU_"):
            return self.fit(X, y)
        check_is_fitted(self)
        X_nF, y_nE = self._start_fit(X, y, top_k=self.top_k, reset=False)
        X_nF = X_nF.astype(np.float32, copy=False)
        chosen_nE = _as_labels(y_nE)
        network = self._network(1)
        # One call to have the arrays made, whose effect is then overwritten by what was learned before.
        network.partial_fit(X_nF[:1], chosen_nE[:1], classes=np.arange(chosen_nE.shape[1]))
        learned = (self.weights_in_FU_, self.weights_out_UE_, self.bias_U_, self.bias_E_)
        for array, before in zip((*network.coefs_, *network.intercepts_), learned, strict=True):
            array[..., : before.shape[-1]] = before
        network.set_params(batch_size=min(self.batch_size, len(X_nF))).partial_fit(X_nF, chosen_nE)
        self._take([*network.coefs_, *network.intercepts_])
        return self

    def predict_raw(self, X_nF: FloatArray) -> FloatArray:
        """The chances before they are scaled to sum to k, shape (n, E).

        X, not checked, is of the fitted width, float32 and contiguous.
        """
        if len(X_nF) <= _MAX_SPARSE_ROWS:
            hidden_nU = _hidden(X_nF, self.weights_in_FU_, self.bias_U_)
        else:
            hidden_nU = X_nF @ self.weights_in_FU_
            hidden_nU += self.bias_U_
            np.maximum(hidden_nU, 0, out=hidden_nU)
        logits_nE = hidden_nU @ self.weights_out_UE_
        logits_nE += self.bias_E_
        chances_nE: FloatArray = expit(logits_nE, out=logits_nE)
        return chances_nE

    def _probabilities(self, X_nF: FloatArray) -> FloatArray:
        return self.predict_raw(np.ascontiguousarray(X_nF, dtype=np.float32)).astype(np.float64)

    def _network(self, num_tokens: int) -> MLPClassifier:
        return MLPClassifier(
            hidden_layer_sizes=(self._num_units(),),
            learning_rate_init=self.learning_rate,
            alpha=self.alpha,
            batch_size=min(self.batch_size, num_tokens),
            random_state=check_random_state(self.random_state).randint(2**31 - 1),
        )

    def _num_units(self) -> int:
        if self.hidden_units is not None:
            return self.hidden_units
        fitting = _NUM_WEIGHTS / (self.n_features_in_ + self.n_experts_)
        # Whole registers of 16 numbers.
        return max(_MIN_UNITS, min(_MAX_UNITS, 16 * round(fitting / 16)))

    def _take(self, arrays: list[FloatArray]) -> None:
        weights_in_FU, weights_out_UE, bias_U, bias_E = arrays
        self.weights_in_FU_ = np.ascontiguousarray(weights_in_FU, dtype=np.float32)
        self.bias_U_ = np.ascontiguousarray(bias_U, dtype=np.float32)
        self.weights_out_UE_ = np.ascontiguousarray(weights_out_UE[:, : self.n_experts_], dtype=np.float32)
        self.bias_E_ = np.ascontiguousarray(bias_E[: self.n_experts_], dtype=np.float32)


@compiled
def _hidden(X_nF: FloatArray, weights_FU: FloatArray, bias_U: FloatArray) -> FloatArray:
    """max(0, X W + b), leaving out X's zeros: three quarters of the features are what a token did not choose.

    Four features at a time, so that sums are read and written a quarter as often.
    """
    (num_rows, num_features), num_units = X_nF.shape, len(bias_U)
    hidden_nU = np.empty((num_rows, num_units), dtype=np.float32)
    places, values = np.empty(num_features + 3, dtype=np.int64), np.empty(num_features + 3, dtype=np.float32)
    for n in range(num_rows):
        count = 0
        for f in range(num_features):
            if X_nF[n, f] != 0:
                places[count], values[count] = f, X_nF[n, f]
                count += 1
        places[count : count + 3], values[count : count + 3] = 0, 0
        hidden_U = hidden_nU[n]
        hidden_U[:] = bias_U
        for i in range(0, count, 4):
            value0, value1, value2, value3 = values[i], values[i + 1], values[i + 2], values[i + 3]
            row0_U, row1_U = weights_FU[places[i]], weights_FU[places[i + 1]]
            row2_U, row3_U = weights_FU[places[i + 2]], weights_FU[places[i + 3]]
            for u in range(num_units):
                hidden_U[u] += (value0 * row0_U[u] + value1 * row1_U[u]) + (value2 * row2_U[u] + value3 * row3_U[u])
        for u in range(num_units):
            hidden_U[u] = max(hidden_U[u], np.float32(0))
    return hidden_nU


def _as_labels(y_nE: FloatArray) -> IntArray:
    """Return labels, one for each token and expert, for a classifier that needs at least two labels."""
    chosen_nE = (y_nE > 0).astype(np.int8)
    if chosen_nE.shape[1] == 1:
        chosen_nE = np.hstack([chosen_nE, np.zeros_like(chosen_nE)])
    return chosen_nE
