"""The gate predictor: a copy of layer l+d's gate reads the hidden state at layer l.

The one module of this package that needs torch; `storage` imports it when a file names its class.

Shapes: n or T tokens, H hidden size, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from moeless_predictors.arrays import AnyArray, BoolArray, FloatArray, IntArray
from moeless_predictors.base import LoadPredictor, top_k_of
from moeless_predictors.exactly_k import thresholds

Scoring = Literal["logits", "sigmoid", "softmax"]

_CHECKS = 10
"""Checks on held-out tokens during a fine-tuning; the best weights seen there are kept."""
_CALIBRATION_TOKENS = 4096
_SHARPNESS_RANGE = (1e-3, 1e3)
_ONLINE_STEP = 0.1
"""Factor on the learning rate in partial_fit, which has no schedule that makes steps smaller."""
_NEWTON_STEPS_PREDICTING = 2
"""The probabilities' sum is then within 1 % of k, with three steps within 0.02 %."""
_NEWTON_STEPS_FITTING = 3


class GatePredictor(LoadPredictor):
    """A copy of the predicted layer's gate on the hidden state at an earlier layer's experts; fine-tuned if need be.

    X, shape (n, H), holds hidden states at the input of layer l's experts, y, shape (n, E), the routing at layer
    l+d. `fit` takes that layer's gate, too. It sets tokens aside, measures the copy's recall on them, and leaves a
    copy that is good enough as it is. Other copies are fine-tuned, starting from the gate's weights, and the tuned
    weights are taken if they are better on the tokens set aside. The predictor has as many parameters as the gate
    (and a bias): E × H + E.

    Probabilities are those of drawing exactly k experts: sigmoid(score - c), with the number c of each token such
    that they sum to k. Fine-tuning maximises their likelihood (for a gate that chooses by its logits a convex
    problem); c has no part in the gradient, because at the sum k the loss is flat in it. A copy's scores are
    multiplied by the one number that makes them most likely, which changes no order.

    Args:
        threshold: a copy whose recall is at least this is left alone. MoEless's value; 0 tunes none, above 1 all.
        num_steps: of fine-tuning, each on one batch.
        batch_size: tokens of a batch.
        learning_rate: of Adam, divided by √H, for hidden states brought to an RMS of 1; falls to 0 during a `fit`,
            and is a tenth of it in `partial_fit`.
        prior_tokens: weight, in tokens, of what draws the weights back to the copied gate, >= 0: worth 2 to 4 points of
            recall with 2,000 tokens to learn from, nothing from 25,000 on. Not for `partial_fit`.
        validation_share: of the sequences, or without `groups` of the rows (the last ones), that are set aside.
        top_k: experts per token; None takes the mean number of experts of a token in the first y.
        random_state: seed of the choice of sequences and of the batches.

    Fitted attributes: `weight_`, shape (E, H), and `bias_`, shape (E,), both float32; `scoring_` and `sharpness_`:
    scores are sharpness × (activation(weight · x) + bias); `was_tuned_`; `recall_before_` and `recall_after_` on the
    tokens set aside (None without any).
    Source: layer-aware fine-tuned predictors of MoEless (arXiv 2603.06350); Fate (arXiv 2502.12224).
    """

    weight_: FloatArray
    bias_: FloatArray
    scoring_: Scoring
    sharpness_: float
    was_tuned_: bool
    recall_before_: float | None
    recall_after_: float | None

    def __init__(
        self,
        *,
        threshold: float = 0.8,
        num_steps: int = 1500,
        batch_size: int = 1024,
        learning_rate: float = 0.4,
        prior_tokens: float = 10.0,
        validation_share: float = 0.2,
        top_k: int | None = None,
        random_state: int = 0,
    ) -> None:
        self.threshold = threshold
        self.num_steps = num_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.prior_tokens = prior_tokens
        self.validation_share = validation_share
        self.top_k = top_k
        self.random_state = random_state

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        weight: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        scoring: Scoring = "logits",
        groups: ArrayLike | None = None,
    ) -> Self:
        """Measure the copied gate and fine-tune it if its recall is below the threshold.

        Args:
            weight: of layer l+d's gate, shape (E, H); zeros if None, and then there is something to learn.
            bias: of that gate, shape (E,); zeros if None.
            scoring: what the gate chooses its k highest of: "logits" (weight · x + bias), or activations with a
                correction added: sigmoid(weight · x) + bias as in DeepSeek-V3, softmax(weight · x) + bias.
            groups: the sequence of each token, shape (n,); None: rows are in the order of sequences and tokens.
        Raises: ValueError.
        """
        self._check_parameters()
        X_nH, y_nE = self._start_fit(_at_least_float32(X), y, top_k=self.top_k)
        self._set_gate(weight, bias, scoring)
        is_held_out_n = self._held_out(len(X_nH), groups)
        train_n, held_out_n = np.flatnonzero(~is_held_out_n), np.flatnonzero(is_held_out_n)
        if len(train_n) == 0:
            train_n = held_out_n
        self._calibrate(X_nH, y_nE, train_n)
        self.recall_before_ = self.recall_after_ = self._recall(X_nH, y_nE, held_out_n)
        self.was_tuned_ = False
        if self.recall_before_ < self.threshold:
            self._tune(X_nH, y_nE, train_n, held_out_n)
        return self

    def partial_fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        weight: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        scoring: Scoring = "logits",
    ) -> Self:
        """Learn from further tokens, one step for each `batch_size` of them, whatever the recall.

        The first call on a predictor that was not fitted takes a gate as `fit` does; later calls go on from there.
        """
        is_first = not hasattr(self, "weight_")
        if not is_first and not (weight is None and bias is None):
            raise ValueError("weight and bias must be None once the predictor has a gate, got one of them")
        self._check_parameters()
        X_nH, y_nE = self._start_fit(_at_least_float32(X), y, top_k=self.top_k, reset=is_first)
        if is_first:
            self._set_gate(weight, bias, scoring)
            self._calibrate(X_nH, y_nE, np.arange(len(X_nH)))
            self.recall_before_ = self.recall_after_ = None
        if not hasattr(self, "_online_tuner"):
            self._online_tuner = _Tuner(self, _feature_scale(X_nH), prior=0.0)
        step = _ONLINE_STEP * self._step_size()
        for begin in range(0, len(X_nH), self.batch_size):
            rows = slice(begin, begin + self.batch_size)
            self._online_tuner.step(_tensor(X_nH[rows]), _tensor(y_nE[rows] > 0), step)
        self._take(*self._online_tuner.gate())
        self.was_tuned_ = True
        return self

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """The chance that each token goes to each expert, shape (T, E), float32; every row sums to k within 1%.

        For callers that have tensors in host memory: nothing is validated and nothing copied.
        """
        with torch.inference_mode():
            scores_TE = self._scores(hidden_TH.float(), self._weight_HE, self._bias_E)
            if self.top_k_ == self.n_experts_:
                return torch.ones_like(scores_TE)
            return scores_TE.sub_(_thresholds(scores_TE, self.top_k_, _NEWTON_STEPS_PREDICTING)).sigmoid_()

    def predict_topk(self, X: ArrayLike) -> IntArray:
        """The k most probable experts of each token, shape (n, k), the most probable first.

        By the scores: probabilities near 1 are equal in float32 where scores are not.
        """
        with torch.inference_mode():
            scores_nE = self._scores(_tensor(self._validated(X)), self._weight_HE, self._bias_E)
        return top_k_of(scores_nE.numpy(), self.top_k_)

    @property
    def num_parameters(self) -> int:
        """Parameters of the copy: never more than a gate of the model with a bias has."""
        return self.weight_.size + self.bias_.size

    def _probabilities(self, X_nF: FloatArray) -> FloatArray:
        proba_nE: FloatArray = self.forward(_tensor(X_nF)).numpy()
        return proba_nE

    def _restore(self) -> None:
        if self.weight_.shape != (self.n_experts_, self.n_features_in_) or self.bias_.shape != (self.n_experts_,):
            raise ValueError(
                f"weight_ and bias_ must have the shapes ({self.n_experts_}, {self.n_features_in_}) and "
                f"({self.n_experts_},), got {self.weight_.shape} and {self.bias_.shape}"
            )
        _check_scoring(self.scoring_)
        # A product with the transposed copy takes half the time of one with the rows as they are.
        self._weight_HE, self._bias_E = _tensor(self.weight_).T.contiguous(), _tensor(self.bias_)

    def _check_parameters(self) -> None:
        for name in ("num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.threshold < 0:
            raise ValueError(f"threshold must be >= 0, got {self.threshold}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")
        if self.prior_tokens < 0:
            raise ValueError(f"prior_tokens must be >= 0, got {self.prior_tokens}")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be between 0 and 1, got {self.validation_share}")

    def _set_gate(self, weight: ArrayLike | None, bias: ArrayLike | None, scoring: Scoring) -> None:
        _check_scoring(scoring)
        shape = (self.n_experts_, self.n_features_in_)
        self.scoring_, self.sharpness_ = scoring, 1.0
        self._take(_gate_array("weight", weight, shape), _gate_array("bias", bias, shape[:1]))
        self.__dict__.pop("_online_tuner", None)

    def _take(self, weight_EH: FloatArray, bias_E: FloatArray) -> None:
        self.weight_, self.bias_ = weight_EH, bias_E
        self._restore()

    def _scores(self, hidden_TH: Tensor, weight_HE: Tensor, bias_E: Tensor) -> Tensor:
        if self.scoring_ == "logits":
            return torch.addmm(bias_E, hidden_TH, weight_HE)
        logits_TE = hidden_TH @ weight_HE
        activated_TE = logits_TE.sigmoid() if self.scoring_ == "sigmoid" else logits_TE.softmax(dim=-1)
        return self.sharpness_ * (activated_TE + bias_E)

    def _held_out(self, num_tokens: int, groups: ArrayLike | None) -> BoolArray:
        """True for the tokens set aside; all of them where there are too few to divide."""
        sequence_n = np.arange(num_tokens) if groups is None else np.asarray(groups)
        if sequence_n.shape != (num_tokens,):
            raise ValueError(f"groups must have the shape ({num_tokens},), got {sequence_n.shape}")
        sequences = np.unique(sequence_n)
        if len(sequences) < 2:
            return np.ones(num_tokens, dtype=np.bool_)
        if groups is not None:
            sequences = np.random.default_rng(self.random_state).permutation(sequences)
        num_held_out = min(len(sequences) - 1, max(1, round(self.validation_share * len(sequences))))
        is_held_out_n: BoolArray = np.isin(sequence_n, sequences[-num_held_out:])
        return is_held_out_n

    def _calibrate(self, X_nH: FloatArray, y_nE: FloatArray, train_n: IntArray) -> None:
        """Find the sharpness by golden-section search (the loss is convex in it); logits take it into the weights."""
        rows = np.random.default_rng(self.random_state).permutation(train_n)[:_CALIBRATION_TOKENS]
        with torch.inference_mode():
            scores_nE = self._scores(_tensor(X_nH[rows]), self._weight_HE, self._bias_E)
            if float(scores_nE.std(unbiased=False)) == 0:
                return
            chosen_nE = _tensor(y_nE[rows] > 0)
            low, high = (float(np.log(end / float(scores_nE.abs().max()))) for end in _SHARPNESS_RANGE)
            shrink = (5**0.5 - 1) / 2
            while high - low > 0.01:
                left, right = high - shrink * (high - low), low + shrink * (high - low)
                loss_left, loss_right = (
                    float(_loss(scores_nE * np.exp(point), chosen_nE, self.top_k_)) for point in (left, right)
                )
                low, high = (low, right) if loss_left <= loss_right else (left, high)
        sharpness = float(np.exp((low + high) / 2))
        if self.scoring_ == "logits":
            self._take((sharpness * self.weight_).astype(np.float32), (sharpness * self.bias_).astype(np.float32))
        else:
            self.sharpness_ = sharpness

    def _recall(self, X_nH: FloatArray, y_nE: FloatArray, rows: IntArray) -> float:
        """Recall on the tokens `rows`, a batch at a time."""
        found = true = 0.0
        with torch.inference_mode():
            for begin in range(0, len(rows), self.batch_size):
                batch = rows[begin : begin + self.batch_size]
                scores_nE = self._scores(_tensor(X_nH[batch]), self._weight_HE, self._bias_E)
                chosen_nE = _tensor(y_nE[batch] > 0)
                found += float(chosen_nE.gather(1, scores_nE.topk(self.top_k_, dim=1).indices).sum())
                true += float(chosen_nE.sum())
        return found / true if true else 1.0

    def _tune(self, X_nH: FloatArray, y_nE: FloatArray, train_n: IntArray, held_out_n: IntArray) -> None:
        copied = best = (self.weight_, self.bias_)
        best_recall = self.recall_before_
        tuner = _Tuner(
            self, _feature_scale(X_nH[train_n[:_CALIBRATION_TOKENS]]), prior=self.prior_tokens / len(train_n)
        )
        batches = _batches(train_n, self.batch_size, np.random.default_rng(self.random_state))
        check_every = max(1, self.num_steps // _CHECKS)
        for number in range(1, self.num_steps + 1):
            rows = next(batches)
            step = self._step_size() * (1 - (number - 1) / self.num_steps)
            tuner.step(_tensor(X_nH[rows]), _tensor(y_nE[rows] > 0), step)
            if number % check_every == 0 or number == self.num_steps:
                self._take(*tuner.gate())
                recall = self._recall(X_nH, y_nE, held_out_n)
                if best_recall is None or recall > best_recall:
                    best, best_recall = (self.weight_, self.bias_), recall
        self._take(*best)
        self.was_tuned_, self.recall_after_ = best is not copied, best_recall

    def _step_size(self) -> float:
        return float(self.learning_rate / np.sqrt(self.n_features_in_))


class _Tuner:
    """Adam on a predictor's gate, in coordinates in which every feature has an RMS of 1.

    The weights are drawn back to those it began with, as by a Gaussian prior around the copied gate: `prior` times
    the squared distance is added to the loss of a token.
    """

    def __init__(self, predictor: GatePredictor, scale_H: Tensor, *, prior: float) -> None:
        self._predictor = predictor
        self._scale_H1 = scale_H[:, None]
        self._prior = prior
        self._begin_HE = _tensor(predictor.weight_).T * self._scale_H1
        self._weight_HE = self._begin_HE.clone().requires_grad_()
        self._bias_E = _tensor(predictor.bias_).requires_grad_()
        self._adam = torch.optim.Adam([self._weight_HE, self._bias_E])

    def step(self, hidden_nH: Tensor, chosen_nE: Tensor, step_size: float) -> None:
        with torch.enable_grad():
            scores_nE = self._predictor._scores(hidden_nH, self._weight_HE / self._scale_H1, self._bias_E)
            loss = _loss(scores_nE, chosen_nE, self._predictor.top_k_)
            self._adam.zero_grad(set_to_none=True)
            (loss + self._prior * (self._weight_HE - self._begin_HE).square().sum()).backward()
        self._adam.param_groups[0]["lr"] = step_size
        self._adam.step()

    def gate(self) -> tuple[FloatArray, FloatArray]:
        """Copies of weight and bias for hidden states as they are."""
        weight_HE = (self._weight_HE / self._scale_H1).detach().numpy()
        return np.ascontiguousarray(weight_HE.T), self._bias_E.detach().numpy().copy()


def _thresholds(scores_TE: Tensor, top_k: int, num_steps: int) -> Tensor:
    """Each row's c, shape (T, 1), such that the sigmoids of score - c sum to `top_k`, which must be < E."""
    return torch.from_numpy(thresholds(scores_TE.numpy(), top_k, num_steps))


def _loss(scores_nE: Tensor, chosen_nE: Tensor, top_k: int) -> Tensor:
    """Mean over tokens of the negative log likelihood of the chosen experts, each expert taken by itself."""
    if top_k < scores_nE.shape[1]:
        scores_nE = scores_nE - _thresholds(scores_nE.detach(), top_k, _NEWTON_STEPS_FITTING)
    return F.binary_cross_entropy_with_logits(scores_nE, chosen_nE, reduction="sum") / len(scores_nE)


def _batches(rows: IntArray, batch_size: int, random: np.random.Generator) -> Iterator[IntArray]:
    """Rows in a new order each time round, a batch at a time, without end."""
    while True:
        shuffled = random.permutation(rows)
        for begin in range(0, len(shuffled), batch_size):
            yield shuffled[begin : begin + batch_size]


def _feature_scale(X_nH: FloatArray) -> Tensor:
    """Each feature's RMS, but at least a hundredth of the whole's; ones for zeros."""
    squares_H = np.square(X_nH, dtype=np.float64).mean(axis=0)
    whole = squares_H.mean()
    return _tensor(np.sqrt(np.maximum(squares_H, 1e-4 * whole))) if whole > 0 else torch.ones(X_nH.shape[1])


def _tensor(array: AnyArray) -> Tensor:
    """A float32 copy: arrays may be read-only, which tensors cannot be."""
    return torch.tensor(array, dtype=torch.float32)


def _at_least_float32(X: ArrayLike) -> ArrayLike:
    """Half precision, as traces hold it, as float32; validation would make it float64."""
    return X.astype(np.float32) if isinstance(X, np.ndarray) and X.dtype == np.float16 else X


def _check_scoring(scoring: str) -> None:
    if scoring not in get_args(Scoring):
        raise ValueError(f"scoring must be one of {', '.join(get_args(Scoring))}, got {scoring!r}")


def _gate_array(name: str, array: ArrayLike | None, shape: tuple[int, ...]) -> FloatArray:
    if array is None:
        return np.zeros(shape, dtype=np.float32)
    values: FloatArray = np.array(array, dtype=np.float32)
    if values.shape != shape:
        raise ValueError(f"{name} must have the shape {shape} of (experts, features), got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got {values[~np.isfinite(values)][0]}")
    return values
