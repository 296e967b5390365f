"""Settings of the dispatcher. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moeless.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchConfig:
    """Timeouts and retries of the dispatcher. Raises ConfigError for values out of range."""

    call_timeout_s: float = 5.0
    """A worker that has not answered a decoding step's layer after this long counts as failed; hundreds of times a
    slow layer's compute, so that only a stuck process is hit."""
    call_timeout_per_row_s: float = 0.005
    """Time that each row of a long call (a prefill) adds to the timeout."""

    def __post_init__(self) -> None:
        if not 0 < self.call_timeout_s < math.inf:
            raise ConfigError(f"dispatch.call_timeout_s must be > 0 and finite, got {self.call_timeout_s}")
        if not 0 <= self.call_timeout_per_row_s < math.inf:
            raise ConfigError(
                f"dispatch.call_timeout_per_row_s must be >= 0 and finite, got {self.call_timeout_per_row_s}"
            )

    def timeout_s(self, num_rows: int) -> float:
        """Seconds that a call of `num_rows` rows may take."""
        return self.call_timeout_s + self.call_timeout_per_row_s * num_rows
