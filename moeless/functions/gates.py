"""Activation and gating between an expert's two projections, for every family.

Most families gate by `act(gate) * up`. The few that do more (gpt-oss clamps and shifts, say) define `_apply_gate`
on their experts class; that method is used as it is, on the layer's own numbers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from moeless.core.errors import UnsupportedFamilyError
from moeless.core.expert import ExpertLayout

Gate = Callable[[torch.Tensor], torch.Tensor]
"""Maps the up projection's output (n, 2I) or, without a gate, (n, I) to the down projection's input (n, I)."""


def resolve_gate(layout: ExpertLayout) -> Gate:
    """The function between the projections for a layer of `layout`.

    Raises: UnsupportedFamilyError if the layout names a class outside transformers or one that is not there.
    """
    if layout.gate != "default":
        return _family_gate(layout)
    act = _activation(layout.activation)
    if not layout.has_gate:
        return act
    if layout.activation in ("silu", "swish"):
        return _silu_gate

    def gate(up_n2I: torch.Tensor) -> torch.Tensor:
        gate_nI, up_nI = up_n2I.chunk(2, dim=-1)
        return act(gate_nI) * up_nI

    return gate


def _activation(name: str) -> Gate:
    """Return the activation of transformers' ACT2FN; the usual ones without importing transformers."""
    if name in _ACTIVATIONS:
        return _ACTIVATIONS[name]
    from transformers.activations import ACT2FN

    act: Gate = ACT2FN[name]
    return act


_ACTIVATIONS: dict[str, Gate] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


def _silu_gate(up_n2I: torch.Tensor) -> torch.Tensor:
    gate_nI, up_nI = up_n2I.chunk(2, dim=-1)
    return F.silu(gate_nI).mul_(up_nI)


def _family_gate(layout: ExpertLayout) -> Gate:
    """The family's own method, on the layer's own numbers: a family may give each layer others."""
    experts_class = _experts_class(layout.gate)
    act_fn = _activation(layout.activation) if layout.activation else None
    return partial(experts_class._apply_gate, SimpleNamespace(act_fn=act_fn, **dict(layout.gate_attributes)))


def _experts_class(name: str) -> Any:
    module_name, _, class_name = name.partition(":")
    if not module_name.startswith("transformers."):
        raise UnsupportedFamilyError(f"layout.gate must name a class of transformers, got {name!r}")
    experts_class = getattr(importlib.import_module(module_name), class_name, None)
    if experts_class is None:
        raise UnsupportedFamilyError(f"layout.gate names {class_name!r}, which {module_name} does not have")
    return experts_class
