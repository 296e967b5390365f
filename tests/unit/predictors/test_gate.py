"""The gate predictor: a good copy stays as it is, another is fine-tuned, and only what is better is taken.

Shapes: n tokens, S sequences, H hidden size, E experts, k experts per token.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.estimator_checks import parametrize_with_checks

from moeless_predictors.arrays import FloatArray, IntArray
from moeless_predictors.base import one_hot, top_k_of
from moeless_predictors.gate import GatePredictor, Scoring
from moeless_predictors.metrics import relative_l1
from moeless_predictors.storage import PredictorFormatError, from_arrays, load_predictor, save_predictor, to_arrays

NUM_FEATURES, NUM_EXPERTS, TOP_K = 12, 8, 2


@dataclass(frozen=True)
class Layers:
    """Hidden states at layer l, and layer l+d's gate, which reads them through a rotation and some noise."""

    X_nH: FloatArray
    y_nE: FloatArray
    weight_EH: FloatArray
    sequence_n: IntArray


def layers(*, seed: int = 0, num_tokens: int = 3000, turn: float = 1.0, noise: float = 0.1) -> Layers:
    """`turn` is how far the hidden state moves between the layers: 0 leaves it as it is."""
    random = np.random.default_rng(seed)
    X_nH = random.normal(size=(num_tokens, NUM_FEATURES)).astype(np.float32)
    weight_EH = random.normal(size=(NUM_EXPERTS, NUM_FEATURES)).astype(np.float32)
    change_HH = turn * random.normal(size=(NUM_FEATURES, NUM_FEATURES)) / NUM_FEATURES**0.5
    later_nH = X_nH + X_nH @ change_HH + noise * random.normal(size=X_nH.shape)
    y_nE = one_hot(top_k_of(later_nH @ weight_EH.T, TOP_K), NUM_EXPERTS)
    return Layers(X_nH=X_nH, y_nE=y_nE, weight_EH=weight_EH, sequence_n=np.arange(num_tokens) // 50)


def predictor(**changes: Any) -> GatePredictor:
    return GatePredictor(**{"num_steps": 300, "batch_size": 256, **changes})


@parametrize_with_checks([GatePredictor(num_steps=10)])
def test_it_is_a_scikit_learn_estimator(estimator: GatePredictor, check: Callable[[Any], None]) -> None:
    check(estimator)


def test_a_good_copy_stays_as_it_is() -> None:
    data = layers(turn=0, noise=0.05)
    fitted = predictor().fit(data.X_nH, data.y_nE, weight=data.weight_EH)
    assert not fitted.was_tuned_
    assert fitted.recall_before_ == fitted.recall_after_ > 0.9
    gate_nk = top_k_of(data.X_nH @ data.weight_EH.T, TOP_K)
    np.testing.assert_array_equal(fitted.predict_topk(data.X_nH), gate_nk)


def test_a_poor_copy_is_fine_tuned() -> None:
    data, unseen = layers(num_tokens=4000), slice(3000, None)
    fitted = predictor().fit(data.X_nH[:3000], data.y_nE[:3000], weight=data.weight_EH)
    assert fitted.was_tuned_
    assert fitted.recall_before_ < 0.8
    assert fitted.recall_after_ > 0.9
    assert fitted.score(data.X_nH[unseen], data.y_nE[unseen]) > 0.9


def test_the_threshold_decides_which_copies_are_fine_tuned() -> None:
    data = layers()
    before = predictor(threshold=0).fit(data.X_nH, data.y_nE, weight=data.weight_EH)
    assert not before.was_tuned_
    above = predictor(threshold=before.recall_before_ + 1e-6).fit(data.X_nH, data.y_nE, weight=data.weight_EH)
    assert above.was_tuned_
    at = predictor(threshold=before.recall_before_).fit(data.X_nH, data.y_nE, weight=data.weight_EH)
    assert not at.was_tuned_


def test_tuned_weights_that_are_no_better_are_not_taken() -> None:
    data = layers(turn=0, noise=0)
    fitted = predictor(threshold=1.1, num_steps=20).fit(data.X_nH, data.y_nE, weight=data.weight_EH)
    assert fitted.recall_before_ == fitted.recall_after_ == 1
    assert not fitted.was_tuned_


def test_without_a_gate_it_learns_from_zero_weights() -> None:
    data = layers()
    assert predictor().fit(data.X_nH, data.y_nE).score(data.X_nH, data.y_nE) > 0.9


def test_few_tokens_are_learned_better_from_the_gate_than_from_nothing() -> None:
    data, unseen = layers(num_tokens=2000, turn=0.3), slice(100, None)
    few = {"X": data.X_nH[:100], "y": data.y_nE[:100]}
    copied = predictor(threshold=1.1).fit(**few, weight=data.weight_EH)
    from_zero = predictor(threshold=1.1).fit(**few)
    assert copied.score(data.X_nH[unseen], data.y_nE[unseen]) > from_zero.score(data.X_nH[unseen], data.y_nE[unseen])


def test_it_has_no_more_parameters_than_a_gate() -> None:
    data = layers()
    fitted = predictor(threshold=1.1).fit(data.X_nH, data.y_nE, weight=data.weight_EH)
    kept = sum(array.size for array in to_arrays(fitted)[0].values())
    assert fitted.num_parameters == kept == NUM_EXPERTS * NUM_FEATURES + NUM_EXPERTS


def test_whole_sequences_are_set_aside() -> None:
    """Tokens of a sequence are alike: sequences that look like no other are foreseen only if a part was trained on."""
    random = np.random.default_rng(0)
    num_sequences, length = 40, 20
    sequence_n = random.permutation(np.repeat(np.arange(num_sequences), length))
    X_nH = np.eye(num_sequences, dtype=np.float32)[sequence_n]
    experts_S = random.integers(NUM_EXPERTS, size=num_sequences)
    y_nE = np.eye(NUM_EXPERTS, dtype=np.float32)[experts_S[sequence_n]]
    by_sequence = predictor().fit(X_nH, y_nE, groups=sequence_n)
    by_row = predictor().fit(X_nH, y_nE)
    assert by_row.recall_after_ == 1
    assert by_sequence.recall_after_ < 0.7


def test_probabilities_are_calibrated() -> None:
    """Of the pairs given a chance of about p, a share of about p is chosen, and so the loads are right."""
    data, unseen = layers(num_tokens=8000, noise=0.5), slice(6000, None)
    fitted = predictor().fit(data.X_nH[:6000], data.y_nE[:6000], weight=data.weight_EH)
    proba_nE, y_nE = fitted.predict_proba(data.X_nH[unseen]), data.y_nE[unseen]
    for low in (0.1, 0.3, 0.5, 0.7):
        is_here_nE = (proba_nE >= low) & (proba_nE < low + 0.2)
        assert y_nE[is_here_nE].mean() == pytest.approx(proba_nE[is_here_nE].mean(), abs=0.1)


def test_a_copy_is_calibrated_too() -> None:
    """The gate's weights may be of any size; a copy that is left alone predicts loads all the same."""
    data = layers(turn=0, noise=0.3)
    loads = []
    for size in (0.01, 1.0, 100.0):
        fitted = predictor().fit(data.X_nH, data.y_nE, weight=size * data.weight_EH)
        assert not fitted.was_tuned_
        loads.append(fitted.predict_load(data.X_nH[:64]))
    np.testing.assert_allclose(loads[0], loads[1], rtol=0.02, atol=0.05)
    np.testing.assert_allclose(loads[2], loads[1], rtol=0.02, atol=0.05)
    all_loads_1E = fitted.predict_load(data.X_nH)[np.newaxis]
    assert relative_l1(all_loads_1E, data.y_nE.sum(axis=0, keepdims=True)) < 0.05


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_a_gate_with_a_correction_is_copied_with_it(scoring: Scoring) -> None:
    data = layers(turn=0, noise=0)
    random = np.random.default_rng(1)
    logits_nE = data.X_nH @ data.weight_EH.T
    activated_nE = torch.from_numpy(logits_nE)
    activated_nE = activated_nE.sigmoid() if scoring == "sigmoid" else activated_nE.softmax(dim=1)
    bias_E = random.normal(scale=0.3, size=NUM_EXPERTS)
    y_nE = one_hot(top_k_of(activated_nE.numpy() + bias_E, TOP_K), NUM_EXPERTS)
    fitted = predictor().fit(data.X_nH, y_nE, weight=data.weight_EH, bias=bias_E, scoring=scoring)
    assert fitted.recall_before_ == pytest.approx(1, abs=1e-3)
    without = predictor().fit(data.X_nH, y_nE, weight=data.weight_EH)
    assert without.recall_before_ < 0.9


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_a_gate_with_a_correction_can_be_fine_tuned(scoring: Scoring) -> None:
    data = layers()
    bias_E = np.zeros(NUM_EXPERTS)
    fitted = predictor().fit(data.X_nH, data.y_nE, weight=data.weight_EH, bias=bias_E, scoring=scoring)
    assert fitted.was_tuned_
    assert fitted.recall_after_ > fitted.recall_before_ + 0.1


def test_it_goes_on_learning_online() -> None:
    data = layers(num_tokens=6000)
    online = predictor()
    online.partial_fit(data.X_nH[:50], data.y_nE[:50], weight=data.weight_EH)
    before = online.score(data.X_nH[-1000:], data.y_nE[-1000:])
    for begin in range(50, 5000, 50):
        online.partial_fit(data.X_nH[begin : begin + 50], data.y_nE[begin : begin + 50])
    assert online.was_tuned_
    assert online.score(data.X_nH[-1000:], data.y_nE[-1000:]) > before + 0.05


def test_learning_online_goes_on_from_what_was_fitted() -> None:
    data = layers(num_tokens=4000)
    fitted = predictor().fit(data.X_nH[:3000], data.y_nE[:3000], weight=data.weight_EH)
    before = fitted.score(data.X_nH[3500:], data.y_nE[3500:])
    fitted.partial_fit(data.X_nH[3000:3010], data.y_nE[3000:3010])
    assert fitted.score(data.X_nH[3500:], data.y_nE[3500:]) == pytest.approx(before, abs=0.03)


def test_tensors_and_arrays_are_predicted_alike() -> None:
    data = layers()
    fitted = predictor().fit(data.X_nH, data.y_nE, weight=data.weight_EH)
    proba_TE = fitted.forward(torch.from_numpy(data.X_nH[:64]))
    np.testing.assert_allclose(proba_TE.numpy(), fitted.predict_proba(data.X_nH[:64]), atol=0.01)
    half_TE = fitted.forward(torch.from_numpy(data.X_nH[:64]).bfloat16())
    np.testing.assert_allclose(half_TE.numpy(), proba_TE.numpy(), atol=0.05)


@given(
    seed=st.integers(0, 2**32 - 1),
    num_experts=st.integers(1, 40),
    size=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_probabilities_sum_to_k_whatever_the_scores(
    seed: int, num_experts: int, size: float, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    random = np.random.default_rng(seed)
    X_nH = random.normal(size=(20, 5)).astype(np.float32)
    y_nE = one_hot(top_k_of(random.random((20, num_experts)), top_k), num_experts)
    fitted = GatePredictor(threshold=0, top_k=top_k).fit(X_nH, y_nE, weight=random.normal(size=(num_experts, 5)))
    fitted.weight_ = (size * fitted.weight_).astype(np.float32)
    fitted._restore()
    proba_TE = fitted.forward(torch.from_numpy(X_nH)).numpy()
    assert proba_TE.min() >= 0
    assert proba_TE.max() <= 1
    np.testing.assert_allclose(proba_TE.sum(axis=1), top_k, rtol=0.01)
    np.testing.assert_allclose(fitted.predict_proba(X_nH).sum(axis=1), top_k, rtol=1e-5)


def test_half_precision_is_taken() -> None:
    data = layers(turn=0)
    fitted = predictor().fit(data.X_nH.astype(np.float16), data.y_nE, weight=data.weight_EH)
    assert fitted.score(data.X_nH.astype(np.float16), data.y_nE) > 0.9


def test_equal_seeds_give_equal_weights() -> None:
    data = layers()
    first, second = (
        predictor(random_state=3).fit(data.X_nH, data.y_nE, weight=data.weight_EH, groups=data.sequence_n)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first.weight_, second.weight_)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    data = layers()
    fitted = predictor().fit(data.X_nH, data.y_nE, weight=data.weight_EH)
    save_predictor(fitted, tmp_path / "gate.safetensors")
    loaded = load_predictor(tmp_path / "gate.safetensors")
    assert isinstance(loaded, GatePredictor)
    assert (loaded.was_tuned_, loaded.recall_before_) == (fitted.was_tuned_, fitted.recall_before_)
    np.testing.assert_array_equal(loaded.predict_proba(data.X_nH), fitted.predict_proba(data.X_nH))


def test_one_that_learns_online_is_saved_and_learns_on(tmp_path: Path) -> None:
    data = layers()
    online = predictor().partial_fit(data.X_nH, data.y_nE, weight=data.weight_EH)
    save_predictor(online, tmp_path / "gate.safetensors")
    loaded = load_predictor(tmp_path / "gate.safetensors")
    np.testing.assert_array_equal(loaded.predict_proba(data.X_nH), online.predict_proba(data.X_nH))
    loaded.partial_fit(data.X_nH, data.y_nE)
    assert not np.array_equal(loaded.weight_, online.weight_)


def test_a_loaded_gate_of_another_shape_is_refused() -> None:
    data = layers()
    arrays, document = to_arrays(predictor(threshold=0).fit(data.X_nH, data.y_nE, weight=data.weight_EH))
    document["values"]["n_features_in_"] = NUM_FEATURES + 1
    with pytest.raises(PredictorFormatError, match=r"weight_ and bias_ must have the shapes \(8, 13\) and \(8,\)"):
        from_arrays(arrays, document, source="a file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": np.zeros((NUM_EXPERTS, 3))}, r"weight must have the shape \(8, 12\)"),
        ({"bias": np.zeros(3)}, r"bias must have the shape \(8,\)"),
        ({"weight": np.full((NUM_EXPERTS, NUM_FEATURES), np.nan)}, "weight must be finite, got nan"),
        ({"scoring": "cosine"}, "scoring must be one of logits, sigmoid, softmax, got 'cosine'"),
        ({"groups": np.zeros(3)}, r"groups must have the shape \(100,\)"),
    ],
)
def test_a_gate_that_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    data = layers(num_tokens=100)
    with pytest.raises(ValueError, match=message):
        predictor().fit(data.X_nH, data.y_nE, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": -0.1}, "threshold must be >= 0, got -0.1"),
        ({"num_steps": 0}, "num_steps must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
        ({"prior_tokens": -1.0}, "prior_tokens must be >= 0, got -1.0"),
        ({"validation_share": 1.0}, "validation_share must be between 0 and 1, got 1.0"),
        ({"top_k": 9}, "top_k must be from 1 to the 8 experts, got 9"),
    ],
)
def test_a_bad_parameter_is_refused(changes: dict[str, Any], message: str) -> None:
    data = layers(num_tokens=100)
    with pytest.raises(ValueError, match=message):
        predictor(**changes).fit(data.X_nH, data.y_nE)


def test_another_gate_cannot_be_given_to_one_that_learns_online() -> None:
    data = layers(num_tokens=100)
    online = predictor().partial_fit(data.X_nH, data.y_nE, weight=data.weight_EH)
    with pytest.raises(ValueError, match="weight and bias must be None once the predictor has a gate"):
        online.partial_fit(data.X_nH, data.y_nE, weight=data.weight_EH)


def test_storage_starts_without_torch() -> None:
    script = "import sys, moeless_predictors.storage; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
