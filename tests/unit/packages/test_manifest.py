"""The manifest survives a round trip and contradictions are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeless.core.errors import PackageError
from moeless.core.expert import ExpertLayout
from moeless.packages.manifest import MANIFEST_NAME, encode_manifest, read_manifest
from tests.unit.packages.conftest import FamilyFolder


def test_a_manifest_survives_a_round_trip(families: FamilyFolder, tmp_path: Path) -> None:
    manifest = families["gpt_oss"].packed.manifest
    (tmp_path / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    assert read_manifest(tmp_path) == manifest


def test_the_layout_of_gpt_oss_says_all_that_its_activation_needs(families: FamilyFolder) -> None:
    assert families["gpt_oss"].packed.layout(0) == ExpertLayout(
        hidden_size=32,
        intermediate_size=48,
        has_gate=True,
        has_bias=True,
        is_transposed=True,
        is_concatenated=False,
        activation="",
        gate="transformers.models.gpt_oss.modeling_gpt_oss:GptOssExperts",
        gate_attributes=(("alpha", 1.702), ("limit", 1.5)),
    )


def test_the_layout_of_a_default_family_names_its_activation(families: FamilyFolder) -> None:
    layout = families["gemma4_text"].packed.layout(0)
    assert (layout.gate, layout.activation, layout.gate_attributes) == ("default", "gelu_pytorch_tanh", ())


def test_experts_without_gate_take_the_size_that_goes_in(families: FamilyFolder) -> None:
    """Nemotron-H's experts work in a latent space smaller than the hidden size."""
    layout = families["nemotron_h"].packed.layout(0)
    assert (layout.has_gate, layout.hidden_size, layout.intermediate_size) == (False, 16, 24)
    assert layout.activation == "relu2"


def _other_version(content: dict[str, Any]) -> None:
    content["format_version"] = 2


def _missing_function(content: dict[str, Any]) -> None:
    del content["functions"][3]


def _layers_out_of_order(content: dict[str, Any]) -> None:
    content["layers"].reverse()


def _name_of_another(content: dict[str, Any]) -> None:
    content["functions"][0]["name"] = "L00.E001"


def _file_outside(content: dict[str, Any]) -> None:
    content["functions"][0]["file"] = "../secrets.safetensors"


def _unknown_field(content: dict[str, Any]) -> None:
    content["layers"][0]["layout"]["gate"] = 7


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other_version, "format_version must be 1, got 2"),
        (_missing_function, "functions must list every expert of every layer once"),
        (_layers_out_of_order, "layers must count from 0 to 1"),
        (_name_of_another, "'L00.E001' is not the name of layer 0, expert 0"),
        (_file_outside, "file must lie inside the packed folder, got '../secrets.safetensors'"),
        (_unknown_field, "not a manifest"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    damage: Callable[[dict[str, Any]], None], message: str, families: FamilyFolder, tmp_path: Path
) -> None:
    content = json.loads(encode_manifest(families["mixtral"].packed.manifest))
    damage(content)
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(PackageError, match=message) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)
