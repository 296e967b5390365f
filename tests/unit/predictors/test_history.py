from __future__ import annotations

import numpy as np
import pytest

from moeless_predictors.history import HistoryPredictor
from tests.unit.predictors.support import random_routing


@pytest.mark.parametrize("num_tokens", [1, 48, 49, 200])
def test_small_and_large_batches_are_predicted_alike(num_tokens: int) -> None:
    routing = random_routing(3, num_tokens=200)
    predictor = HistoryPredictor(epochs=1, min_steps=1, hidden_units=16).fit(routing.X_nS, routing.y_nE)
    X_nS = routing.X_nS[:num_tokens]
    one_by_one = np.concatenate([predictor.predict_proba(X_nS[i : i + 1]) for i in range(num_tokens)])
    np.testing.assert_allclose(predictor.predict_proba(X_nS), one_by_one, atol=1e-5)
