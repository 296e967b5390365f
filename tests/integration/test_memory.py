"""The backbone's process holds nothing of experts that run elsewhere, and the workers hold each expert once.

Said by the accounting of the pools and by the kernel's of the processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moeless.core.expert import FunctionId
from moeless.core.routing_table import RoutingTable, spread_evenly
from moeless.packages.pack import pack_checkpoint
from moeless.packages.packed_model import PackedModel
from tests.support import backbone_process
from tests.support.workers import WorkerProcess

MIB = 1 << 20
MARGIN = 24 * MIB
"""Memory that a process may hold beyond weights: activations, caches of the allocator, channels to workers."""
WORKERS = ("w0", "w1")


class Measured(NamedTuple):
    engine: dict[str, Any]
    """Memory figures that the backbone's process reports."""
    worker_growth: dict[str, int]
    """Unique bytes of each worker's process that came with its functions."""
    states: dict[str, dict[str, str]]
    resident: dict[str, int]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """144 MiB of experts around a backbone of 1.6 MiB."""
    folder = tmp_path_factory.mktemp("memory")
    config = MixtralConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=12,
        num_experts_per_tok=2,
    )
    MixtralForCausalLM(config).save_pretrained(folder / "checkpoint")
    pack_checkpoint(folder / "checkpoint", folder / "packed")
    return PackedModel.open(folder / "packed")


def table_of(packed: PackedModel) -> RoutingTable:
    manifest = packed.manifest
    return spread_evenly(num_layers=manifest.num_moe_layers, num_experts=manifest.num_experts, workers=WORKERS)


@pytest.fixture(scope="module")
def measured(packed: PackedModel) -> Iterator[Measured]:
    table = table_of(packed)
    with WorkerProcess() as first, WorkerProcess() as second:
        processes = dict(zip(WORKERS, (first, second), strict=True))
        growth = {}
        for name, process in processes.items():
            process.host(f"warm-up-{name}", packed)
            before = process.unique_bytes()
            theirs = [function for function in packed.functions if table.instances[function][0].worker == name]
            process.host(name, packed, theirs)
            growth[name] = process.unique_bytes() - before
        task = {
            "packed": str(packed.path),
            "endpoints": {name: msgspec.to_builtins(process.endpoint(name)) for name, process in processes.items()},
        }
        answer = subprocess.run(
            [sys.executable, "-m", backbone_process.__name__],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert answer.returncode == 0, answer.stderr
        reports = {name: process.report(name) for name, process in processes.items()}
        yield Measured(
            engine=json.loads(answer.stdout),
            worker_growth=growth,
            states={name: report.states for name, report in reports.items()},
            resident={name: report.resident_bytes for name, report in reports.items()},
        )


def test_the_backbone_is_small_beside_its_experts(packed: PackedModel, measured: Measured) -> None:
    assert packed.manifest.function_bytes == 4 * 12 * 3 * 256 * 1024 * 4 == 144 * MIB
    assert measured.engine["backbone_bytes"] == sum(tensor.nbytes for tensor in _backbone_tensors(packed).values())
    assert measured.engine["backbone_bytes"] < 4 * MIB


def test_the_backbones_process_accounts_for_no_byte_of_remote_experts(measured: Measured) -> None:
    assert measured.engine["pool_resident_bytes"] == 0
    assert measured.engine["expert_bytes_in_model"] == 0
    assert measured.engine["tokens_per_worker"].keys() == set(WORKERS)
    assert measured.engine["fallbacks"] == 0


def test_the_kernel_sees_no_experts_in_the_backbones_process(packed: PackedModel, measured: Measured) -> None:
    """Unique memory grows by the backbone and some buffers, a small part of what the experts take."""
    growth = measured.engine["unique_bytes_after"] - measured.engine["unique_bytes_before"]
    assert growth < measured.engine["backbone_bytes"] + MARGIN
    assert growth < packed.manifest.function_bytes / 3
    assert measured.engine["peak_growth_bytes"] < packed.manifest.function_bytes / 3


def test_the_workers_together_hold_each_expert_once(packed: PackedModel, measured: Measured) -> None:
    held = [FunctionId.parse(name) for states in measured.states.values() for name in states]
    assert sorted(held) == packed.functions
    assert all(set(states.values()) == {"warm"} for states in measured.states.values())
    assert sum(measured.resident.values()) == packed.manifest.function_bytes


def test_the_kernel_sees_in_each_worker_what_it_accounts_for(measured: Measured) -> None:
    for name, growth in measured.worker_growth.items():
        assert measured.resident[name] - MIB < growth < measured.resident[name] + MARGIN


def _backbone_tensors(packed: PackedModel) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in packed.backbone_weight_files() for name, tensor in load_file(file).items()}
