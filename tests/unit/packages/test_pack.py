"""Packing: what a packed folder holds, and that a folder under its final name is whole whatever happened."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from moeless.core.errors import PackageError
from moeless.core.expert import FunctionId
from moeless.packages.files import sha256_of
from moeless.packages.manifest import MANIFEST_NAME, read_manifest
from moeless.packages.pack import pack_checkpoint
from moeless.packages.packed_model import PackedModel
from tests.families import make_checkpoint, make_model
from tests.unit.packages.conftest import FamilyFolder


def test_each_function_package_holds_its_slice_of_the_stacked_parameters(families: FamilyFolder) -> None:
    checkpoint, packed = families["gpt_oss"]
    experts = AutoModelForCausalLM.from_pretrained(checkpoint).model.layers[1].mlp.experts

    tensors = load_file(packed.path / "functions" / "L01.E003.safetensors")

    assert tensors.keys() == {"up", "down", "up_bias", "down_bias"}
    assert torch.equal(tensors["up"], experts.gate_up_proj[3])
    assert torch.equal(tensors["down"], experts.down_proj[3])
    assert torch.equal(tensors["up_bias"], experts.gate_up_proj_bias[3])
    assert torch.equal(tensors["down_bias"], experts.down_proj_bias[3])


def test_the_manifest_describes_every_file_of_the_folder(families: FamilyFolder) -> None:
    _, packed = families["deepseek_v3"]
    manifest = read_manifest(packed.path)

    assert (manifest.model_type, manifest.architecture) == ("deepseek_v3", "DeepseekV3ForCausalLM")
    assert (manifest.num_moe_layers, manifest.num_experts, manifest.top_k) == (2, 8, 2)
    assert [layer.module for layer in manifest.layers] == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
    assert [entry.name for entry in manifest.functions[7:9]] == ["L00.E007", "L01.E000"]
    assert manifest.functions[0].tensors["up"].shape == (48, 32)
    assert manifest.functions[0].bytes == 4 * (48 * 32 + 32 * 24)
    files = {str(path.relative_to(packed.path)) for path in packed.path.rglob("*") if path.is_file()}
    assert files == {*manifest.files, MANIFEST_NAME}
    for entry in (*manifest.functions, *manifest.backbone):
        assert sha256_of(packed.path / entry.file) == entry.sha256


def test_the_backbone_folder_has_the_tokenizer_and_the_chat_template(families: FamilyFolder) -> None:
    _, packed = families["mixtral"]
    names = {path.name for path in packed.backbone_path.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packages_keep_the_checkpoints_own_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("olmoe", tmp_path / "checkpoint", dtype=dtype)
    manifest = pack_checkpoint(checkpoint, tmp_path / "packed")
    weights = PackedModel.open(tmp_path / "packed").read_function(FunctionId(0, 0))
    assert manifest.dtype == str(dtype).removeprefix("torch.")
    assert (weights.up.dtype, weights.down.dtype) == (dtype, dtype)


def test_a_sharded_checkpoint_packs_like_a_whole_one(tmp_path: Path) -> None:
    model = make_model("qwen2_moe")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert not (tmp_path / "sharded" / "model.safetensors").exists()

    whole = pack_checkpoint(tmp_path / "whole", tmp_path / "packed-whole", max_shard_bytes=1 << 30)
    sharded = pack_checkpoint(tmp_path / "sharded", tmp_path / "packed-sharded", max_shard_bytes=50_000)

    assert [entry.sha256 for entry in sharded.functions] == [entry.sha256 for entry in whole.functions]
    assert _backbone_tensors(tmp_path / "packed-sharded").keys() == _backbone_tensors(tmp_path / "packed-whole").keys()
    assert len(list((tmp_path / "packed-sharded" / "backbone").glob("*.safetensors"))) > 1
    for name, tensor in _backbone_tensors(tmp_path / "packed-whole").items():
        assert torch.equal(_backbone_tensors(tmp_path / "packed-sharded")[name], tensor)


def test_progress_counts_every_package_and_the_backbone(tmp_path: Path, families: FamilyFolder) -> None:
    seen: list[tuple[int, int, str]] = []
    pack_checkpoint(families["mixtral"].checkpoint, tmp_path / "packed", on_progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == list(range(1, 10))
    assert {total for _, total, _ in seen} == {9}
    assert (seen[0][2], seen[-2][2], seen[-1][2]) == ("L00.E000", "L01.E003", "backbone")


def test_packing_again_returns_at_once(tmp_path: Path, families: FamilyFolder) -> None:
    checkpoint = families["mixtral"].checkpoint
    first = pack_checkpoint(checkpoint, tmp_path / "packed")
    assert pack_checkpoint(checkpoint, tmp_path / "packed", on_progress=_must_not_be_called) == first


def test_a_folder_with_other_content_is_left_alone(tmp_path: Path, families: FamilyFolder) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to-mother.txt").write_text("dear mother")

    with pytest.raises(PackageError, match="exists and is not a packed model"):
        pack_checkpoint(families["mixtral"].checkpoint, tmp_path / "letters")

    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["to-mother.txt"]


def test_a_pack_of_another_checkpoint_is_not_overwritten(tmp_path: Path, families: FamilyFolder) -> None:
    pack_checkpoint(families["mixtral"].checkpoint, tmp_path / "packed", model_id="first")

    with pytest.raises(PackageError, match=r"is a pack of another checkpoint \(first\)"):
        pack_checkpoint(families["olmoe"].checkpoint, tmp_path / "packed")

    assert read_manifest(tmp_path / "packed").model_type == "mixtral"


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path, families: FamilyFolder) -> None:
    def fail_at_the_third(done: int, total: int, label: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_checkpoint(families["mixtral"].checkpoint, tmp_path / "packed", on_progress=fail_at_the_third)

    assert list(tmp_path.iterdir()) == []


def test_a_killed_pack_is_not_taken_for_whole_and_the_next_run_works(tmp_path: Path, families: FamilyFolder) -> None:
    checkpoint = families["mixtral"].checkpoint
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from moeless.packages.pack import pack_checkpoint\n"
        "def die(done, total, label):\n"
        "    if done == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "pack_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), on_progress=die)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, checkpoint, tmp_path / "packed"], check=False, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir()]
    assert left == [".packed.partial"]
    with pytest.raises(PackageError, match="is this a packed model"):
        PackedModel.open(tmp_path / "packed")
    with pytest.raises(PackageError, match="is this a packed model"):
        PackedModel.open(tmp_path / ".packed.partial")

    pack_checkpoint(checkpoint, tmp_path / "packed")

    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    assert len(PackedModel.open(tmp_path / "packed").functions) == 8


def test_of_two_packs_at_once_one_waits_and_finds_it_done(tmp_path: Path, families: FamilyFolder) -> None:
    checkpoint = families["mixtral"].checkpoint
    second_may_start, first_may_go_on = threading.Event(), threading.Event()
    written: list[str] = []

    def first() -> None:
        def hold_once(done: int, total: int, label: str) -> None:
            written.append(label)
            second_may_start.set()
            assert first_may_go_on.wait(timeout=60)

        pack_checkpoint(checkpoint, tmp_path / "packed", on_progress=hold_once)

    thread = threading.Thread(target=first)
    thread.start()
    assert second_may_start.wait(timeout=60)
    release = threading.Timer(0.1, first_may_go_on.set)
    release.start()
    pack_checkpoint(checkpoint, tmp_path / "packed", on_progress=_must_not_be_called)
    thread.join()
    release.join()

    assert len(written) == 9


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, families: FamilyFolder) -> None:
    (tmp_path / "file").write_text("not a folder")

    with pytest.raises(PackageError, match=r"file.*cannot be written \(Not a directory\)"):
        pack_checkpoint(families["mixtral"].checkpoint, tmp_path / "file" / "packed")


def test_of_a_multimodal_checkpoint_the_language_model_is_packed(tmp_path: Path, families: FamilyFolder) -> None:
    text_config = AutoConfig.from_pretrained(families["qwen3_5_moe_text"].checkpoint).to_dict()
    vision_config = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3_5MoeConfig(text_config=text_config, vision_config=vision_config)
    Qwen3_5MoeForConditionalGeneration(config).save_pretrained(tmp_path / "checkpoint")

    manifest = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "packed")

    assert manifest.architecture == "Qwen3_5MoeForCausalLM"
    assert not any("visual" in name for name in _backbone_tensors(tmp_path / "packed"))


def test_a_checkpoint_with_tied_weights_packs_them_once(tmp_path: Path, families: FamilyFolder) -> None:
    tensors = _backbone_tensors(families["granitemoe"].packed.path)
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" not in tensors


def _backbone_tensors(packed: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted((packed / "backbone").glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def _must_not_be_called(done: int, total: int, label: str) -> None:
    raise AssertionError(f"packed {label} again")
