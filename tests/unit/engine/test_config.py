from __future__ import annotations

from typing import Any

import pytest

from moeless.core.errors import ConfigError
from moeless.engine.config import EngineConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"page_size": 3}, "page_size must be at least 4, got 3"),
        ({"max_running": 0}, "max_running must be at least 1, got 0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be at least 1, got 0"),
        ({"max_waiting": -1}, "max_waiting must be at least 0, got -1"),
        ({"kv_cache_bytes": 0}, "kv_cache_bytes must be at least 1, got 0"),
        ({"max_model_len": 0}, "max_model_len must be at least 1, got 0"),
        ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
        ({"kv_memory_share": 1.5}, r"kv_memory_share must be in \(0, 1\], got 1.5"),
        ({"max_batch_tokens": 8, "max_running": 9}, r"max_batch_tokens must be at least max_running \(9\), got 8"),
    ],
)
def test_a_value_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


def test_kv_memory_is_a_gibibyte_on_a_cpu_and_a_share_of_what_is_free_on_a_gpu() -> None:
    config = EngineConfig(kv_memory_share=0.5)
    assert config.kv_budget_bytes(device_type="cpu", free_bytes=0) == 1 << 30
    assert config.kv_budget_bytes(device_type="cuda", free_bytes=1000) == 500
    assert EngineConfig(kv_cache_bytes=7).kv_budget_bytes(device_type="cuda", free_bytes=1000) == 7
