"""Check the fields of config.json that the families of transformers share, by their names.

A family's own config class checks more when it is built; here stands what would otherwise end in a traceback, in
gigabytes, or in wrong answers. Names of activations, rope types and layer types are transformers' (a test compares).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moeless.core.errors import CheckpointError

EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
"""Names of the number of routed experts of a layer."""
TOP_K_NAMES = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts", "num_experts_per_token")
"""Names of the number of experts that a token uses."""
ACTIVATIONS = frozenset(
    [
        "gelu",
        "gelu_10",
        "gelu_accurate",
        "gelu_fast",
        "gelu_new",
        "gelu_python",
        "gelu_python_tanh",
        "gelu_pytorch_tanh",
        "hardswish",
        "laplace",
        "leaky_relu",
        "linear",
        "mish",
        "prelu",
        "quick_gelu",
        "relu",
        "relu2",
        "relu6",
        "sigmoid",
        "silu",
        "sqrtsoftplus",
        "swish",
        "tanh",
        "xielu",
    ]
)
ROPE_TYPES = frozenset(["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "su", "mrope"])
"""Those of transformers, and two older names that it renames."""
ATTENTIONS = frozenset(
    ["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"]
)
SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")
"""Names under which multimodal configs keep that of the language model."""

MAX_SIZE = 1 << 30
"""No size of a model is larger; a context of a billion tokens is not either."""
_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act")
_POSITIVE = re.compile(
    r"^(hidden_size|vocab_size|num_hidden_layers|num_attention_heads|num_key_value_heads|head_dim|"
    r"max_position_embeddings)$"
)
_COUNT = re.compile(r"(_size|_dim|_heads|_layers|_rank|_experts|_experts_per_tok|_positions|_embeddings)$|^num_|^n_")
_NOT_COUNTS = frozenset({"tie_word_embeddings", "scale_embeddings", "n_positions_offset"})


def check_model_type(path: Path, config: Mapping[str, Any]) -> None:
    """Raises: CheckpointError if transformers has no such model type, or remote code is wanted."""
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES  # names only; imports no torch

    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING_NAMES:
        return
    if config.get("auto_map"):
        raise CheckpointError(
            f"checkpoint {path} wants remote code (auto_map, model_type {model_type!r}), which moeless never runs"
        )
    raise CheckpointError(f"{path / 'config.json'}: model_type {model_type!r} is not known to transformers")


def check_quantization(path: Path, config: Mapping[str, Any]) -> None:
    """Raises: CheckpointError if the weights are quantized."""
    for section, fields in sections(config):
        quantization = fields.get("quantization_config")
        if not quantization:
            continue
        field = f"{section}quantization_config"
        if not isinstance(quantization, Mapping):
            raise CheckpointError(f"{path / 'config.json'}: {field} must be an object, got {quantization!r:.60}")
        method = quantization.get("quant_method", "unknown method")
        raise CheckpointError(
            f"checkpoint {path} is quantized ({method!s:.40}), which cannot be packed; use one in bfloat16 or float32"
        )


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Check the sizes and names in `path`. Raises: CheckpointError with field, rule and value."""
    for field in (*SECTIONS, "vision_config", "audio_config"):
        value = config.get(field)
        if value is not None and not isinstance(value, Mapping):
            raise CheckpointError(f"{path}: {field} must be an object, got {value!r:.60}")
    for section, fields in sections(config):
        _check_counts(path, section, fields)
        _check_top_k(path, section, fields)
        _check_groups(path, section, fields)
        if fields.get("rope_theta") is not None and not _is_positive(fields["rope_theta"]):
            raise CheckpointError(
                f"{path}: {section}rope_theta must be a number above 0, got {fields['rope_theta']!r:.60}"
            )
        _check_names(path, section, fields)
        for field in ("rope_scaling", "rope_parameters"):
            _check_rope(path, f"{section}{field}", fields.get(field))


def sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The config and, after it, the language model's part of a multimodal one, each with the prefix of its fields."""
    yield "", config
    for name in SECTIONS:
        part = config.get(name)
        if isinstance(part, Mapping):
            for inner, fields in sections(part):
                yield f"{name}.{inner}", fields


def numbers_of(value: Any) -> list[float]:
    """The numbers in a field that holds one, or a list with one for each layer."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int | float) and not isinstance(item, bool)]


def _check_counts(path: Path, section: str, fields: Mapping[str, Any]) -> None:
    for field, value in fields.items():
        is_positive, is_shared = bool(_POSITIVE.match(field)), field in EXPERT_COUNTS or field in TOP_K_NAMES
        if (not is_shared and not _COUNT.search(field)) or field in _NOT_COUNTS:
            continue
        for number in value if isinstance(value, list) else [value]:
            if number is None or (not is_positive and not is_shared and _is_by_family(number)):
                continue
            is_whole = isinstance(number, int) or (isinstance(number, float) and number.is_integer())
            if not is_whole or isinstance(number, bool):
                raise CheckpointError(f"{path}: {section}{field} must be a whole number, got {number!r:.60}")
            if not is_positive <= number <= MAX_SIZE:
                raise CheckpointError(
                    f"{path}: {section}{field} must be from {int(is_positive)} to {MAX_SIZE}, got {number}"
                )
    heads, kv_heads = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        raise CheckpointError(
            f"{path}: {section}num_key_value_heads must divide num_attention_heads {heads}, got {kv_heads}"
        )


def _is_by_family(value: Any) -> bool:
    """True for what no size is, but a family's own field of a like name may hold (a flag, a factor, Mamba's "auto")."""
    if isinstance(value, float):
        return math.isfinite(value) and not value.is_integer()
    return isinstance(value, Mapping | bool) or value == "auto"


def _check_top_k(path: Path, section: str, fields: Mapping[str, Any]) -> None:
    counts = [number for field in EXPERT_COUNTS for number in numbers_of(fields.get(field))]
    if counts and not any(counts):
        return  # a dense model, which packing names
    for field in TOP_K_NAMES:
        for top_k in numbers_of(fields.get(field)):
            if top_k < 1 or (counts and top_k > max(counts)):
                upper = f" to {max(counts)}, the number of experts" if counts else ""
                raise CheckpointError(f"{path}: {section}{field} must be from 1{upper}, got {top_k}")


def _check_groups(path: Path, section: str, fields: Mapping[str, Any]) -> None:
    """Groups of experts that a router chooses from first (DeepSeek-V3's); 0 and null stand for none."""
    num_groups, top_groups = fields.get("n_group"), fields.get("topk_group")
    if not isinstance(num_groups, int) or num_groups < 1:
        return
    for field in EXPERT_COUNTS:
        for number in numbers_of(fields.get(field)):
            if number % num_groups:
                raise CheckpointError(f"{path}: {section}n_group must divide {field} {number}, got {num_groups}")
    if isinstance(top_groups, int) and not 1 <= top_groups <= num_groups:
        raise CheckpointError(f"{path}: {section}topk_group must be from 1 to n_group {num_groups}, got {top_groups}")


def _check_names(path: Path, section: str, fields: Mapping[str, Any]) -> None:
    for field in _ACTIVATION_FIELDS:
        value = fields.get(field)
        if value is not None and (not isinstance(value, str) or value not in ACTIVATIONS):
            raise CheckpointError(
                f"{path}: {section}{field} must be an activation of transformers such as silu, got {value!r:.60}"
            )
    for field in ("attn_implementation", "_attn_implementation"):
        value = fields.get(field)
        if value is not None and (not isinstance(value, str) or value not in ATTENTIONS):
            raise CheckpointError(
                f"{path}: {section}{field} must be one of {', '.join(sorted(ATTENTIONS))}, got {value!r:.60}"
            )
    layer_types = fields.get("layer_types")
    if layer_types is not None and not (
        isinstance(layer_types, list) and all(isinstance(name, str) for name in layer_types)
    ):
        raise CheckpointError(f"{path}: {section}layer_types must be a list of names, got {layer_types!r:.60}")


def _check_rope(path: Path, field: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: {field} must be an object, got {value!r:.60}")
    for name, part in value.items():
        if isinstance(part, Mapping):  # one for each type of layer
            _check_rope(path, f"{field}.{name}", part)
    for name in ("rope_type", "type"):
        rope_type = value.get(name)
        if rope_type is not None and (not isinstance(rope_type, str) or rope_type not in ROPE_TYPES):
            raise CheckpointError(
                f"{path}: {field}.{name} must be one of {', '.join(sorted(ROPE_TYPES))}, got {rope_type!r:.60}"
            )
    for name in ("factor", "rope_theta", "original_max_position_embeddings", "attention_factor"):
        number = value.get(name)
        if number is not None and not _is_positive(number):
            raise CheckpointError(f"{path}: {field}.{name} must be a number above 0, got {number!r:.60}")
    for name in ("short_factor", "long_factor"):
        factors = value.get(name)
        if factors is not None and not (isinstance(factors, list) and all(map(_is_positive, factors))):
            raise CheckpointError(f"{path}: {field}.{name} must be a list of numbers above 0, got {factors!r:.60}")


def _is_positive(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number) and number > 0
