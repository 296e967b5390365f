"""Routers read from a packed model choose as the model does.

Shapes: T tokens, H hidden size, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeless.core.errors import UnsupportedFamilyError
from moeless.packages.backbone import EXPERTS_IMPLEMENTATION, load_backbone
from moeless.packages.layout import ExpertsModule
from moeless.packages.packed_model import PackedModel
from moeless.packages.routers import read_routers
from moeless_predictors.base import one_hot
from moeless_predictors.gate import GatePredictor
from tests.families import PARITY_FAMILIES, VOCAB_SIZE
from tests.unit.packages.conftest import FamilyFolder

GROUPED_FAMILIES = {"deepseek_v2", "deepseek_v3"}
"""Their tiny configurations limit a token to one of two groups of experts."""

Observed = dict[int, tuple[torch.Tensor, torch.Tensor]]


@contextmanager
def observed_routing(observed: Observed) -> Iterator[None]:
    """Within the context, experts give zeros and note hidden states (T, H) and choices (T, k) by layer."""

    def experts_forward(
        module: ExpertsModule, hidden_TH: torch.Tensor, top_k_index_Tk: torch.Tensor, top_k_weights_Tk: torch.Tensor
    ) -> torch.Tensor:
        observed[module.moeless_layer] = (hidden_TH, top_k_index_Tk)
        return torch.zeros_like(hidden_TH)

    ALL_EXPERTS_FUNCTIONS[EXPERTS_IMPLEMENTATION] = experts_forward
    try:
        yield
    finally:
        del ALL_EXPERTS_FUNCTIONS[EXPERTS_IMPLEMENTATION]


def routing_of(model: PreTrainedModel) -> Observed:
    observed: Observed = {}
    with observed_routing(observed), torch.inference_mode():
        model(torch.randint(VOCAB_SIZE, (4, 50), generator=torch.Generator().manual_seed(0)))
    return observed


def recalls_of_copies(packed: PackedModel) -> list[float]:
    """Of each layer's gate, copied, on that very layer's hidden states."""
    routing = routing_of(load_backbone(packed))
    recalls = []
    for layer, router in enumerate(read_routers(packed)):
        hidden_TH, experts_Tk = (tensor.numpy() for tensor in routing[layer])
        y_TE = one_hot(experts_Tk, packed.manifest.layers[layer].num_experts)
        copy = GatePredictor(threshold=0).fit(hidden_TH, y_TE, **asdict(router))
        recalls.append(copy.score(hidden_TH, y_TE))
    return recalls


@pytest.mark.parametrize("family", sorted(PARITY_FAMILIES.keys() - GROUPED_FAMILIES))
def test_the_copied_gate_chooses_as_the_model_does(families: FamilyFolder, family: str) -> None:
    recalls = recalls_of_copies(families[family].packed)
    assert len(recalls) == families[family].packed.manifest.num_moe_layers
    assert min(recalls) > 0.995


@pytest.mark.parametrize("family", sorted(GROUPED_FAMILIES))
def test_a_limit_on_groups_is_left_out(families: FamilyFolder, family: str) -> None:
    assert all(0.5 < recall < 0.995 for recall in recalls_of_copies(families[family].packed))


def test_a_correction_is_told_from_a_bias(families: FamilyFolder) -> None:
    scoring = {
        family: read_routers(families[family].packed)[0].scoring
        for family in ("deepseek_v3", "ernie4_5_moe", "gpt_oss", "mixtral")
    }
    assert scoring == {"deepseek_v3": "sigmoid", "ernie4_5_moe": "softmax", "gpt_oss": "logits", "mixtral": "logits"}
    assert read_routers(families["mixtral"].packed)[0].bias is None
    gpt_oss_bias = read_routers(families["gpt_oss"].packed)[0].bias
    assert gpt_oss_bias is not None
    assert np.abs(gpt_oss_bias).max() > 0


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("zaya", r"must have one weight of the shape \(4, 32\), found 0"),
        ("deepseek_v4", "must be a sigmoid or softmax with one correction and no other bias, got sqrtsoftplus"),
    ],
)
def test_a_router_of_another_kind_is_refused(families: FamilyFolder, family: str, message: str) -> None:
    with pytest.raises(UnsupportedFamilyError, match=message):
        read_routers(families[family].packed)
