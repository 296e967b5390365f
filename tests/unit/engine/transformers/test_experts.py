from __future__ import annotations

import pytest
import torch
from torch import nn

from moeless.engine.transformers.experts import attach_dispatcher, without_experts
from tests.families import make_model
from tests.unit.engine.support import dispatched_model, eager_model, prompt_of


@torch.inference_mode()
def logits_of(model: nn.Module) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([prompt_of(20)])).logits
    return logits


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_the_dispatcher_computes_every_layers_experts(family: str) -> None:
    model, experts = dispatched_model(family)
    torch.testing.assert_close(logits_of(model), logits_of(eager_model(family)), atol=1e-5, rtol=0)
    assert experts.num_calls == 2


def test_a_dispatcher_is_no_part_of_the_model() -> None:
    model, _ = dispatched_model()
    names = set(model.state_dict())

    class Dispatching(nn.Linear):
        """Were it registered, the backbone would count its parameters."""

    assert attach_dispatcher(model, Dispatching(3, 3)) == 2  # type: ignore[arg-type]
    assert set(model.state_dict()) == names


def test_a_model_without_numbered_experts_modules_is_refused() -> None:
    with pytest.raises(ValueError, match="must have experts modules with the attribute moeless_layer"):
        attach_dispatcher(nn.Linear(2, 2), object())  # type: ignore[arg-type]


def test_without_experts_a_layer_adds_nothing_and_afterwards_it_does() -> None:
    model = make_model("mixtral")
    model.set_experts_implementation("eager")
    before = logits_of(model)
    with without_experts(model):
        without = logits_of(model)
    assert not torch.allclose(before, without)
    assert torch.equal(logits_of(model), before)
