"""The backbone: no expert is ever in memory, and what is damaged or does not fit is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from moeless.core.errors import PackageError
from moeless.packages.backbone import experts_modules, load_backbone
from moeless.packages.files import sha256_of
from moeless.packages.manifest import MANIFEST_NAME, FileEntry, encode_manifest, read_manifest
from moeless.packages.pack import pack_checkpoint
from moeless.packages.packed_model import PackedModel
from tests.families import EOS_ID
from tests.unit.packages.conftest import FamilyFolder
from tests.unit.packages.reference import serve_from_packages

WEIGHTS = "backbone/backbone-00001.safetensors"


@pytest.fixture
def folder(tmp_path: Path, families: FamilyFolder) -> Path:
    """A packed DeepSeek-V3 (its first layer is dense) that a test may change."""
    return shutil.copytree(families["deepseek_v3"].packed.path, tmp_path / "packed")


def rewrite_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the backbone's weights and their entry in the manifest."""
    save_file(tensors, folder / WEIGHTS)
    entry = FileEntry(file=WEIGHTS, bytes=(folder / WEIGHTS).stat().st_size, sha256=sha256_of(folder / WEIGHTS))
    manifest = read_manifest(folder)
    backbone = [entry if old.file == WEIGHTS else old for old in manifest.backbone]
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(msgspec.structs.replace(manifest, backbone=backbone)))


def test_the_process_never_holds_the_experts(tmp_path: Path) -> None:
    """Peak memory of a fresh process grows by far less than the 64 MB of experts."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_local_experts=10,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    manifest = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "packed")
    assert manifest.function_bytes > 60e6
    script = (
        "import re, sys\n"
        "from moeless.packages.backbone import load_backbone\n"
        "from moeless.packages.packed_model import PackedModel\n"
        "peak_kb = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "packed = PackedModel.open(sys.argv[1])\n"
        "load_backbone(PackedModel.open(sys.argv[2]))\n"  # whatever is loaded lazily
        "before = peak_kb()\n"
        "model = load_backbone(packed)\n"
        "held = sum(t.nbytes for t in model.state_dict().values() if not t.is_meta)\n"
        "print('grown', (peak_kb() - before) * 1024, 'held', held)\n"
    )
    tiny = tmp_path / "tiny"
    MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_local_experts=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).save_pretrained(tiny)
    pack_checkpoint(tiny, tmp_path / "packed-tiny")
    arguments = [sys.executable, "-c", script, tmp_path / "packed", tmp_path / "packed-tiny"]
    output = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=100).stdout

    match = re.search(r"grown (\d+) held (\d+)", output)
    assert match is not None
    grown, held = int(match[1]), int(match[2])
    backbone_bytes = (tmp_path / "packed" / WEIGHTS).stat().st_size
    assert held < backbone_bytes
    assert grown < 4 * backbone_bytes + 8e6 < manifest.function_bytes / 2


def test_experts_modules_know_their_moe_layer(families: FamilyFolder) -> None:
    model = load_backbone(families["deepseek_v3"].packed)
    assert [module.moeless_layer for module in experts_modules(model)] == [0, 1]
    assert experts_modules(model)[0] is model.model.layers[1].mlp.experts
    assert model.config._experts_implementation == "moeless"


def test_tied_weights_stay_tied(families: FamilyFolder) -> None:
    model = load_backbone(families["granitemoe"].packed)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_generation_settings_come_from_the_checkpoint(families: FamilyFolder) -> None:
    model = load_backbone(families["mixtral"].packed)
    assert model.generation_config.eos_token_id == EOS_ID
    assert not model.training


def test_the_model_generates_with_its_cache(families: FamilyFolder) -> None:
    packed = families["mixtral"].packed
    model = load_backbone(packed)
    with serve_from_packages(model, packed):
        tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        steps = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            for _ in range(5):
                logits = model(steps, use_cache=False).logits[:, -1]
                logits[:, EOS_ID] = -torch.inf
                steps = torch.cat([steps, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(tokens, steps)


@pytest.mark.gpu
def test_the_backbone_loads_onto_a_gpu(families: FamilyFolder) -> None:
    packed = families["qwen3_next"].packed
    on_cpu, on_gpu = load_backbone(packed), load_backbone(packed, device="cuda")
    for name, tensor in (*on_gpu.named_parameters(), *on_gpu.named_buffers()):
        if tensor.is_meta:
            assert ".experts." in name
        else:
            assert tensor.is_cuda
            expected = dict((*on_cpu.named_parameters(), *on_cpu.named_buffers()))[name]
            assert torch.allclose(tensor.cpu(), expected)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
    rewrite_weights(folder, tensors)
    with pytest.raises(PackageError, match=r"lacks tensor model\.layers\.2\.mlp\.gate\.e_score_correction_bias"):
        load_backbone(PackedModel.open(folder))


def test_a_tensor_that_does_not_fit_is_named(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    rewrite_weights(folder, tensors | {"model.norm.weight": torch.ones(3)})
    with pytest.raises(PackageError, match=r"tensor model\.norm\.weight does not fit DeepseekV3ForCausalLM"):
        load_backbone(PackedModel.open(folder))


def test_a_pack_of_another_architecture_is_refused(folder: Path) -> None:
    manifest = msgspec.structs.replace(read_manifest(folder), architecture="DeepseekV9ForCausalLM")
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    with pytest.raises(PackageError, match="architecture must be DeepseekV9ForCausalLM, got DeepseekV3ForCausalLM"):
        load_backbone(PackedModel.open(folder))
