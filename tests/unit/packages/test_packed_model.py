"""Loading from a packed folder: memory maps, checksums, errors that name the function or file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from moeless.core.errors import ChecksumError, PackageError
from moeless.core.expert import FunctionId
from moeless.packages.backbone import load_backbone
from moeless.packages.files import sha256_of
from moeless.packages.manifest import MANIFEST_NAME
from moeless.packages.packed_model import PackedModel
from tests.unit.packages.conftest import FamilyFolder

FUNCTION = FunctionId(1, 2)


@pytest.fixture
def folder(tmp_path: Path, families: FamilyFolder) -> Path:
    """A packed Mixtral that a test may damage."""
    return shutil.copytree(families["mixtral"].packed.path, tmp_path / "packed")


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_functions_are_listed_by_layer_and_expert(families: FamilyFolder) -> None:
    packed = families["mixtral"].packed
    assert packed.functions == [FunctionId(layer, expert) for layer in range(2) for expert in range(4)]


def test_function_bytes_are_those_of_the_loaded_weights(families: FamilyFolder) -> None:
    for family in ("mixtral", "gpt_oss", "nemotron_h"):
        packed = families[family].packed
        assert packed.function_bytes(FunctionId(0, 0)) == packed.read_function(FunctionId(0, 0)).num_bytes


def test_a_loaded_function_is_a_map_of_its_package(folder: Path) -> None:
    packed = PackedModel.open(folder)
    package = folder / "functions" / f"{FUNCTION}.safetensors"
    before = sha256_of(package)

    weights = packed.read_function(FUNCTION)

    assert str(package) in Path("/proc/self/maps").read_text()
    weights.up.zero_()
    assert sha256_of(package) == before, "a write to the weights reached the file"


def test_mapped_tensors_are_aligned_to_cache_lines(families: FamilyFolder) -> None:
    for family in ("mixtral", "gpt_oss", "nemotron_h"):
        weights = families[family].packed.read_function(FunctionId(1, 1))
        first = min(tensor.data_ptr() for _, tensor in weights.named_tensors())
        assert first % 64 == 0


def test_a_function_loads_in_another_dtype(families: FamilyFolder) -> None:
    packed = families["mixtral"].packed
    half = packed.read_function(FUNCTION, dtype=torch.bfloat16)
    assert torch.equal(half.down, packed.read_function(FUNCTION).down.to(torch.bfloat16))
    assert half.num_bytes * 2 == packed.function_bytes(FUNCTION)


@pytest.mark.gpu
def test_a_function_loads_onto_a_gpu(families: FamilyFolder) -> None:
    packed = families["mixtral"].packed
    weights = packed.read_function(FUNCTION, device="cuda")
    assert torch.equal(weights.up.cpu(), packed.read_function(FUNCTION).up)


def test_a_damaged_package_is_refused_by_name(folder: Path) -> None:
    flip_a_byte(folder / "functions" / f"{FUNCTION}.safetensors")
    packed = PackedModel.open(folder)

    with pytest.raises(
        ChecksumError, match=r"^L01\.E002: sha256 of .*L01\.E002\.safetensors must be [0-9a-f]{64}, got"
    ):
        packed.read_function(FUNCTION)

    packed.read_function(FunctionId(1, 3))


def test_the_checksum_is_taken_once_per_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Path] = []

    def counted(path: Path) -> str:
        taken.append(path)
        return sha256_of(path)

    monkeypatch.setattr("moeless.packages.packed_model.sha256_of", counted)
    packed = PackedModel.open(folder)
    for _ in range(3):
        packed.read_function(FUNCTION)
    assert taken == [folder / "functions" / f"{FUNCTION}.safetensors"]


@pytest.mark.parametrize("name", ["backbone-00001.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_backbone_is_refused_by_file_name(name: str, folder: Path) -> None:
    flip_a_byte(folder / "backbone" / name)
    with pytest.raises(ChecksumError, match=f"^backbone/{name}: sha256"):
        load_backbone(PackedModel.open(folder))


def test_a_missing_package_is_named_on_opening(folder: Path) -> None:
    (folder / "functions" / "L00.E001.safetensors").unlink()
    with pytest.raises(PackageError, match=r"lacks functions/L00\.E001\.safetensors"):
        PackedModel.open(folder)


def test_a_package_that_vanishes_after_opening_is_named(folder: Path) -> None:
    packed = PackedModel.open(folder)
    (folder / "functions" / f"{FUNCTION}.safetensors").unlink()
    with pytest.raises(PackageError, match=r"^L01\.E002: .* cannot be read \(No such file"):
        packed.read_function(FUNCTION)


def test_an_unknown_function_is_refused(families: FamilyFolder) -> None:
    packed = families["mixtral"].packed
    with pytest.raises(PackageError, match=r"has no function L09\.E000"):
        packed.read_function(FunctionId(9, 0))
    with pytest.raises(PackageError, match="layer must be from 0 to 1, got 9"):
        packed.layout(9)


def test_a_folder_without_manifest_is_not_a_packed_model(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(PackageError, match="is this a packed model"):
        PackedModel.open(folder)
