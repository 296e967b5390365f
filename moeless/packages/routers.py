"""Weights of a packed model's routers: the gates that the gate predictor copies.

Read from the backbone's files; no model is built. Called where predictors are fitted.

Shapes: H hidden size, E experts.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from moeless.core.errors import UnsupportedFamilyError
from moeless.packages.manifest import LayerEntry
from moeless.packages.packed_model import PackedModel

_CORRECTIONS = ("e_score_correction_bias", "expert_bias")
_SOFTMAX_CORRECTION = "moe_statics.e_score_correction_bias"
"""Name of ERNIE's correction, which is added to a softmax."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterWeights:
    """One MoE layer's gate. The fields are what moeless_predictors.gate.GatePredictor.fit takes of it."""

    weight: NDArray[np.float32]
    """Shape (E, H)."""
    bias: NDArray[np.float32] | None
    """Shape (E,)."""
    scoring: Literal["logits", "sigmoid", "softmax"]
    """The k highest are chosen of: "logits", weight · hidden + bias (so choose all gates without a correction, for
    softmax and sigmoid keep the order); else sigmoid(weight · hidden) + bias or softmax(weight · hidden) + bias,
    where the bias is the correction that balances the load, as in DeepSeek-V3."""


def read_routers(packed: PackedModel) -> list[RouterWeights]:
    """The gate of each MoE layer, in order.

    A limit on groups of experts (`n_group` of DeepSeek-V2 and V3) is not among what is read.

    Raises:
        ChecksumError: a file of the backbone is damaged.
        UnsupportedFamilyError: a layer's router is not one matrix on the experts' input, or scores otherwise.

    """
    packed.verify_backbone_file("config.json")
    config = json.loads((packed.backbone_path / "config.json").read_text(encoding="utf-8"))
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            for file in packed.backbone_weight_files()
        ]
        tensors = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118
        return [_read_router(layer, tensors, config.get("scoring_func")) for layer in packed.manifest.layers]


def _read_router(layer: LayerEntry, tensors: dict[str, Any], scoring_func: str | None) -> RouterWeights:
    block = layer.module.rpartition(".")[0] + "."
    shape = [layer.num_experts, layer.layout.hidden_size]
    weights = [
        name
        for name, tensor in tensors.items()
        if name.startswith(block) and name.endswith(".weight") and tensor.get_shape() == shape
    ]
    if len(weights) != 1:
        raise UnsupportedFamilyError(
            f"router of {layer.module}: {block}* must have one weight of the shape {tuple(shape)}, found {len(weights)}"
        )
    bias_name = weights[0].removesuffix("weight") + "bias"
    corrections = [name for name in tensors if name.startswith(block) and name.endswith(_CORRECTIONS)]
    if not corrections:
        bias = _array(tensors[bias_name]) if bias_name in tensors else None
        return RouterWeights(weight=_array(tensors[weights[0]]), bias=bias, scoring="logits")
    scoring = scoring_func or ("softmax" if corrections[0].endswith(_SOFTMAX_CORRECTION) else "sigmoid")
    if scoring not in ("sigmoid", "softmax") or bias_name in tensors or len(corrections) > 1:
        raise UnsupportedFamilyError(
            f"router of {layer.module}: scores must be a sigmoid or softmax with one correction and no other bias, "
            f"got {scoring} with {', '.join(corrections)}{' and a bias' if bias_name in tensors else ''}"
        )
    return RouterWeights(
        weight=_array(tensors[weights[0]]),
        bias=_array(tensors[corrections[0]]).reshape(layer.num_experts),
        scoring=cast('Literal["sigmoid", "softmax"]', scoring),
    )


def _array(tensor: Any) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", tensor[:].to(torch.float32).numpy())
