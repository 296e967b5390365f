"""Routing of a large model, made up with the skew and drift that were measured on one.

The log-popularity of an expert is the sum of its group's, its block's and its own (contiguous experts are alike, as in
models that route to groups first), and turns from one workload to another over the sequences. What was measured is
how uneven workers with contiguous experts are, and how much of a plan's balance is left on another workload.

Shapes: S sequences, N tokens of a sequence, L MoE layers, E experts, k experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeless.core.errors import ConfigError
from moeless_predictors.traces import PREFILL, RoutingTrace, TraceMetadata


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeUpRouting:
    """The defaults come near DeepSeek-V3's prefill (58 layers, 256 experts, top-8).

    There, with contiguous experts, the busiest worker has 2.07 times the mean load at 8 workers and 3.04 at 32, as a
    mean over layers; with 32 extra replicas fitted to a window, 1.001 and 1.006 in that window, and 1.12 to 1.14 and
    1.41 to 1.44 in a window of another workload.
    """

    num_sequences: int = 32
    tokens_per_sequence: int = 512
    num_layers: int = 58
    num_experts: int = 256
    top_k: int = 8
    group_size: int = 32
    block_size: int = 8
    group_spread: float = 0.59
    """Standard deviation of the log-popularity of groups, of blocks within them, and of experts within these."""
    block_spread: float = 0.3
    expert_spread: float = 0.6
    drift: float = 0.38
    """Turn of the popularity towards an independent one by the last sequence: 1 is a quarter turn."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_sequences", "tokens_per_sequence", "num_layers", "num_experts", "group_size", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"routing.{name} must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"routing.top_k must be from 1 to the number of experts ({self.num_experts}), got {self.top_k}"
            )
        for name in ("group_spread", "block_spread", "expert_spread"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"routing.{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.drift <= 1:
            raise ConfigError(f"routing.drift must be from 0 to 1, got {self.drift}")


def make_routing(config: MadeUpRouting) -> RoutingTrace:
    """Draw a trace, its tokens prompts; the same settings give the same trace.

    A token's experts are drawn without replacement in proportion to their popularity.
    """
    rng = np.random.default_rng(config.seed)
    first_LE, last_LE = _log_popularity(rng, config), _log_popularity(rng, config)
    num_tokens = config.num_sequences * config.tokens_per_sequence
    experts_TLk = np.empty((num_tokens, config.num_layers, config.top_k), dtype=np.uint16)
    weights_TLk = np.empty(experts_TLk.shape, dtype=np.float16)
    for sequence in range(config.num_sequences):
        angle = config.drift * np.pi / 2 * sequence / max(1, config.num_sequences - 1)
        popularity_LE = (np.cos(angle) * first_LE + np.sin(angle) * last_LE).astype(np.float32)
        rows = slice(sequence * config.tokens_per_sequence, (sequence + 1) * config.tokens_per_sequence)
        for layer in range(config.num_layers):
            # The k earliest of exponential clocks that tick as fast as the experts are popular.
            clocks_NE = rng.standard_exponential((config.tokens_per_sequence, config.num_experts), dtype=np.float32)
            clocks_NE *= np.exp(-popularity_LE[layer])
            chosen_Nk = np.argpartition(clocks_NE, config.top_k - 1, axis=1)[:, : config.top_k]
            odds_Nk = np.exp(popularity_LE[layer])[chosen_Nk]
            experts_TLk[rows, layer] = chosen_Nk
            weights_TLk[rows, layer] = odds_Nk / odds_Nk.sum(axis=1, keepdims=True)
    return RoutingTrace.from_arrays(
        TraceMetadata(
            model=f"made up: {config.num_layers} layers x {config.num_experts} experts, top-{config.top_k}",
            num_experts=config.num_experts,
            top_k=config.top_k,
            num_layers=config.num_layers,
            source=f"simulate.generator, seed {config.seed}, drift {config.drift:g}",
        ),
        experts_TLk=experts_TLk,
        weights_TLk=weights_TLk,
        sequence_lengths_S=np.full(config.num_sequences, config.tokens_per_sequence),
        phase_T=np.full(num_tokens, PREFILL),
    )


def _log_popularity(rng: np.random.Generator, config: MadeUpRouting) -> NDArray[np.float64]:
    """Shape (L, E)."""
    total_LE = np.zeros((config.num_layers, config.num_experts))
    for size, spread in (
        (config.group_size, config.group_spread),
        (config.block_size, config.block_spread),
        (1, config.expert_spread),
    ):
        num_parts = -(-config.num_experts // size)
        parts = spread * rng.standard_normal((config.num_layers, num_parts))
        total_LE += np.repeat(parts, size, axis=1)[:, : config.num_experts]
    return total_LE
