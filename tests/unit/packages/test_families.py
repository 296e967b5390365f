"""Every family: what leaves the packages computes what transformers computes, and what cannot is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moeless.core.errors import UnsupportedFamilyError
from moeless.packages.backbone import experts_modules, load_backbone
from moeless.packages.pack import pack_checkpoint
from tests.families import FAMILIES, PAD_ID, REFUSED_FAMILIES, VOCAB_SIZE, make_checkpoint
from tests.unit.packages.conftest import FamilyFolder
from tests.unit.packages.reference import serve_from_packages


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_from_packages_are_those_of_the_whole_model(family: str, families: FamilyFolder) -> None:
    checkpoint, packed = families[family]
    model = load_backbone(packed)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager")
    tokens = torch.randint(PAD_ID + 1, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(1))

    with torch.no_grad(), serve_from_packages(model, packed):
        logits = model(tokens, use_cache=False).logits
        expected = reference(tokens, use_cache=False).logits

    assert torch.isfinite(expected).all()
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_is_what_transformers_would_load_less_the_experts(family: str, families: FamilyFolder) -> None:
    """In bfloat16, where some families keep tensors in float32; with the buffers that no checkpoint holds."""
    checkpoint, packed = families[family]
    model = load_backbone(packed, dtype=torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)

    expected = {name: tensor for name, tensor in _tensors(reference).items() if ".experts." not in name}
    found = {name: tensor for name, tensor in _tensors(model).items() if not tensor.is_meta}

    assert found.keys() == expected.keys()
    assert {name for name in found if found[name].dtype != expected[name].dtype} == set()
    assert {name for name in found if not torch.equal(found[name], expected[name])} == set()
    assert all(parameter.is_meta for module in experts_modules(model) for parameter in module.parameters())


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_a_family_outside_the_experts_interface_is_refused_by_name(family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(family, tmp_path / "checkpoint")

    with pytest.raises(
        UnsupportedFamilyError, match=f"family '{family}' is not supported: its [A-Z]\\w+(Experts|MoE) "
    ):
        pack_checkpoint(checkpoint, tmp_path / "packed")

    assert not (tmp_path / "packed").exists()


def test_the_documentation_lists_the_families_that_are_checked() -> None:
    page = (Path(__file__).parents[3] / "docs" / "families.md").read_text(encoding="utf-8")
    checked, _, refused = page.partition("## At parity")[2].partition("## Refused")
    assert set(re.findall(r"^\| `(\w+)`", checked, re.MULTILINE)) == FAMILIES.keys()
    assert set(re.findall(r"^\| `(\w+)`", refused, re.MULTILINE)) == REFUSED_FAMILIES.keys()


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
