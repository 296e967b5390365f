"""What a call of an expert costs the worker that computes it, as balancing counts it."""

from __future__ import annotations

from dataclasses import dataclass

from moeless.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class CallCost:
    """What a call of an expert costs a worker, in the time of computing one more token:
    `call_tokens` + max(tokens, `floor_tokens`) + tokens × `link_tokens`."""

    call_tokens: float = 0.0
    """Of the call itself."""
    floor_tokens: float = 0.0
    """As many tokens as take as long as reading the expert's weights."""
    link_tokens: float = 0.0
    """Of sending a token to the worker and its answer back, over the worker's link."""

    def __post_init__(self) -> None:
        for name in ("call_tokens", "floor_tokens", "link_tokens"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"call_cost.{name} must be at least 0 and finite, got {getattr(self, name)}")

    def __call__(self, tokens: float) -> float:
        """0 without tokens."""
        if not tokens:
            return 0.0
        return self.call_tokens + max(tokens, self.floor_tokens) + tokens * self.link_tokens
