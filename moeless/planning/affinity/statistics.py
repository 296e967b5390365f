"""Statistics of experts used together in a routing trace: sets chosen at once, and transitions between layers.

Gathered from recorded routing; read by the cost, the local search and the integer programmes. Rates are per token, so
that traces of any length compare.

Shapes: T tokens, L MoE layers, E experts, k experts per token, U distinct sets of experts of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ExpertSets:
    """The distinct sets that tokens chose in one layer."""

    experts_Uk: IntArray
    """Ascending in each row; rows in lexicographic order."""
    weight_U: FloatArray
    """Share of the tokens that chose the set; they sum to 1."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class AffinityStatistics:
    """Statistics of a model's routing that placement by affinity needs."""

    num_tokens: int
    num_experts: int
    top_k: int
    sets: tuple[ExpertSets, ...]
    """Sets of experts chosen at once, layer by layer."""
    transitions_LEE: FloatArray
    """Shape (L - 1, E, E): of the k × k pairs of a token's expert in layer l with one in layer l + 1, the share that is
    this pair. Each layer's sum to 1."""

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.sets)

    @property
    def load_LE(self) -> FloatArray:
        """Share of the tokens that choose each expert; a layer's sum to k."""
        load_LE: FloatArray = np.stack([
            np.bincount(sets.experts_Uk.reshape(-1), np.repeat(sets.weight_U, self.top_k), self.num_experts)
            for sets in self.sets
        ])  # fmt: skip
        return load_LE

    def coactivation_EE(self, layer: int) -> FloatArray:
        """Share of the tokens that choose both of two experts; on the diagonal, one."""
        sets = self.sets[layer]
        together_EE = np.zeros((self.num_experts, self.num_experts))
        for one in range(self.top_k):
            for other in range(self.top_k):
                np.add.at(together_EE, (sets.experts_Uk[:, one], sets.experts_Uk[:, other]), sets.weight_U)
        return together_EE


def gather_statistics(experts_TLk: IntArray, *, num_experts: int, max_tokens: int | None = None) -> AffinityStatistics:
    """Count sets and transitions.

    Args:
        experts_TLk: the router's choices, different experts for each token and layer.
        max_tokens: tokens to take, evenly spaced: the search's time grows with the number of distinct sets.
    Raises: ConfigError if there is no token, or an expert is chosen that the model does not have or twice at once.
    """
    if experts_TLk.ndim != 3 or 0 in experts_TLk.shape:
        raise ConfigError(
            f"experts_TLk must be of tokens, layers and choices, at least one each, got {experts_TLk.shape}"
        )
    if experts_TLk.min() < 0 or experts_TLk.max() >= num_experts:
        raise ConfigError(
            f"experts_TLk must be from 0 to {num_experts - 1}, got {experts_TLk.min()} to {experts_TLk.max()}"
        )
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
    if max_tokens is not None and len(experts_TLk) > max_tokens:
        experts_TLk = experts_TLk[np.arange(max_tokens) * len(experts_TLk) // max_tokens]
    sorted_TLk = np.sort(experts_TLk.astype(np.int64), axis=2)
    if (np.diff(sorted_TLk, axis=2) == 0).any():
        raise ConfigError("experts_TLk must hold different experts for each token and layer, got one twice")
    num_tokens, num_layers, top_k = experts_TLk.shape
    sets, transitions = [], []
    for layer in range(num_layers):
        rows_Uk, counts_U = np.unique(sorted_TLk[:, layer], axis=0, return_counts=True)
        sets.append(ExpertSets(experts_Uk=rows_Uk, weight_U=counts_U / num_tokens))
        if layer + 1 < num_layers:
            pairs = sorted_TLk[:, layer, :, np.newaxis] * num_experts + sorted_TLk[:, layer + 1, np.newaxis, :]
            counts = np.bincount(pairs.reshape(-1), minlength=num_experts**2)
            transitions.append(counts.reshape(num_experts, num_experts) / pairs.size)
    return AffinityStatistics(
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=top_k,
        sets=tuple(sets),
        transitions_LEE=np.array(transitions).reshape(num_layers - 1, num_experts, num_experts),
    )
