"""Packed folders of experts alone, in any layout, written without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from moeless.core.expert import ExpertLayout, FunctionId
from moeless.packages.files import write_durably
from moeless.packages.manifest import (
    FUNCTIONS_DIR,
    MANIFEST_NAME,
    FunctionEntry,
    LayerEntry,
    Manifest,
    TensorEntry,
    encode_manifest,
)
from moeless.packages.packed_model import PackedModel
from moeless.packages.tensor_files import dtype_name, encode_tensors


def layout(**changes: object) -> ExpertLayout:
    """A Mixtral-like layout of small size, but for `changes`."""
    fields: dict[str, object] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "has_gate": True,
        "has_bias": False,
        "is_transposed": False,
        "is_concatenated": True,
        "activation": "silu",
    }
    return ExpertLayout(**(fields | changes))  # type: ignore[arg-type]


def write_packed(
    folder: Path,
    layouts: Sequence[ExpertLayout],
    *,
    num_experts: int = 4,
    top_k: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PackedModel:
    """One MoE layer for each of `layouts`, with random weights whose outputs are about as large as their inputs."""
    generator = torch.Generator().manual_seed(seed)
    (folder / FUNCTIONS_DIR).mkdir(parents=True)
    functions = []
    for layer, experts_layout in enumerate(layouts):
        for expert in range(num_experts):
            name = str(FunctionId(layer, expert))
            file = f"{FUNCTIONS_DIR}/{name}.safetensors"
            tensors = {key: tensor.to(dtype) for key, tensor in _random_weights(experts_layout, generator).items()}
            functions.append(
                FunctionEntry(
                    name=name,
                    layer=layer,
                    expert=expert,
                    file=file,
                    tensors={k: TensorEntry(tuple(t.shape), dtype_name(dtype)) for k, t in tensors.items()},
                    bytes=sum(tensor.nbytes for tensor in tensors.values()),
                    sha256=write_durably(folder / file, encode_tensors(tensors)),
                )
            )
    manifest = Manifest(
        model_id="random-experts",
        model_type="random",
        architecture="none",
        dtype=dtype_name(dtype),
        source_fingerprint="",
        num_moe_layers=len(layouts),
        num_experts=num_experts,
        top_k=top_k,
        layers=[
            LayerEntry(layer=i, module=f"layers.{i}.experts", num_experts=num_experts, top_k=top_k, layout=found)
            for i, found in enumerate(layouts)
        ],
        functions=functions,
        backbone=[],
    )
    write_durably(folder / MANIFEST_NAME, encode_manifest(manifest))
    return PackedModel.open(folder)


def damage(packed: PackedModel, function: FunctionId) -> None:
    """Flip one bit of a function's package."""
    path = packed.path / FUNCTIONS_DIR / f"{function}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _random_weights(experts_layout: ExpertLayout, generator: torch.Generator) -> dict[str, torch.Tensor]:
    hidden, inner = experts_layout.hidden_size, experts_layout.intermediate_size
    up_out = 2 * inner if experts_layout.has_gate else inner
    up = torch.randn(up_out, hidden, generator=generator) / hidden**0.5
    down = torch.randn(hidden, inner, generator=generator) / inner**0.5
    if experts_layout.is_transposed:
        up, down = up.T.contiguous(), down.T.contiguous()
    tensors = {"up": up, "down": down}
    if experts_layout.has_bias:
        tensors["up_bias"] = torch.randn(up_out, generator=generator)
        tensors["down_bias"] = torch.randn(hidden, generator=generator)
    return tensors
