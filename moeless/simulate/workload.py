"""Requests to simulate: made-up arrivals, and changes of recorded ones.

Shapes: R requests.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeless.core.errors import ConfigError
from moeless_predictors.traces import ArrivalTrace


def made_up_arrivals(
    *,
    rate_per_s: float,
    num_requests: int,
    prompt_tokens: int,
    output_tokens: int,
    gap_cv: float = 1.0,
    length_cv: float = 0.0,
    seed: int = 0,
) -> ArrivalTrace:
    """Requests whose gaps are gamma distributed: a Poisson process if `gap_cv` is 1, burstier above, 0 for a clock.

    Args:
        prompt_tokens, output_tokens: the mean; at least 1 each.
        gap_cv: coefficient of variation of the gaps.
        length_cv: of both lengths, log-normal; 0: all alike.
    """
    for name, value, least in (
        ("num_requests", num_requests, 1),
        ("prompt_tokens", prompt_tokens, 1),
        ("output_tokens", output_tokens, 1),
        ("gap_cv", gap_cv, 0),
        ("length_cv", length_cv, 0),
    ):
        if not value >= least:
            raise ConfigError(f"arrivals.{name} must be at least {least}, got {value}")
    if not rate_per_s > 0:
        raise ConfigError(f"arrivals.rate_per_s must be above 0, got {rate_per_s}")
    rng = np.random.default_rng(seed)
    if gap_cv > 0:
        gaps = rng.gamma(gap_cv**-2, gap_cv**2 / rate_per_s, num_requests)
    else:
        gaps = np.full(num_requests, 1 / rate_per_s)
    return ArrivalTrace.from_arrays(
        arrival_s=np.cumsum(gaps),
        prompt_tokens=_lengths(rng, prompt_tokens, length_cv, num_requests),
        output_tokens=_lengths(rng, output_tokens, length_cv, num_requests),
        source=f"made up: {rate_per_s:g} requests/s, gap CV {gap_cv:g}, seed {seed}",
    )


def thinned(trace: ArrivalTrace, share: float, *, seed: int = 0) -> ArrivalTrace:
    """Keep each request with probability `share`; the clock stays as it is."""
    if not 0 < share <= 1:
        raise ConfigError(f"arrivals.share must be above 0 and at most 1, got {share}")
    if share == 1:
        return trace
    is_kept = np.random.default_rng(seed).random(trace.num_requests) < share
    if not is_kept.any():
        raise ConfigError(f"arrivals.share must leave a request of {trace.num_requests}, got {share}")
    return _selected(trace, is_kept, f"thinned to {share:g}")


def cut(trace: ArrivalTrace, *, duration_s: float | None = None, num_requests: int | None = None) -> ArrivalTrace:
    """The requests of the first seconds, or the first requests."""
    if duration_s is not None and not duration_s > 0:
        raise ConfigError(f"arrivals.duration_s must be above 0, got {duration_s}")
    if num_requests is not None and num_requests < 1:
        raise ConfigError(f"arrivals.num_requests must be at least 1, got {num_requests}")
    is_kept = np.ones(trace.num_requests, dtype=np.bool_)
    if duration_s is not None:
        is_kept &= trace.arrival_s <= duration_s
    if num_requests is not None:
        is_kept[num_requests:] = False
    if not is_kept.any():
        raise ConfigError(f"arrivals.duration_s must leave a request of {trace.num_requests}, got {duration_s}")
    return trace if is_kept.all() else _selected(trace, is_kept, "cut")


def sped_up(trace: ArrivalTrace, factor: float) -> ArrivalTrace:
    """The same requests, `factor` times as fast after each other."""
    if not factor > 0:
        raise ConfigError(f"arrivals.speed must be above 0, got {factor}")
    if factor == 1:
        return trace
    return ArrivalTrace.from_arrays(
        arrival_s=trace.arrival_s / factor,
        prompt_tokens=trace.prompt_tokens,
        output_tokens=trace.output_tokens,
        source=f"{trace.source} x{factor:g}".strip(),
    )


def _selected(trace: ArrivalTrace, is_kept: NDArray[np.bool_], how: str) -> ArrivalTrace:
    return ArrivalTrace.from_arrays(
        arrival_s=trace.arrival_s[is_kept],
        prompt_tokens=trace.prompt_tokens[is_kept],
        output_tokens=trace.output_tokens[is_kept],
        source=f"{trace.source} {how}".strip(),
    )


def _lengths(rng: np.random.Generator, mean: int, cv: float, num_requests: int) -> NDArray[np.int64]:
    sigma = np.sqrt(np.log1p(cv**2))
    lengths = mean * np.exp(sigma * rng.standard_normal(num_requests) - sigma**2 / 2)
    whole: NDArray[np.int64] = np.maximum(1, np.rint(lengths)).astype(np.int64)
    return whole
