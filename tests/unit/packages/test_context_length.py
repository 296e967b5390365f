from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, PreTrainedConfig

from moeless.core.errors import ConfigError
from moeless.packages.context_length import check_context, context_length, limit_context
from moeless.packages.pack import pack_checkpoint
from moeless.packages.packed_model import PackedModel
from tests.families import make_checkpoint

HALF_HEAD = 64
"""Factors of LongRoPE, one for each pair of a head's 128 dimensions."""

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

KNOWN: dict[str, tuple[str, dict[str, Any], int]] = {
    "Mixtral-8x7B-Instruct-v0.1": ("mixtral", {"max_position_embeddings": 32768}, 32768),
    "Qwen3-30B-A3B": ("qwen3_moe", {"max_position_embeddings": 40960}, 40960),
    "Qwen3-30B-A3B, YaRN of its model card": (
        "qwen3_moe",
        {"max_position_embeddings": 40960, "rope_scaling": YARN},
        131072,
    ),
    "Qwen2-57B-A14B-Instruct, YaRN of its model card": (
        "qwen2_moe",
        {"max_position_embeddings": 32768, "rope_scaling": YARN},
        131072,
    ),
    "YaRN under its older key": (
        "qwen3_moe",
        {
            "max_position_embeddings": 32768,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        131072,
    ),
    "YaRN without the original length": (
        "qwen3_moe",
        {"max_position_embeddings": 32768, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        131072,
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            "max_position_embeddings": 163840,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
        163840,
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
        131072,
    ),
    "Phi-3.5-MoE-instruct": (
        "phimoe",
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * HALF_HEAD,
                "long_factor": [2.0] * HALF_HEAD,
                "short_mscale": 1.243163121016122,
                "long_mscale": 1.243163121016122,
                "original_max_position_embeddings": 4096,
            },
        },
        131072,
    ),
    "Hunyuan-A13B-Instruct": (
        "hunyuan_v1_moe",
        {
            "max_position_embeddings": 32768,
            "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1},
        },
        32768,
    ),
    "dynamic NTK": (
        "mixtral",
        {"max_position_embeddings": 8192, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        16384,
    ),
    "linear scaling": (
        "mixtral",
        {"max_position_embeddings": 8192, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        16384,
    ),
    "Llama 3 scaling": (
        "mixtral",
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        131072,
    ),
    "gemma-4, a kind for each layer type": ("gemma4_text", {"max_position_embeddings": 262144}, 262144),
    "YaRN for one layer type": (
        "mellum",
        {
            "max_position_embeddings": 32768,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_hidden_layers": 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {**YARN, "rope_theta": 10000.0},
            },
        },
        131072,
    ),
    "Qwen3-VL-30B-A3B, the limit of its text model": (
        "qwen3_vl_moe",
        {"text_config": {"max_position_embeddings": 262144}},
        262144,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_context_of_a_known_model_is_the_one_its_makers_state(name: str) -> None:
    family, settings, expected = KNOWN[name]
    assert context_length(CONFIG_MAPPING[family](**settings)) == expected


def config_of(length: int | None) -> PreTrainedConfig:
    return PreTrainedConfig() if length is None else CONFIG_MAPPING["mixtral"](max_position_embeddings=length)


def test_a_limit_up_to_the_models_length_is_taken_and_its_length_is_the_default() -> None:
    assert limit_context(config_of(32768), None) == 32768
    assert limit_context(config_of(32768), 32768) == 32768
    assert limit_context(config_of(32768), 100) == 100
    assert limit_context(config_of(None), 100) == 100


def test_a_limit_above_the_models_length_is_refused_with_both() -> None:
    with pytest.raises(ConfigError) as refusal:
        limit_context(config_of(32768), 32769)
    assert str(refusal.value) == "--max-model-len must be at most 32768, the context length of the model, got 32769"


def test_a_limit_below_one_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="--max-model-len must be at least 1, got 0"):
        limit_context(config_of(32768), 0)


def test_a_model_without_a_length_needs_a_limit() -> None:
    with pytest.raises(ConfigError, match="--max-model-len must be set: the model's config has no max_position"):
        limit_context(config_of(None), None)


def test_a_packed_model_is_checked_by_its_own_config(tmp_path: Path) -> None:
    pack_checkpoint(make_checkpoint("mixtral", tmp_path / "checkpoint"), tmp_path / "packed")
    packed = PackedModel.open(tmp_path / "packed")
    check_context(packed, 512)
    with pytest.raises(ConfigError, match="--max-model-len must be at most 512, .* got 513"):
        check_context(packed, 513)
