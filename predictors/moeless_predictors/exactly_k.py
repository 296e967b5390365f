"""Probabilities of drawing exactly k experts: a threshold for each token, such that its sigmoids sum to k.

Called by the gate predictor, between two layers of a step and in fine-tuning.

Shapes: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

import numpy as np

from moeless_predictors.arrays import FloatArray
from moeless_predictors.compiled import compiled


@compiled
def thresholds(scores_TE: FloatArray, top_k: int, num_steps: int) -> FloatArray:
    """Each row's c, shape (T, 1), such that the sigmoids of score - c sum to `top_k`, which must be < E.

    Newton's method on the log-odds of the sum, in which scores that are all alike need one step, from the middle
    between the k-th score and the next.

    Args:
        num_steps: of Newton's method.
    """
    num_rows, num_experts = scores_TE.shape
    target = np.log(top_k / (num_experts - top_k))
    threshold_T1 = np.empty((num_rows, 1), dtype=np.float32)
    highest = np.empty(top_k + 1)
    for row in range(num_rows):
        scores_E = scores_TE[row]
        highest[:] = -np.inf
        for score in scores_E:
            place = top_k
            if score > highest[place]:
                while place > 0 and highest[place - 1] < score:
                    highest[place] = highest[place - 1]
                    place -= 1
                highest[place] = score
        threshold = (highest[top_k - 1] + highest[top_k]) / 2
        for _ in range(num_steps):
            total = squares = 0.0
            for score in scores_E:
                proba = 1 / (1 + np.exp(np.float32(threshold) - score))
                total += proba
                squares += proba * proba
            share = total / num_experts
            slope = share - squares / num_experts
            bounded = min(max(share, 1e-6), 1 - 1e-6)
            excess = np.log(bounded / (1 - bounded)) - target
            threshold += min(max(excess * share * (1 - share) / (slope + 1e-5), -4.0), 4.0)
        threshold_T1[row, 0] = threshold
    return threshold_T1
