"""Observation and Planner: the interface of every planner, moeless's own and the baselines.

Made by the live loop and the simulator, read by the planners.

Shapes: L MoE layers, E experts per layer, P instances being started.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.errors import ConfigError
from moeless.core.plan import Plan
from moeless.planning.load_check import check_load


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Observation:
    """Past and forecast load at one moment. All arrays are read-only."""

    time_s: float
    """Time of the observation, on a clock of which only differences count."""
    mean_LE: FloatArray
    """Forecast tokens per engine step, over the window that the plan is for: of the step that the average token is in,
    since steps with prompts are few between many without, and most of the work."""
    upper_LE: FloatArray
    """The same at the policy's forecast quantile."""
    window_LE: FloatArray
    """Observed tokens per engine step, mean over the last window: what planners see that look back."""
    last_used_s_LE: FloatArray
    """Time of each function's last token, on the clock of `time_s`; -inf if it never got one."""
    num_steps: int
    """Engine steps so far."""
    pending_keys: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Instances being started, shape (P,), as in `Plan.keys_N`: (layer × E + expert) × W + worker."""

    def __post_init__(self) -> None:
        """Raises ConfigError that names the field: loads are finite and >= 0, and all shapes the same."""
        if not np.isfinite(self.time_s):
            raise ConfigError(f"observation.time_s must be finite, got {self.time_s}")
        if self.num_steps < 0:
            raise ConfigError(f"observation.num_steps must be at least 0, got {self.num_steps}")
        if self.mean_LE.ndim != 2:
            raise ConfigError(f"observation.mean_LE must be of layers × experts, got the shape {self.mean_LE.shape}")
        for name in ("mean_LE", "upper_LE", "window_LE", "last_used_s_LE"):
            array_LE: FloatArray = getattr(self, name)
            if array_LE.shape != self.mean_LE.shape:
                raise ConfigError(
                    f"observation.{name} must have the shape of mean_LE, {self.mean_LE.shape}, got {array_LE.shape}"
                )
            if name != "last_used_s_LE":
                check_load(f"observation.{name}", array_LE, self.mean_LE.shape)
        if not (self.last_used_s_LE <= self.time_s).all():
            raise ConfigError(
                f"observation.last_used_s_LE must be at most time_s ({self.time_s}), got {self.last_used_s_LE.max()}"
            )


class Planner(Protocol):
    """Decides a plan. May remember what it saw, but decides from that alone: no clock, no randomness."""

    name: str

    def plan(self, observation: Observation, previous: Plan | None) -> Plan:
        """The plan to come into force; `previous` itself where nothing changes. None: nothing is hosted yet.

        A new plan's version is above the previous one's.
        """
        ...
