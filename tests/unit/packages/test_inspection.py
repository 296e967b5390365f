"""Broken and hostile checkpoints: each is refused in one line, before torch is imported and without costing memory."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moeless.core.errors import CheckpointError
from moeless.engine.transformers.paged_attention import NAME as OUR_ATTENTION
from moeless.packages.inspection import inspect_checkpoint
from moeless.packages.inspection.config import ACTIVATIONS, ATTENTIONS, ROPE_TYPES, check_config
from moeless.packages.inspection.files import require_inside
from tests.families import PARITY_FAMILIES
from tests.family_configs import OTHER_FAMILIES
from tests.unit.packages.conftest import FamilyFolder

DEEP = "[" * 10_000 + "]" * 10_000
MAX_REFUSAL_BYTES = 200 << 20


@pytest.fixture
def checkpoint(tmp_path: Path, families: FamilyFolder) -> Path:
    """A Mixtral checkpoint that a test may damage."""
    return shutil.copytree(families["mixtral"].checkpoint, tmp_path / "checkpoint")


def refusal(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        inspect_checkpoint(checkpoint)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "ernie4_5_moe"])
def test_a_sound_checkpoint_passes(family: str, families: FamilyFolder) -> None:
    assert family in PARITY_FAMILIES | OTHER_FAMILIES
    files = inspect_checkpoint(families[family].checkpoint)
    assert [file.suffix for file in files] == [".safetensors"]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"hidden_act": "telepathy"}, "hidden_act must be an activation of transformers such as silu, got 'telepathy'"),
        ({"hidden_act": ["silu"]}, "hidden_act must be an activation of transformers such as silu, got ['silu']"),
        ({"attn_implementation": "telepathy"}, "attn_implementation must be one of eager"),
        ({"num_attention_heads": 0}, "num_attention_heads must be from 1 to 1073741824, got 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be from 1 to 1073741824, got 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads 4, got 3"),
        ({"hidden_size": -32}, "hidden_size must be from 1 to 1073741824, got -32"),
        ({"intermediate_size": -1}, "intermediate_size must be from 0 to 1073741824, got -1"),
        ({"vocab_size": "many"}, "vocab_size must be a whole number, got 'many'"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers must be a whole number, got 2.5"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number, got True"),
        ({"num_key_value_heads": False}, "num_key_value_heads must be a whole number, got False"),
        ({"num_experts_per_tok": 1.5}, "num_experts_per_tok must be a whole number, got 1.5"),
        ({"moe_topk": "2"}, "moe_topk must be a whole number, got '2'"),
        ({"num_hidden_layers": 10**9, "decoder": {}}, "num_hidden_layers must be at most 41 (number of tensors)"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 41 (number of tensors), got 1000000000"),
        ({"num_local_experts": 10**9}, "num_local_experts must be at most 320 (what its tensors have room for)"),
        ({"hidden_size": 10**9}, "hidden_size must be at most 320 (largest size of its tensors), got 1000000000"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings must be from 1 to 1073741824, got 10"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be from 1 to 4, the number of experts, got 0"),
        ({"num_experts_per_tok": 1000}, "num_experts_per_tok must be from 1 to 4, the number of experts, got 1000"),
        ({"quantization_config": {"quant_method": "rot13"}}, "is quantized (rot13), which cannot be packed"),
        ({"quantization_config": "fp8"}, "quantization_config must be an object, got 'fp8'"),
        ({"rope_scaling": {"rope_type": "tarot", "factor": 2.0}}, "rope_scaling.rope_type must be one of default"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": -1}},
            "rope_parameters.factor must be a number above 0, got -1",
        ),
        (
            {"rope_parameters": {"full_attention": None, "sliding_attention": {"rope_type": "tarot"}}},
            "rope_parameters.sliding_attention.rope_type must be one of default",
        ),
        ({"rope_theta": 0}, "rope_theta must be a number above 0, got 0"),
        ({"n_group": 3}, "n_group must divide num_local_experts 4, got 3"),
        ({"n_group": 2, "topk_group": 3}, "topk_group must be from 1 to n_group 2, got 3"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object, got 'yarn'"),
        (
            {"rope_scaling": {"type": "longrope", "long_factor": "all"}},
            "rope_scaling.long_factor must be a list of numbers",
        ),
        ({"text_config": "none"}, "text_config must be an object, got 'none'"),
        ({"vision_config": {"num_hidden_layers": 10**9}}, "vision_config.num_hidden_layers must be at most 1024"),
        ({"layer_types": "full_attention"}, "layer_types must be a list of names, got 'full_attention'"),
        ({"model_type": 7}, "model_type 7 is not known to transformers"),
        ({"model_type": "unheard_of"}, "model_type 'unheard_of' is not known to transformers"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id of at least 0 or a list, got '</s>'"),
    ],
)
def test_a_field_of_the_config(checkpoint: Path, changes: dict[str, Any], rule: str) -> None:
    edit(checkpoint / "config.json", **changes)
    message = refusal(checkpoint)
    assert rule in message
    assert str(checkpoint) in message


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "added_tokens.json"]
)
@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (f'{{"deep": {DEEP}}}', "must not be nested as deeply as it is"),
        ("{", "not JSON"),
        ("[1]", "must hold a JSON object, got list"),
        ("\udcff", "not JSON"),
    ],
    ids=["deep", "cut", "list", "bytes"],
)
def test_a_file_that_should_hold_a_json_object(checkpoint: Path, name: str, text: str, rule: str) -> None:
    (checkpoint / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    message = refusal(checkpoint)
    assert rule in message
    assert f"{checkpoint / name}: " in message


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"temperature": "hot"}, "temperature must be a number from 0 to inf, got 'hot'"),
        ({"top_p": 2}, "top_p must be a number from 0 to 1, got 2"),
        ({"top_k": 0.5}, "top_k must be a whole number of at least 0, got 0.5"),
        ({"eos_token_id": [2, -7]}, "eos_token_id must be a token id of at least 0 or a list, got -7"),
    ],
)
def test_a_generation_config_of_rubbish(checkpoint: Path, changes: dict[str, Any], rule: str) -> None:
    edit(checkpoint / "generation_config.json", **changes)
    assert f"{checkpoint / 'generation_config.json'}: {rule}" in refusal(checkpoint)


@pytest.mark.parametrize("text", ["{}", "[]", '{"model": {"type": "BPE"}}', f'{{"model": {DEEP}}}'])
def test_a_tokenizer_of_rubbish(checkpoint: Path, text: str) -> None:
    (checkpoint / "tokenizer.json").write_text(text)
    assert f"{checkpoint / 'tokenizer.json'}: not a tokenizer of the tokenizers library" in refusal(checkpoint)


def test_chat_templates_of_rubbish(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_bytes(b"\xff")
    assert "chat_template.jinja: must be UTF-8 text" in refusal(checkpoint)
    (checkpoint / "chat_template.jinja").unlink()
    edit(checkpoint / "chat_template.json", chat_template=7)
    assert "chat_template.json: chat_template must be text, got 7" in refusal(checkpoint)
    (checkpoint / "chat_template.json").unlink()
    edit(checkpoint / "tokenizer_config.json", chat_template={"a": "b"})
    assert "tokenizer_config.json: chat_template must be text or a list" in refusal(checkpoint)


def with_index(checkpoint: Path, weight_map: Any) -> None:
    weights = checkpoint / "model.safetensors"
    weights.rename(checkpoint / "model-00001-of-00001.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("weight_map", "rule"),
    [
        ({"lm_head.weight": 7}, "weight_map['lm_head.weight'] must name a .safetensors file, got 7"),
        ({"lm_head.weight": "weights.bin"}, "must name a .safetensors file, got 'weights.bin'"),
        ({"lm_head.weight": "../model.safetensors"}, "must name a file of the same folder, got '../model.safetensors'"),
        ({"lm_head.weight": "/etc/model.safetensors"}, "must name a file of the same folder, got '/etc/model"),
        ({"lm_head.weight": "a\\b.safetensors"}, "must name a file of the same folder"),
        ({"lm_head.weight": "a\nb.safetensors"}, "must name a file of the same folder, got 'a\\nb"),
        ({"lm_head.weight" * 100: 7}, "must name a .safetensors file, got 7"),
        ({}, "weight_map must name at least one tensor, got none"),
        (["lm_head.weight"], "weight_map must be an object, got list"),
    ],
)
def test_an_index_that_names_what_it_should_not(checkpoint: Path, weight_map: Any, rule: str) -> None:
    with_index(checkpoint, weight_map)
    assert rule in refusal(checkpoint)


def test_an_index_of_sound_names_passes(checkpoint: Path) -> None:
    with_index(checkpoint, {"lm_head.weight": "model-00001-of-00001.safetensors"})
    assert [file.name for file in inspect_checkpoint(checkpoint)] == ["model-00001-of-00001.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_a_link_out_of_the_folder(checkpoint: Path, name: str) -> None:
    outside = checkpoint.parent / f"outside-{name}"
    (checkpoint / name).rename(outside)
    (checkpoint / name).symlink_to(outside)
    assert f"{checkpoint / name}: must lie inside {checkpoint}, but is a link to {outside}" in refusal(checkpoint)


def test_the_links_of_the_hub_s_cache_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--some--model"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    snapshot = shutil.move(checkpoint, repository / "snapshots" / "abc")
    for file in [file for file in snapshot.iterdir() if file.is_file()]:
        blob = repository / "blobs" / f"sha-{file.name}"
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, snapshot))
    assert inspect_checkpoint(snapshot) == (snapshot / "model.safetensors",)
    (snapshot / "other.json").symlink_to(repository / "refs")
    with pytest.raises(CheckpointError, match="must lie inside"):
        require_inside(snapshot, snapshot / "other.json")


def rewrite_header(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = checkpoint / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (
            lambda header: header["lm_head.weight"].update(shape=[-1, 32]),
            "sizes of tensor lm_head.weight must be at least 0",
        ),
        (lambda header: header["lm_head.weight"].update(dtype="F7"), "dtype of tensor lm_head.weight must be one of"),
        (lambda header: header["lm_head.weight"].update(shape=[1] * 100_000), "Expected `array` of length <= 16"),
        (lambda header: header["lm_head.weight"].update(shape=[2**62]), "Expected `int` <= "),
        (
            lambda header: header.update({"lm_head\nweight": header.pop("lm_head.weight")}),
            "names of tensors must be printable, of at most 500 characters, got 'lm_head\\nweight'",
        ),
        (lambda header: header["lm_head.weight"].update(shape=[10**9, 10**9]), "tensor lm_head.weight of shape"),
        (lambda header: header["lm_head.weight"].update(data_offsets=[0, 4]), "not a readable safetensors file"),
        (lambda header: header.update(more=7), "not a readable safetensors file (header: Expected `object`"),
        (lambda header: header.pop("lm_head.weight"), "not a readable safetensors file"),
    ],
    ids=["negative", "dtype", "many", "large", "name", "huge", "overlap", "number", "gap"],
)
def test_a_header_that_contradicts_itself(
    checkpoint: Path, change: Callable[[dict[str, Any]], object], rule: str
) -> None:
    rewrite_header(checkpoint, change)
    message = refusal(checkpoint)
    assert rule in message
    assert "model.safetensors: " in message


@pytest.mark.parametrize("length", [2**63, 101_000_000])
def test_a_header_that_claims_to_be_longer_than_its_file(checkpoint: Path, length: int) -> None:
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    assert f"not a readable safetensors file (header of {length} bytes in a file of 10)" in refusal(checkpoint)


def test_a_tensor_that_two_files_hold(checkpoint: Path) -> None:
    with_index(checkpoint, {"a": "model-00001-of-00001.safetensors", "b": "copy.safetensors"})
    shutil.copy(checkpoint / "model-00001-of-00001.safetensors", checkpoint / "copy.safetensors")
    assert "must be in one file only, is in another as well" in refusal(checkpoint)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 10**9}, {"num_local_experts": 10**9}, {"hidden_act": "x"}])
def test_a_refusal_needs_neither_torch_nor_much_memory(checkpoint: Path, changes: dict[str, Any]) -> None:
    edit(checkpoint / "config.json", **changes)
    program = (
        "import pathlib, sys\n"
        "from moeless.core.errors import CheckpointError\n"
        "from moeless.packages.source import resolve_model\n"
        "try:\n"
        f"    resolve_model({str(checkpoint)!r})\n"
        "except CheckpointError as error:\n"
        "    status = pathlib.Path('/proc/self/status').read_text()\n"
        "    peak = next(line.split()[1] for line in status.splitlines() if line.startswith('VmHWM'))\n"
        "    print('torch' in sys.modules, int(peak) * 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    imported_torch, peak_bytes = done.stdout.split()
    assert imported_torch == "False"
    assert int(peak_bytes) < MAX_REFUSAL_BYTES


@pytest.mark.parametrize(
    "fields",
    [
        {"mamba_dt_rank": "auto", "num_logits_to_keep": 1},  # Jamba
        {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.5]}},  # Phi-3.5
        {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},  # Qwen2-VL
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4}, "sliding_attention": None}},
        {"moe_topk": [2, 2], "num_shared_expert": [1, 1], "moe_intermediate_size": [48, 48]},  # Hunyuan
        {"moe_num_experts": [4, 4], "moe_k": 2, "moe_layer_end_index": [-1, 1]},  # ERNIE-VL
        {"mlp_only_layers": [], "no_rope_layers": [1, 0], "q_lora_rank": None, "sliding_window": -1},
        {"n_group": 8, "topk_group": 4, "n_routed_experts": 256, "rope_theta": 10000},  # DeepSeek-V3
        {"num_local_experts": 0, "num_experts_per_tok": 0},  # Granite without experts: not this check's affair
        {"_attn_implementation": "flash_attention_2", "quantization_config": None},
    ],
)
def test_what_published_configs_hold_passes(fields: dict[str, Any]) -> None:
    check_config(Path("config.json"), fields)


def test_the_names_are_those_of_transformers() -> None:
    attentions = {name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name and name != OUR_ATTENTION}
    assert attentions | {"eager"} == ATTENTIONS
    assert set(ACT2FN) == ACTIVATIONS
    assert set(ROPE_INIT_FUNCTIONS) <= ROPE_TYPES
