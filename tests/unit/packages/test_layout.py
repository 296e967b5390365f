"""Descriptions of experts modules, and refusals of modules that the layout cannot describe."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moeless.core.errors import UnsupportedFamilyError
from moeless.packages.layout import describe_experts, is_experts_module, top_k_of

CONFIG = MixtralConfig(hidden_size=4, intermediate_size=6, num_local_experts=3, num_experts_per_tok=2)


def make_experts(cls: type[nn.Module], **flags: bool) -> nn.Module:
    with torch.device("meta"):
        return use_experts_implementation(**flags)(cls)(CONFIG) if flags else cls(CONFIG)


class _Experts(nn.Module):
    """The default layout; subclasses change one thing. Decorated by make_experts."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(3, 12, 4))
        self.down_proj = nn.Parameter(torch.empty(3, 4, 6))
        self.act_fn = ACT2FN["silu"]

    def forward(self, hidden_states, top_k_index, top_k_weights):  # type: ignore[no-untyped-def]
        raise NotImplementedError


class ExtraArgument(_Experts):
    def forward(self, hidden_states, top_k_index, top_k_weights, temperature):  # type: ignore[no-untyped-def]
        raise NotImplementedError


class ExtraParameter(_Experts):
    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.empty(3))


class FlatDown(_Experts):
    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        self.down_proj = nn.Parameter(torch.empty(3 * 4, 6))


class OddActivation(_Experts):
    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        del self.act_fn
        self.act_fn = torch.sin


class OwnGate(_Experts):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def test_sizes_and_activation_of_a_default_module() -> None:
    layout = describe_experts(make_experts(MixtralExperts), "mixtral")
    assert (layout.hidden_size, layout.intermediate_size, layout.activation, layout.gate) == (4, 6, "silu", "default")


def test_an_activation_that_is_a_plain_function_is_recognised_by_its_values() -> None:
    config = SimpleNamespace(num_experts=3, hidden_size=4, moe_intermediate_size=6)
    assert describe_experts(Lfm2MoeExperts(config), "lfm2_moe").activation == "silu"


def test_a_dense_mlp_is_no_experts_module() -> None:
    assert not is_experts_module(nn.Linear(2, 2))
    assert not is_experts_module(_Experts(CONFIG))


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (ExtraArgument, "ExtraArgument.forward takes hidden_states, top_k_index, top_k_weights, temperature"),
        (ExtraParameter, "ExtraParameter holds .*'scale': \\(3,\\)"),
        (FlatDown, "down_proj must have 3 dimensions, got \\(12, 6\\)"),
        (OddActivation, "act_fn is not one of ACT2FN"),
        (OwnGate, "OwnGate is not a class of transformers"),
    ],
)
def test_what_the_interface_has_no_words_for_is_refused(cls: type[nn.Module], message: str) -> None:
    module = make_experts(cls, has_gate=True)
    assert is_experts_module(module)
    with pytest.raises(UnsupportedFamilyError, match=f"family 'odd' is not supported: {message}"):
        describe_experts(module, "odd")


def test_experts_per_token_come_from_the_experts_own_config() -> None:
    assert top_k_of(make_experts(MixtralExperts), "mixtral") == 2
    with pytest.raises(UnsupportedFamilyError, match="its config has none of num_experts_per_tok"):
        top_k_of(SimpleNamespace(config=SimpleNamespace()), "odd")  # type: ignore[arg-type]


def test_experts_per_token_that_differ_by_layer_count_at_their_most() -> None:
    module = SimpleNamespace(config=SimpleNamespace(moe_topk=[1, 4, 2]))
    assert top_k_of(module, "hunyuan_v1_moe") == 4  # type: ignore[arg-type]
