"""Refusals of wrong checkpoints: one line that says why, before anything is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config

from moeless.core.errors import CheckpointError, UnsupportedFamilyError
from moeless.packages.pack import pack_checkpoint
from tests.unit.packages.conftest import FamilyFolder


@pytest.fixture
def checkpoint(tmp_path: Path, families: FamilyFolder) -> Path:
    """A Mixtral checkpoint that a test may damage."""
    return shutil.copytree(families["mixtral"].checkpoint, tmp_path / "checkpoint")


def refusal(checkpoint: Path) -> str:
    """The one line that packing `checkpoint` ends with."""
    out = checkpoint.parent / "packed"
    with pytest.raises(CheckpointError) as caught:
        pack_checkpoint(checkpoint, out)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    assert [path for path in checkpoint.parent.iterdir() if "packed" in path.name] == []
    return message


def edit_config(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(checkpoint: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_a_folder_without_config(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json: cannot be read" in refusal(tmp_path / "empty")


def test_a_config_that_is_not_json(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    assert "config.json: not JSON" in refusal(checkpoint)


def test_a_config_that_its_family_does_not_accept(checkpoint: Path) -> None:
    edit_config(checkpoint, num_local_experts="many")
    assert "config.json: " in refusal(checkpoint)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rms_norm_eps": "small"}, r"Validation error for field 'rms_norm_eps'.*expected float, got str.*small"),
        ({"dtype": "int8"}, r"MixtralForCausalLM cannot be built with it: .*torch.int8.*not a floating-point dtype"),
        ({"pad_token_id": 10**9}, "MixtralForCausalLM cannot be built with it: Padding_idx must be within"),
        (
            {"num_attention_heads": 2**30, "num_key_value_heads": 2**30},
            "MixtralForCausalLM cannot be built with it: 0.0 cannot be raised to a negative power",
        ),
    ],
)
def test_a_config_that_transformers_refuses_is_named_with_the_reason_in_one_line(
    checkpoint: Path, changes: dict[str, Any], reason: str
) -> None:
    edit_config(checkpoint, **changes)
    message = refusal(checkpoint)
    assert re.search(rf"config.json: {reason}", message)
    assert "\n" not in message


def test_a_dense_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    assert "not an MoE model: LlamaForCausalLM ('llama') has no routed experts" in refusal(tmp_path / "dense")


def test_an_moe_architecture_without_moe_layers(tmp_path: Path, families: FamilyFolder) -> None:
    copy = shutil.copytree(families["qwen2_moe"].checkpoint, tmp_path / "checkpoint")
    edit_config(copy, mlp_only_layers=[0, 1])
    assert "not an MoE model" in refusal(copy)


def test_a_model_that_is_no_causal_language_model(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(T5Config().to_json_string())
    with pytest.raises(UnsupportedFamilyError, match=r"'t5'.*no causal language model"):
        pack_checkpoint(checkpoint, checkpoint.parent / "packed")


def test_remote_code(checkpoint: Path) -> None:
    edit_config(checkpoint, model_type="ours", auto_map={"AutoModelForCausalLM": "modeling_ours.OursForCausalLM"})
    assert "wants remote code" in refusal(checkpoint)


def test_remote_code_is_not_needed_where_transformers_knows_the_family(checkpoint: Path) -> None:
    edit_config(checkpoint, auto_map={"AutoModelForCausalLM": "modeling_ours.OursForCausalLM"})
    assert pack_checkpoint(checkpoint, checkpoint.parent / "packed").architecture == "MixtralForCausalLM"


def test_an_unknown_model_type(checkpoint: Path) -> None:
    edit_config(checkpoint, model_type="unheard_of")
    assert "model_type 'unheard_of' is not known to transformers" in refusal(checkpoint)


def test_weights_in_pickle_files_only(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    assert "only pytorch_model.bin; moeless reads safetensors only" in refusal(checkpoint)


def test_no_weights_at_all(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert "has no model.safetensors; " in refusal(checkpoint)


def test_a_shard_that_the_index_names_but_is_not_there(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-00002-of-00002.safetensors, which its index names" in refusal(checkpoint)


def test_a_truncated_weights_file(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "model.safetensors: not a readable safetensors file" in refusal(checkpoint)


def test_a_quantized_checkpoint(checkpoint: Path) -> None:
    edit_config(checkpoint, quantization_config={"quant_method": "mxfp4"})
    assert "is quantized (mxfp4), which cannot be packed" in refusal(checkpoint)


def test_a_missing_backbone_tensor_is_named(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    assert refusal(checkpoint) == "the checkpoint lacks tensor model.layers.1.self_attn.k_proj.weight"


def test_a_missing_tensor_of_one_expert_is_named_as_in_the_checkpoint(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"))
    assert refusal(checkpoint) == "the checkpoint lacks tensor model.layers.1.block_sparse_moe.experts.2.w3.weight"


def test_a_missing_expert_is_named_and_counted(checkpoint: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.0." in name and ".experts.3." in name]:
            del tensors[name]

    edit_tensors(checkpoint, drop)
    assert "lacks tensor model.layers.0.block_sparse_moe.experts.3." in refusal(checkpoint)


def test_all_experts_of_a_layer_missing(checkpoint: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.0." in name and ".experts." in name]:
            del tensors[name]

    edit_tensors(checkpoint, drop)
    message = refusal(checkpoint)
    assert "lacks tensor model.layers.0.block_sparse_moe.experts.0." in message
    assert "(and 11 more)" in message


def test_both_ends_of_a_tie_missing(tmp_path: Path, families: FamilyFolder) -> None:
    copy = shutil.copytree(families["granitemoe"].checkpoint, tmp_path / "checkpoint")
    edit_tensors(copy, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert "lacks tensor lm_head.weight (and 1 more)" in refusal(copy)


def test_a_tensor_of_the_wrong_shape_is_named(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    assert refusal(checkpoint) == "tensor model.norm.weight must have shape (32,), got (31,)"


def test_more_experts_than_the_config_says(checkpoint: Path) -> None:
    edit_config(checkpoint, num_local_experts=3)
    assert "mlp.experts.down_proj must have shape (3, 32, 48), got (4, 32, 48)" in refusal(checkpoint)


def test_a_tensor_in_a_layer_that_has_no_place_for_it(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}))
    assert "holds tensor model.layers.0.self_attn.q_norm.weight, for which" in refusal(checkpoint)


def test_parts_beside_the_language_model_are_left_out(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A multi-token-prediction layer or a vision tower, which the causal language model does not have."""
    extra = {"model.layers.2.eh_proj.weight": torch.ones(2, 2), "vision_tower.blocks.0.weight": torch.ones(2)}
    edit_tensors(checkpoint, lambda tensors: tensors.update(extra))
    pack_checkpoint(checkpoint, checkpoint.parent / "packed")
    assert "ignored tensors=2 first=model.layers.2.eh_proj.weight" in caplog.text


@pytest.mark.parametrize(
    ("source", "packed_as"),
    [
        ("model.layers.1.block_sparse_moe.experts.2.w3.weight", "model.layers.1.mlp.experts.gate_up_proj[2]"),
        ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.k_proj.weight"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_with_its_tensor(
    checkpoint: Path, source: str, packed_as: str, value: float
) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors[source].view(-1)[3:4].fill_(value))
    message = refusal(checkpoint)
    assert message.startswith(f"tensor {packed_as} must be finite, holds {value} at [")
