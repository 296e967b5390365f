"""Settings of the gateway: keys and limits. Read by app.create_app; filled by deployments/gateway.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """Limits are per request. Every breach of one is answered with 400 or 413, and names the limit."""

    api_keys: tuple[str, ...] = ()
    """Accepted bearer keys; empty means that no key is required."""
    cors_allow_origins: tuple[str, ...] = ()
    """Origins a browser may call from; empty sends no CORS headers at all."""
    allow_recording: bool = False
    """Whether clients may record the routing of everybody's requests (recording.py)."""
    request_id_sent_by_proxy: bool = False
    """Whether a proxy in front puts x-request-id into requests and responses, as Ray Serve's does (request_id.py)."""
    max_body_bytes: int = 2 * 1024 * 1024
    """Room for some 300,000 token ids written as JSON; a wrong field in a body of this size costs half a second."""
    max_url_bytes: int = 8192
    max_messages: int = 2048
    max_prompts: int = 64
    """Prompts in one /v1/completions request."""
    max_n: int = 32
    max_sequences: int = 128
    """prompts × n: what one request may put into the engine's queue."""
    max_stop: int = 16
    max_stop_chars: int = 256
    """The engine holds back this much text while a stop string may be forming."""
    max_stop_token_ids: int = 64
    max_logprobs: int = 20
    """OpenAI's own limit for top_logprobs; also for prompt_logprobs."""
    max_logit_bias: int = 1024
    """Entries of logit_bias; each costs a write in every decoding step."""
    max_writes_per_s: int = 300
    """Over all streams; with more than a few of them, tokens are sent a few at a time (streams.WritePacer)."""
    max_text_processes: int = 2
    """Processes that read bodies and tokenize (text_process.py); all but one may work on large bodies. More would take
    the engine's cores from it."""
    max_waiting_texts: int = 256
    """Requests that are read, or wait to be; each holds its body."""
    retry_after_s: float = 1.0
    """Retry-After of a 503 while the engine is starting or away."""
    engine_retry_s: float = 0.5
    """Pause before asking again for an engine that could not be reached at start."""

    def __post_init__(self) -> None:
        for name in ("api_keys", "cors_allow_origins"):
            values = getattr(self, name)
            if isinstance(values, str) or not all(isinstance(value, str) and value for value in values):
                raise ValueError(f"gateway.{name} must be a tuple of non-empty strings")
        for key in self.api_keys:
            if not key.isascii() or any(character.isspace() for character in key):
                raise ValueError("gateway.api_keys must be printable ASCII without spaces (an HTTP header holds them)")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("max_") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"gateway.{field.name} must be an integer >= 1, got {value!r}")
            if field.name.endswith("_s") and not 0 < value < math.inf:
                raise ValueError(f"gateway.{field.name} must be > 0 seconds and finite, got {value!r}")
