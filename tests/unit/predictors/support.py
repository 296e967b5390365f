"""Small routings for the predictors' tests.

Shapes: n tokens, S experts of the source layer, E experts of the predicted one, k experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from moeless_predictors.arrays import FloatArray
from moeless_predictors.base import one_hot, top_k_of


@dataclass(frozen=True)
class Routing:
    X_nS: FloatArray
    y_nE: FloatArray
    top_k: int


def random_routing(
    seed: int, *, num_tokens: int = 40, num_sources: int = 6, num_experts: int = 8, top_k: int = 2
) -> Routing:
    """Tokens whose experts depend on their source experts, and on a popularity that is far from even."""
    random = np.random.default_rng(seed)
    X_nS = one_hot(top_k_of(random.random((num_tokens, num_sources)), min(top_k, num_sources)), num_sources)
    affinity_SE = random.normal(size=(num_sources, num_experts))
    scores_nE = X_nS @ affinity_SE + random.normal(size=num_experts) + 0.5 * random.normal(size=(num_tokens, 1))
    scores_nE = scores_nE + 0.3 * random.normal(size=scores_nE.shape)
    return Routing(X_nS=X_nS, y_nE=one_hot(top_k_of(scores_nE, top_k), num_experts), top_k=top_k)


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    num_experts = draw(st.integers(1, 9))
    return random_routing(
        draw(st.integers(0, 2**32 - 1)),
        num_tokens=draw(st.integers(1, 40)),
        num_sources=draw(st.integers(1, 9)),
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
    )
