"""The plainest form of a MoE layer: expert by expert in float64, each family's formula written out."""

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
        weights = packed.read_function(FunctionId(layer, expert), dtype=dtype)
        tokens, choices = torch.where(experts_Tk == expert)
        y_nH = _expert(found, weights, hidden_TH[tokens].double())
        out_TH.index_add_(0, tokens, y_nH * weights_Tk[tokens, choices, None].double())
    return out_TH


def _expert(found: ExpertLayout, weights: FunctionWeights, x_nH: torch.Tensor) -> torch.Tensor:
    up, down = weights.up.double(), weights.down.double()
    if not found.is_transposed:
        up, down = up.T, down.T
    up_nI = x_nH @ up
    if weights.up_bias is not None:
        up_nI = up_nI + weights.up_bias.double()
    out_nH = _between(found, up_nI) @ down
    return out_nH if weights.down_bias is None else out_nH + weights.down_bias.double()


def _between(found: ExpertLayout, up_nI: torch.Tensor) -> torch.Tensor:
    if found.gate.endswith(":GptOssExperts"):
        limit, alpha = dict(found.gate_attributes)["limit"], dict(found.gate_attributes)["alpha"]
        gate, linear = up_nI[:, 0::2].clamp(max=limit), up_nI[:, 1::2].clamp(min=-limit, max=limit)
        return (linear + 1) * gate * torch.sigmoid(gate * alpha)
    assert found.gate == "default"
    assert found.is_concatenated
    act = _ACTIVATIONS[found.activation]
    if not found.has_gate:
        return act(up_nI)
    gate, linear = up_nI.chunk(2, dim=-1)
    return act(gate) * linear
