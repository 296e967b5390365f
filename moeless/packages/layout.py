"""Find the routed experts of a transformers model and say how they compute.

One generic function for every family: transformers' `use_experts_implementation` leaves on each experts module
what is needed. A family that holds its experts otherwise is refused by name.
"""

from __future__ import annotations

import inspect
import re
from typing import TypeGuard

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

from moeless.core.errors import CheckpointError, UnsupportedFamilyError
from moeless.core.expert import ExpertLayout

_INTERFACE_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
_TOP_K_NAMES = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
_MOE_CLASS_NAME = re.compile(r"(Experts|Mo[eE]|MoeBlock)$")
_ACTIVATIONS_WITH_WEIGHTS = ("prelu", "xielu")
_FORWARD_ARGUMENTS = 3
"""hidden_states, top_k_index, top_k_weights: what a registered experts implementation is called with."""


class ExpertsModule(nn.Module):
    """Module of transformers' experts interface, for the type checker; never made here."""

    config: PreTrainedConfig
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    down_proj: nn.Parameter
    moeless_layer: int
    """Set by backbone.load_backbone: the MoE layer that the module is."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def is_experts_module(module: nn.Module) -> TypeGuard[ExpertsModule]:
    """True for an experts module of transformers' experts interface."""
    return all(hasattr(module, name) for name in _INTERFACE_ATTRIBUTES) and isinstance(
        getattr(module, "down_proj", None), nn.Parameter
    )


def named_experts_modules(model: nn.Module) -> dict[str, ExpertsModule]:
    """Dotted name → experts module, in MoE-layer order."""
    return {name: module for name, module in model.named_modules() if is_experts_module(module)}


def experts_modules(model: nn.Module) -> list[ExpertsModule]:
    """The experts modules in MoE-layer order: the index is the layer of core.expert.FunctionId."""
    return list(named_experts_modules(model).values())


def require_experts(model: PreTrainedModel) -> dict[str, ExpertsModule]:
    """named_experts_modules, of a model that has some.

    Raises:
        UnsupportedFamilyError: an MoE model whose experts do not use the interface.
        CheckpointError: not an MoE model.

    """
    modules = named_experts_modules(model)
    if modules:
        return modules
    family = model.config.model_type
    class_names = {type(module).__name__ for module in model.modules()}
    moe_classes = sorted(filter(_MOE_CLASS_NAME.search, class_names), key=lambda name: not name.endswith("Experts"))
    if moe_classes:
        raise UnsupportedFamilyError(
            f"family {family!r} is not supported: its {moe_classes[0]} does not use transformers' experts interface"
        )
    raise CheckpointError(f"not an MoE model: {type(model).__name__} ({family!r}) has no routed experts")


def parameter_names(layout: ExpertLayout) -> dict[str, str]:
    """Name of a tensor in a function package → name of the stacked parameter that it is a slice of."""
    up = "gate_up_proj" if layout.has_gate else "up_proj"
    names = {"up": up, "down": "down_proj"}
    return names | {"up_bias": f"{up}_bias", "down_bias": "down_proj_bias"} if layout.has_bias else names


def describe_experts(module: ExpertsModule, family: str) -> ExpertLayout:
    """Describe how `module` computes; its parameters may be on the meta device.

    Raises:
        UnsupportedFamilyError: it holds or does what the experts interface has no words for.

    """
    down = module.down_proj
    if down.dim() != 3:
        raise UnsupportedFamilyError(
            f"family {family!r} is not supported: down_proj must have 3 dimensions, got {tuple(down.shape)}"
        )
    _check_forward(module, family)
    _, intermediate_size, hidden_size = down.shape if module.is_transposed else down.mT.shape
    default_gate = not module.has_gate or type(module)._apply_gate is _default_apply_gate
    activation = _activation_name(module)
    if default_gate and activation is None:
        raise UnsupportedFamilyError(f"family {family!r} is not supported: act_fn is not one of ACT2FN")
    layout = ExpertLayout(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        has_gate=module.has_gate,
        has_bias=module.has_bias,
        is_transposed=module.is_transposed,
        is_concatenated=module.is_concatenated,
        activation=activation or "",
        gate="default" if default_gate else _class_path(module, family),
        gate_attributes=() if default_gate else _gate_attributes(module),
    )
    _check_parameters(module, layout, family)
    return layout


def top_k_of(module: ExpertsModule, family: str) -> int:
    """Experts per token, from the config that the experts module was built with."""
    for name in _TOP_K_NAMES:
        value = getattr(module.config, name, None)
        if value is not None:
            return max(value) if isinstance(value, list) else int(value)
    raise UnsupportedFamilyError(
        f"family {family!r} is not supported: its config has none of {', '.join(_TOP_K_NAMES)}"
    )


def _check_forward(module: ExpertsModule, family: str) -> None:
    parameters = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:]
    if len(parameters) != _FORWARD_ARGUMENTS:
        raise UnsupportedFamilyError(
            f"family {family!r} is not supported: {type(module).__name__}.forward takes {', '.join(parameters)}"
        )


def _check_parameters(module: ExpertsModule, layout: ExpertLayout, family: str) -> None:
    num_experts = module.down_proj.shape[0]
    up_size = layout.intermediate_size * (2 if layout.has_gate else 1)
    up_shape = (layout.hidden_size, up_size) if layout.is_transposed else (up_size, layout.hidden_size)
    names = parameter_names(layout)
    expected = {
        names["up"]: (num_experts, *up_shape),
        names["down"]: tuple(module.down_proj.shape),
    }
    if layout.has_bias:
        expected[names["up_bias"]] = (num_experts, up_size)
        expected[names["down_bias"]] = (num_experts, layout.hidden_size)
    found = {name: tuple(tensor.shape) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    if found != expected:
        raise UnsupportedFamilyError(
            f"family {family!r} is not supported: {type(module).__name__} holds {found}, expected {expected}"
        )


def _class_path(module: ExpertsModule, family: str) -> str:
    cls = type(module)
    if not cls.__module__.startswith("transformers."):
        raise UnsupportedFamilyError(
            f"family {family!r} is not supported: {cls.__name__} is not a class of transformers"
        )
    return f"{cls.__module__}:{cls.__qualname__}"


def _gate_attributes(module: ExpertsModule) -> tuple[tuple[str, float], ...]:
    """Every number on the module but its sizes and flags: few, and cheaper than reading `_apply_gate`'s code."""
    return tuple(
        sorted(
            (name, float(value))
            for name, value in vars(module).items()
            if isinstance(value, int | float) and not isinstance(value, bool) and not name.startswith(("num_", "_"))
            if not name.endswith(("_dim", "_size"))
        )
    )


def _activation_name(module: ExpertsModule) -> str | None:
    """The key of ACT2FN that computes what `act_fn` does, None if there is none (or no `act_fn`).

    Compared by value, because families hold modules, functions or classes of their own.
    """
    act_fn = getattr(module, "act_fn", None)
    if act_fn is None:
        return None
    probe = torch.linspace(-40.0, 40.0, 8001, device="cpu")
    values = act_fn(probe)
    named_by_config: list[str] = [
        value for value in vars(module.config).values() if isinstance(value, str) and value in ACT2FN
    ]
    candidates: tuple[str, ...] = (*named_by_config, *ACT2FN)
    for name in candidates:
        if name not in _ACTIVATIONS_WITH_WEIGHTS and torch.equal(ACT2FN[name](probe), values):
            return name
    return None
