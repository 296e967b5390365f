"""Settings of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from moeless.core.errors import ConfigError

_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Limits of one engine. Raises ConfigError for values out of range."""

    kv_cache_bytes: int | None = None
    """Memory for KV pages. None: 1 GiB on a CPU, `kv_memory_share` of the free memory on an accelerator; in either
    case no more than `max_running` sequences of `max_model_len` need."""
    kv_memory_share: float = 0.8
    """Share of an accelerator's free memory, taken at start when `kv_cache_bytes` is None."""
    page_size: int = 32
    """Tokens in a KV page: the grain of prefix sharing."""
    prefix_sharing: bool = True
    """Reuse the KV pages of prompts that begin alike, where the model's attention allows it."""
    max_batch_tokens: int = 512
    """Tokens of one step: longer prompts are prefilled in chunks, beside the sequences that decode."""
    max_running: int = 64
    """Sequences in one step."""
    max_waiting: int = 256
    """Requests held beyond `max_running`; one more is refused with QueueFullError."""
    max_model_len: int | None = None
    """Maximum tokens of prompt and completion together. None: the model's context length."""
    num_threads: int | None = None
    """torch threads of the generation thread. None leaves torch's own choice."""

    def __post_init__(self) -> None:
        for name in ("page_size", "max_batch_tokens", "max_running"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.page_size < 4:
            raise ConfigError(f"page_size must be at least 4, got {self.page_size}")
        if self.max_waiting < 0:
            raise ConfigError(f"max_waiting must be at least 0, got {self.max_waiting}")
        for name in ("kv_cache_bytes", "max_model_len", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0 < self.kv_memory_share <= 1:
            raise ConfigError(f"kv_memory_share must be in (0, 1], got {self.kv_memory_share}")
        if self.max_batch_tokens < self.max_running:
            raise ConfigError(
                f"max_batch_tokens must be at least max_running ({self.max_running}), got {self.max_batch_tokens}"
            )

    def kv_budget_bytes(self, *, device_type: str, free_bytes: int) -> int:
        """Bytes that KV pages may take on a device with `free_bytes` free (ignored on a CPU)."""
        if self.kv_cache_bytes is not None:
            return self.kv_cache_bytes
        return _GIB if device_type == "cpu" else int(free_bytes * self.kv_memory_share)
