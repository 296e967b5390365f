"""Costs in seconds: an expert's tokens, the backbone's step, the exchange with workers, a start.

Used by simulate, and by planners that weigh a move's gain against its cost. Pure.

Two topologies. Hub: the engine keeps the hidden states, sends each worker one message a layer and gets partial sums
back. All-to-all: every worker computes attention for its part of the batch and sends tokens to the workers of their
experts (expert parallelism).

Shapes: L MoE layers, W workers, K knots.
"""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, xlogy

from moeless.core.arrays import FloatArray, read_only
from moeless.core.call_cost import CallCost
from moeless.core.cluster import Cluster, ModelShape
from moeless.core.errors import ConfigError
from moeless_predictors.compiled import compiled

_MAX_POISSON = 512.0
"""Mean tokens up to which a Poisson distribution is averaged over."""


def _fixed(values: Sequence[float]) -> FloatArray:
    array = np.array(values)
    read_only(array)
    return array


@dataclass(frozen=True)
class ExpertTime:
    """Seconds of a call of one instance by its tokens: piecewise linear between knots.

    Below the first knot as at it (reading the weights is what costs), above the last with its slope; a call of no
    tokens costs nothing.
    """

    tokens_K: tuple[float, ...]
    seconds_K: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.tokens_K) < 2 or len(self.tokens_K) != len(self.seconds_K):
            raise ConfigError(
                f"expert_time must have at least two knots, each with tokens and seconds, got {self.tokens_K} and "
                f"{self.seconds_K}"
            )
        if not (np.isfinite(self.tokens_K).all() and np.isfinite(self.seconds_K).all()):
            raise ConfigError(f"expert_time: knots must be finite, got {self.tokens_K} and {self.seconds_K}")
        if not (self.tokens_K[0] >= 1 and (np.diff(self.tokens_K) > 0).all()):
            raise ConfigError(f"expert_time: tokens of the knots must rise from at least 1, got {self.tokens_K}")
        if not (self.seconds_K[0] > 0 and (np.diff(self.seconds_K) >= 0).all()):
            raise ConfigError(f"expert_time: seconds of the knots must be > 0 and never fall, got {self.seconds_K}")

    @classmethod
    def from_knots(cls, knots: Sequence[tuple[float, float]]) -> Self:
        """From (tokens, seconds) pairs in any order."""
        ordered = sorted(knots)
        return cls(tuple(float(tokens) for tokens, _ in ordered), tuple(float(seconds) for _, seconds in ordered))

    @classmethod
    def from_roofline(
        cls, *, expert_bytes: float, flops_per_token: float, bytes_per_s: float, flops_per_s: float, call_s: float
    ) -> Self:
        """The larger of reading the weights and computing, and `call_s` beside either.

        Args:
            bytes_per_s, flops_per_s: what the device reaches, not its data sheet.
        """
        reading_s = expert_bytes / bytes_per_s
        knee = max(2.0, reading_s * flops_per_s / flops_per_token)
        return cls.from_knots([(tokens, call_s + max(reading_s, tokens * flops_per_token / flops_per_s))
                               for tokens in (1.0, knee, 4 * knee)])  # fmt: skip

    @classmethod
    def from_gemm_table(cls, path: str | os.PathLike[str]) -> Self:
        """From a CSV with a row for each matrix product of an expert: `tokens_per_expert`, `us_per_expert_gemm`.

        Raises: ConfigError that names file, line and column.
        """
        seconds_by_tokens: dict[float, float] = defaultdict(float)
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                try:
                    seconds_by_tokens[float(row["tokens_per_expert"])] += float(row["us_per_expert_gemm"]) * 1e-6
                except (KeyError, TypeError, ValueError) as error:
                    raise ConfigError(
                        f"{path}: each row must have the numbers tokens_per_expert and us_per_expert_gemm, got {row}"
                    ) from error
        return cls.from_knots(list(seconds_by_tokens.items()))

    def __call__(self, tokens: ArrayLike) -> FloatArray:
        """Seconds, of the shape of `tokens` (>= 0)."""
        given = np.asarray(tokens, dtype=np.float64)
        tokens_K, seconds_K = self.knots
        seconds: FloatArray = np.interp(given, tokens_K, seconds_K)
        after = seconds_K[-1] + (given - tokens_K[-1]) * self.last_slope
        return np.where(given <= 0, 0.0, np.where(given > tokens_K[-1], after, seconds))

    @cached_property
    def knots(self) -> tuple[FloatArray, FloatArray]:
        """Tokens and seconds as arrays, read-only."""
        return _fixed(self.tokens_K), _fixed(self.seconds_K)

    @property
    def last_slope(self) -> float:
        """Seconds per token above the last knot."""
        return (self.seconds_K[-1] - self.seconds_K[-2]) / (self.tokens_K[-1] - self.tokens_K[-2])

    def call_cost(self, *, link_s: float = 0.0) -> CallCost:
        """The same in tokens, as dispatch evens out a step: the last slope is a token's time.

        Args:
            link_s: of sending a token to its worker and the answer back.
        """
        tokens, seconds, slope = self.tokens_K[-1], self.seconds_K[-1], self.last_slope
        if not slope > 0:
            return CallCost(floor_tokens=tokens, link_tokens=link_s * tokens / seconds)
        call_tokens = max(0.0, seconds / slope - tokens)
        return CallCost(
            call_tokens=call_tokens,
            floor_tokens=max(0.0, self.seconds_K[0] / slope - call_tokens),
            link_tokens=link_s / slope,
        )

    def averaged(self) -> MeanExpertTime:
        """Mean seconds of a call by its mean tokens: a call of a tenth of a token mostly does not happen."""
        means = np.concatenate(([0.0], 2.0 ** np.arange(-8, np.log2(_MAX_POISSON) + 0.125, 0.125)))
        tokens, means_K1 = np.arange(int(2 * _MAX_POISSON)), means[:, np.newaxis]
        chances = np.exp(xlogy(tokens, means_K1) - means_K1 - gammaln(tokens + 1))
        seconds = chances @ self(tokens)
        return MeanExpertTime(self, tuple(means.tolist()), tuple(seconds.tolist()))


@dataclass(frozen=True)
class MeanExpertTime:
    """The mean of an ExpertTime over steps, of tokens that come independently of each other: as forecasts are means.

    Between knots of mean tokens, above which the mean's own time is close enough.
    """

    expert_time: ExpertTime
    means_K: tuple[float, ...]
    seconds_K: tuple[float, ...]

    def __call__(self, mean_tokens: ArrayLike) -> FloatArray:
        """Seconds, of the shape of `mean_tokens` (>= 0)."""
        given = np.asarray(mean_tokens, dtype=np.float64)
        means_K, seconds_K = self._knots
        seconds: FloatArray = np.interp(given, means_K, seconds_K)
        is_beyond = given > means_K[-1]
        if is_beyond.any():
            seconds = np.where(is_beyond, self.expert_time(given), seconds)
        return seconds

    @cached_property
    def _knots(self) -> tuple[FloatArray, FloatArray]:
        return _fixed(self.means_K), _fixed(self.seconds_K)


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneTime:
    """Seconds of an engine step without the routed experts."""

    step_s: float
    """Fixed time of a step, whatever the batch: launching kernels, reading weights."""
    token_s: float
    """For each token."""
    decode_context_s: float
    """For each decoded token and each token before it: reading the KV cache."""
    prefill_context_s: float
    """The same for tokens of prompts: computing attention."""

    def __post_init__(self) -> None:
        for name in ("step_s", "token_s", "decode_context_s", "prefill_context_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"backbone.{name} must be at least 0, got {getattr(self, name)}")

    def seconds(self, *, num_tokens: float, decode_context: float, prefill_context: float, devices: float) -> float:
        """Return a step's time in the backbone.

        Args:
            decode_context, prefill_context: sum over the tokens of the phase of their positions.
            devices: number of devices that share the batch; each takes `step_s`.
        """
        shared = (
            num_tokens * self.token_s
            + decode_context * self.decode_context_s
            + prefill_context * self.prefill_context_s
        )
        return self.step_s + shared / devices


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeTime:
    """Seconds of an exchange with workers beside bytes over bandwidth, each way."""

    hub_s: float
    """Fixed time of a hub's exchange, however many workers it touches."""
    message_s: float
    """For each worker touched, one message after the other at the engine."""
    all_to_all_s: float
    """Fixed time of an all-to-all exchange."""
    combine_ratio: float = 1.0
    """Bytes of a token's partial sum over those of its hidden state: 2 if it goes out in FP8 and back in BF16."""
    split_s: float = 0.0
    """Time to split a layer's tokens over replicas before they are sent, as the dispatcher does for each step."""
    split_token_s: float = 0.0
    """The same for each token of the step."""

    def __post_init__(self) -> None:
        for name in ("hub_s", "message_s", "all_to_all_s", "split_s", "split_token_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"exchange.{name} must be at least 0, got {getattr(self, name)}")
        if not self.combine_ratio > 0:
            raise ConfigError(f"exchange.combine_ratio must be above 0, got {self.combine_ratio}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CostProfile:
    """The costs of one model on one kind of worker."""

    name: str
    source: str
    """Source of the figures, in words."""
    model: ModelShape
    expert_time: ExpertTime
    """On a worker of speed 1."""
    backbone: BackboneTime
    exchange: ExchangeTime
    start_s: float = 0.0
    """Time to start an instance besides fetching its bytes: finding the file, allocating, the copy's set-up."""
    worker_start_s: tuple[float, float] = (10.0, 40.0)
    """Range of the time from starting a worker until it can fetch: process, device context, framework."""
    device_bytes: int | None = None
    """Memory of the device that is a worker, experts being a part of what it holds; None: unknown."""

    def __post_init__(self) -> None:
        if not self.start_s >= 0:
            raise ConfigError(f"profile {self.name}: start_s must be at least 0, got {self.start_s}")
        shortest_s, longest_s = self.worker_start_s
        if not 0 <= shortest_s <= longest_s:
            raise ConfigError(
                f"profile {self.name}: worker_start_s must be a range from a minimum >= 0 to a maximum, got "
                f"{self.worker_start_s}"
            )

    def link_s(self, cluster: Cluster) -> float:
        """Seconds that a token takes on its worker's link, there and back; where there are nodes, between them."""
        has_nodes = len({worker.node for worker in cluster.workers}) > 1
        bytes_per_s = cluster.remote_bytes_per_s if has_nodes else cluster.local_bytes_per_s
        return self.model.hidden_bytes * (1 + self.exchange.combine_ratio) / bytes_per_s

    def start_time(self, num_bytes: float, bytes_per_s: float) -> float:
        """Seconds of starting one instance over a link that gives it `bytes_per_s`."""
        return self.start_s + num_bytes / bytes_per_s


def hub_seconds(
    tokens_LW: FloatArray,
    cluster: Cluster,
    exchange: ExchangeTime,
    *,
    token_bytes: float,
    engine_node: int = 0,
    engine_links: float = 1.0,
    free_link_W: FloatArray | None = None,
) -> FloatArray:
    """Seconds, shape (L,), of one engine's messages to its workers in each layer, or of their answers.

    The engine's links and each worker's carry their bytes at once; the slowest decides.

    Args:
        tokens_LW: distinct tokens that each worker gets; one with none gets no message.
        token_bytes: of one token, that way.
        engine_node: index of the node the engine is on; workers of others are reached by `remote_bytes_per_s`.
        engine_links: bandwidth of the engine, in links of a worker.
        free_link_W: share of each worker's bandwidth that transfers leave, in (0, 1]; default: all.
    """
    is_near_W = cluster.node_W == engine_node
    bandwidth_W = np.where(is_near_W, cluster.local_bytes_per_s, cluster.remote_bytes_per_s)
    seconds_L = np.empty(len(tokens_LW))
    _hub_seconds_L(
        np.ascontiguousarray(tokens_LW, dtype=np.float64),
        token_bytes / (bandwidth_W if free_link_W is None else bandwidth_W * free_link_W),
        is_near_W,
        float(token_bytes / (engine_links * cluster.local_bytes_per_s)),
        float(token_bytes / (engine_links * cluster.remote_bytes_per_s)),
        float(exchange.hub_s),
        float(exchange.message_s),
        seconds_L,
    )
    return seconds_L


@compiled
def _hub_seconds_L(
    tokens_LW: FloatArray,
    token_s_W: FloatArray,
    is_near_W: NDArray[np.bool_],
    near_token_s: float,
    far_token_s: float,
    exchange_s: float,
    message_s: float,
    seconds_L: FloatArray,
) -> None:
    """Fill in the times of `hub_seconds`: a token takes `token_s_W` on its worker's link, and `near_token_s` or
    `far_token_s` on the engine's links to its own node and to others."""
    for layer in range(len(tokens_LW)):
        slowest_s, near, far, touched = 0.0, 0.0, 0.0, 0
        for worker in range(len(token_s_W)):
            tokens = tokens_LW[layer, worker]
            if tokens > 0:
                touched += 1
                slowest_s = max(slowest_s, tokens * token_s_W[worker])
                if is_near_W[worker]:
                    near += tokens
                else:
                    far += tokens
        slowest_s = max(slowest_s, near * near_token_s, far * far_token_s)
        seconds_L[layer] = exchange_s + touched * message_s + slowest_s if touched else 0.0


def all_to_all_seconds(
    tokens_LW: FloatArray,
    cluster: Cluster,
    exchange: ExchangeTime,
    *,
    token_bytes: float,
    free_link_W: FloatArray | None = None,
) -> FloatArray:
    """Seconds, shape (L,), of one exchange among the workers in each layer.

    Tokens start evenly spread over the workers, so a worker's own part stays. Bytes within and between nodes travel
    at once, sending beside receiving; the slowest worker decides.

    Args:
        tokens_LW: distinct tokens that each worker computes.
        token_bytes: of one token.
        free_link_W: share of each worker's bandwidth that transfers leave, in (0, 1]; default: all.
    """
    num_workers = cluster.num_workers
    node_W = cluster.node_W
    near_W = np.bincount(node_W)[node_W] - 1
    far_W = num_workers - 1 - near_W
    free_W = 1.0 if free_link_W is None else free_link_W
    # Seconds for each token that a worker gets: the slower of its two links.
    per_token_W = (
        np.maximum(near_W / cluster.local_bytes_per_s, far_W / cluster.remote_bytes_per_s) * token_bytes / num_workers
    ) / free_W
    sent_L1 = tokens_LW.mean(axis=1, keepdims=True)
    seconds_L: FloatArray = (sent_L1[:, 0] > 0) * (
        exchange.all_to_all_s + (np.maximum(tokens_LW, sent_L1) * per_token_W).max(axis=1)
    )
    return seconds_L
