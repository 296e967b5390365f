"""Cost of a call of an expert to the worker that computes it, as balancing counts it."""

from __future__ import annotations

from dataclasses import dataclass

from moeless.core.errors import ConfigError


def call_work(tokens: float, call_tokens: float, floor_tokens: float, link_tokens: float) -> float:
    """Cost of a call, in the time of computing one more token; 0 without tokens.

    The formula of CallCost on plain numbers, which planning.step_balance compiles.
    """
    if tokens <= 0:
        return 0.0
    return call_tokens + max(tokens, floor_tokens) + tokens * link_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class CallCost:
    """Cost of a call of an expert to its worker, in the time of computing one more token:
    `call_tokens` + max(tokens, `floor_tokens`) + tokens × `link_tokens`."""

    call_tokens: float = 0.0
    """The call itself."""
    floor_tokens: float = 0.0
    """Tokens that take as long as reading the expert's weights."""
    link_tokens: float = 0.0
    """Sending a token to the worker and its partial sum back, over the worker's link."""

    def __post_init__(self) -> None:
        for name in ("call_tokens", "floor_tokens", "link_tokens"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"call_cost.{name} must be at least 0 and finite, got {getattr(self, name)}")

    @property
    def numbers(self) -> tuple[float, float, float]:
        """The fields in the order of `call_work`."""
        return float(self.call_tokens), float(self.floor_tokens), float(self.link_tokens)

    def __call__(self, tokens: float) -> float:
        """Return the cost of a call with `tokens` tokens."""
        return call_work(tokens, *self.numbers)
