"""Synthetic routing traces for tests and benchmarks, with the structure of real ones.

Every token has a latent state that wanders from token to token and from layer to layer; the router of a layer is a
random linear map of it, beside a fixed liking for some experts. So experts are skewed, neighbours resemble each
other, earlier layers inform about the next, and the hidden states (if generated) inform more than either.

Shapes: S sequences, N tokens of a sequence, L MoE layers, E experts, k experts per token, D latent size, H hidden size.
"""

from __future__ import annotations

import numpy as np

from moeless_predictors.traces.routing import DECODE, PREFILL, RoutingTrace, TraceMetadata

_LATENT_SIZE = 6
"""Fewer and a layer's experts tell more of the next layer's, but more experts are never chosen."""


def synthetic_trace(
    *,
    num_sequences: int = 32,
    tokens_per_sequence: int = 64,
    num_layers: int = 6,
    num_experts: int = 16,
    top_k: int = 2,
    skew: float = 0.25,
    token_dependence: float = 0.7,
    layer_dependence: float = 0.95,
    drift: float = 0.0,
    prompt_tokens: int = 0,
    vocabulary: int = 256,
    hidden_size: int | None = None,
    seed: int = 0,
) -> RoutingTrace:
    """Draw a trace; the same arguments give the same trace.

    With 32 experts and top-4 the defaults come near a recorded trace of gpt-oss-20b: Gini 0.38 (there 0.43), straggler
    2.8 times the mean (2.9), overlap of neighbours 0.44 (0.44), dependency of the next layer 0.28 (0.35).

    Args:
        skew: weight of the fixed liking (its popularity falls like 1 / rank ** skew before the states join in).
        token_dependence: correlation of the latent states of neighbouring tokens, from 0 to below 1.
        layer_dependence: correlation of a token's latent states in neighbouring layers, from 0 to 1.
        drift: how far the liking has turned to another set of experts by the last sequence, from 0 to 1.
        prompt_tokens: tokens at the head of each sequence that are PREFILL and share a step; the others are DECODE.
        vocabulary: token ids are from 0 to below this, and go with the state of the first layer.
        hidden_size: record float32 hidden states of this size for every layer: the latent state, rotated.
    Raises: ValueError for a correlation or drift out of range.
    """
    for name, value in (
        ("token_dependence", token_dependence),
        ("layer_dependence", layer_dependence),
        ("drift", drift),
    ):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {value}")
    metadata = TraceMetadata(
        model="synthetic",
        num_experts=num_experts,
        top_k=top_k,
        num_layers=num_layers,
        source=f"synthetic_trace(seed={seed})",
        hidden_size=hidden_size,
    )
    rng = np.random.default_rng(seed)
    shape_TD = (num_sequences * tokens_per_sequence, _LATENT_SIZE)
    latent_TD = _wandering(rng, num_sequences, tokens_per_sequence, token_dependence).reshape(shape_TD)
    token_ids_T = (latent_TD @ rng.standard_normal((_LATENT_SIZE, vocabulary))).argmax(axis=1)
    turned_T = drift * np.repeat(np.linspace(0, 1, num_sequences), tokens_per_sequence)
    rank_liking_E = -skew * np.log(np.arange(1, num_experts + 1)) * np.sqrt(_LATENT_SIZE)
    experts, weights, hidden = [], [], {}
    rotation_DH = rng.standard_normal((_LATENT_SIZE, hidden_size or 0)) / np.sqrt(_LATENT_SIZE)
    for layer in range(num_layers):
        if layer:
            noise_TD = rng.standard_normal(shape_TD)
            latent_TD = layer_dependence * latent_TD + np.sqrt(1 - layer_dependence**2) * noise_TD
        before_E, after_E = rng.permutation(rank_liking_E), rng.permutation(rank_liking_E)
        liking_TE = before_E + turned_T[:, np.newaxis] * (after_E - before_E)
        logits_TE = liking_TE + latent_TD @ rng.standard_normal((_LATENT_SIZE, num_experts))
        chosen_Tk = np.argsort(-logits_TE, axis=1, kind="stable")[:, :top_k]
        odds_Tk = np.exp(np.take_along_axis(logits_TE, chosen_Tk, axis=1) - logits_TE.max(axis=1, keepdims=True))
        experts.append(chosen_Tk)
        weights.append(odds_Tk / odds_Tk.sum(axis=1, keepdims=True))
        if hidden_size is not None:
            hidden[layer] = (latent_TD @ rotation_DH).astype(np.float32)
    positions_T = np.tile(np.arange(tokens_per_sequence), num_sequences)
    return RoutingTrace.from_arrays(
        metadata,
        experts_TLk=np.stack(experts, axis=1),
        weights_TLk=np.stack(weights, axis=1),
        sequence_lengths_S=np.full(num_sequences, tokens_per_sequence),
        phase_T=np.where(positions_T < prompt_tokens, PREFILL, DECODE),
        token_ids_T=token_ids_T,
        positions_T=positions_T,
        # All sequences run side by side, as in one batch.
        steps_T=np.maximum(positions_T - max(0, prompt_tokens - 1), 0),
        hidden=hidden,
    )


def _wandering(rng: np.random.Generator, num_sequences: int, num_tokens: int, correlation: float) -> np.ndarray:
    """Standard normal states of shape (S, N, D) that keep `correlation` from token to token."""
    states_SND = rng.standard_normal((num_sequences, num_tokens, _LATENT_SIZE))
    for token in range(1, num_tokens):
        states_SND[:, token] *= np.sqrt(1 - correlation**2)
        states_SND[:, token] += correlation * states_SND[:, token - 1]
    return states_SND
