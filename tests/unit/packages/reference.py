"""The plainest experts there can be: one expert after the other, from the function packages alone.

Shapes: T = tokens, H = hidden size, k = experts per token.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeless.core.expert import ExpertLayout, FunctionId
from moeless.packages.backbone import EXPERTS_IMPLEMENTATION, experts_modules
from moeless.packages.layout import ExpertsModule
from moeless.packages.packed_model import PackedModel
from moeless.packages.weights import FunctionWeights


@contextmanager
def serve_from_packages(model: PreTrainedModel, packed: PackedModel) -> Iterator[None]:
    """Within the context, `model`'s experts are computed from `packed`."""

    def experts_forward(
        module: ExpertsModule, hidden_TH: torch.Tensor, top_k_index_Tk: torch.Tensor, top_k_weights_Tk: torch.Tensor
    ) -> torch.Tensor:
        output_TH = torch.zeros_like(hidden_TH)
        layer = module.moeless_layer
        for expert in top_k_index_Tk.unique().tolist():
            tokens, slots = torch.where(top_k_index_Tk == expert)
            weights = packed.read_function(FunctionId(layer, expert), dtype=hidden_TH.dtype)
            result = expert_ffn(packed.layout(layer), weights, hidden_TH[tokens])
            output_TH.index_add_(0, tokens, (result * top_k_weights_Tk[tokens, slots, None]).to(output_TH.dtype))
        return output_TH

    assert all(hasattr(module, "moeless_layer") for module in experts_modules(model))
    ALL_EXPERTS_FUNCTIONS[EXPERTS_IMPLEMENTATION] = experts_forward  # goes before a registered one
    try:
        yield
    finally:
        del ALL_EXPERTS_FUNCTIONS[EXPERTS_IMPLEMENTATION]


def expert_ffn(layout: ExpertLayout, weights: FunctionWeights, hidden_TH: torch.Tensor) -> torch.Tensor:
    """One expert on its tokens, as the layout says."""
    up = _linear(hidden_TH, weights.up, weights.up_bias, layout.is_transposed)
    return _linear(_activate(layout, up), weights.down, weights.down_bias, layout.is_transposed)


def _activate(layout: ExpertLayout, up: torch.Tensor) -> torch.Tensor:
    act_fn = ACT2FN[layout.activation] if layout.activation else None
    if layout.gate != "default":
        module_name, _, class_name = layout.gate.partition(":")
        experts_class = getattr(importlib.import_module(module_name), class_name)
        return experts_class._apply_gate(SimpleNamespace(act_fn=act_fn, **dict(layout.gate_attributes)), up)
    assert act_fn is not None
    if not layout.has_gate:
        return act_fn(up)
    assert layout.is_concatenated
    gate, linear = up.chunk(2, dim=-1)
    return act_fn(gate) * linear


def _linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool) -> torch.Tensor:
    return torch.nn.functional.linear(hidden, weight.T if is_transposed else weight, bias)
