"""The experts implementation `moeless`: every MoE layer's experts are whoever the dispatcher reaches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "moeless"
_NOTHING = "moeless_nothing"


class ForwardsExperts(Protocol):
    """Part of a dispatcher that the engine uses."""

    def forward(self, layer: int, hidden_TH: Tensor, top_k_index_Tk: Tensor, top_k_weights_Tk: Tensor) -> Tensor:
        """The gate-weighted sum of each token's experts, shape (T, H), dtype of `hidden_TH`."""
        ...


def moeless_experts_forward(
    experts_module: Any, hidden_TH: Tensor, top_k_index_Tk: Tensor, top_k_weights_Tk: Tensor
) -> Tensor:
    """transformers' experts interface, forwarded to the module's dispatcher."""
    output: Tensor = experts_module.moeless_dispatcher.forward(
        experts_module.moeless_layer, hidden_TH, top_k_index_Tk, top_k_weights_Tk
    )
    return output


def register_experts() -> None:
    """Make `experts_implementation="moeless"` known to transformers. May be called again."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, moeless_experts_forward)


def attach_dispatcher(model: nn.Module, dispatcher: ForwardsExperts) -> int:
    """Let `dispatcher` compute the experts of every module that has a `moeless_layer`.

    Returns: the number of modules. Raises ValueError if there is none.
    """
    modules = [module for module in model.modules() if isinstance(getattr(module, "moeless_layer", None), int)]
    if not modules:
        raise ValueError("model must have experts modules with the attribute moeless_layer, got none")
    for module in modules:
        # Not registered as a submodule, whatever it is: it holds no parameters of the backbone.
        object.__setattr__(module, "moeless_dispatcher", dispatcher)
    return len(modules)


@contextmanager
def without_experts(model: PreTrainedModel) -> Iterator[None]:
    """Let every experts module give zeros: for probes of the backbone that must not reach a worker."""
    if not model._can_set_experts_implementation():
        yield
        return
    ALL_EXPERTS_FUNCTIONS.register(_NOTHING, _no_experts_forward)
    before = model.get_experts_implementation()
    model.set_experts_implementation(_NOTHING)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _no_experts_forward(_module: Any, hidden_TH: Tensor, _index_Tk: Tensor, _weights_Tk: Tensor) -> Tensor:
    return torch.zeros_like(hidden_TH)
