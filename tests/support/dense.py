"""The plainest form of a MoE layer: token by token, expert by expert, in float64, each family's formula written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moeless.core.expert import ExpertLayout, FunctionId
from moeless.packages.packed_model import PackedModel
from moeless.packages.weights import FunctionWeights

_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def dense_layer(
    packed: PackedModel,
    layer: int,
    hidden_TH: torch.Tensor,
    experts_Tk: torch.Tensor,
    weights_Tk: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The layer's routed output in float64, of weights that were rounded to `dtype` first."""
    found = packed.layout(layer)
    out_TH = torch.zeros(hidden_TH.shape, dtype=torch.float64)
    for expert in experts_Tk.unique().tolist():
        weights = packed.load_function(FunctionId(layer, expert), dtype=dtype)
        for token, choice in (experts_Tk == expert).nonzero().tolist():
            out_TH[token] += weights_Tk[token, choice].double() * _expert(found, weights, hidden_TH[token].double())
    return out_TH


def _expert(found: ExpertLayout, weights: FunctionWeights, x_H: torch.Tensor) -> torch.Tensor:
    up, down = weights.up.double(), weights.down.double()
    if found.is_transposed:
        up, down = up.T, down.T
    up_I = up @ x_H
    if weights.up_bias is not None:
        up_I = up_I + weights.up_bias.double()
    out_H = down @ _between(found, up_I)
    return out_H if weights.down_bias is None else out_H + weights.down_bias.double()


def _between(found: ExpertLayout, up_I: torch.Tensor) -> torch.Tensor:
    if found.gate.endswith(":GptOssExperts"):
        limit, alpha = dict(found.gate_attributes)["limit"], dict(found.gate_attributes)["alpha"]
        gate, linear = up_I[0::2].clamp(max=limit), up_I[1::2].clamp(min=-limit, max=limit)
        return (linear + 1) * gate * torch.sigmoid(gate * alpha)
    assert found.gate == "default"
    assert found.is_concatenated
    act = _ACTIVATIONS[found.activation]
    if not found.has_gate:
        return act(up_I)
    gate, linear = up_I.chunk(2)
    return act(gate) * linear
